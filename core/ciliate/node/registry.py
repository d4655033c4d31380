"""The node registry: this node makes itself known under its lease, and knows the others.

What this node knows outlives the store: other nodes are also in a file, and none is taken off because its key vanished
while the store was away, was wiped, or because its lease ran out a moment ago (`ciliate.kvstore.watcher` says when).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from ciliate.backoff import ClusterSize
from ciliate.kvstore import Kvstore
from ciliate.kvstore.known import WatchCache
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.kvstore.shared import SharedStore
from ciliate.measure import NODE_EVENTS
from ciliate.node import model
from ciliate.node.model import Node
from ciliate.node.ranges import Network, Ranges, checked, pod_ranges
from ciliate.node.removal import remove_for_all

log = logging.getLogger(__name__)
PREFIX = "cilium/state/nodes/v1/"
Subscriber = Callable[[list[Node], list[Node]], None]
"""Called on the loop with other nodes that came or changed, and with those that went."""


class NodeRegistry:
    """Every node of the cluster. ``own`` is this one; ``others`` those that are known, by `Node.id`."""

    def __init__(
        self, store: Kvstore, keys: LocalKeys, own: Node, cluster: ClusterSize, cache: Path | None = None
    ) -> None:
        """``cluster`` is told how many nodes there are; ``cache`` is the file that outlives store and agent."""
        self.own = own
        self.others: dict[str, Node] = {}
        self._ranges = Ranges()
        self._store = store
        self._cluster = cluster
        self._subscribers: list[Subscriber] = []
        self.shared: SharedStore[Node] = SharedStore(
            store,
            keys,
            PREFIX,
            self._decode,
            self._changed,
            cache=WatchCache(cache, model.encode) if cache else None,
            cluster=cluster,
        )

    async def start(self) -> None:
        """Make this node known and begin to follow the others; returns before the store has answered."""
        self.publish(self.own)
        self._cluster.nodes = 1
        await self.shared.start()

    async def stop(self) -> None:
        """Stop following. This node stays known until its lease runs out."""
        await self.shared.stop()

    def publish(self, own: Node) -> None:
        """Tell the others that this node is like this now."""
        self.own = own
        self.shared.set(own.id, model.encode(own))

    async def remove(self, node: Node) -> None:
        """Tell the whole cluster that a node will not come back; one that lives makes itself known again.

        KvstoreError where the store fails.
        """
        await remove_for_all(self._store, {PREFIX + node.id: model.encode(node)})

    def subscribe(self, subscriber: Subscriber) -> None:
        """Tell ``subscriber`` of every change from now on, and at once of every node known."""
        self._subscribers.append(subscriber)
        if self.others:
            subscriber(list(self.others.values()), [])

    @property
    def complete(self) -> bool:
        """Whether the store has said once what nodes there are."""
        return self.shared.synced.is_set()

    @property
    def disputes(self) -> Mapping[str, str]:
        """Nodes that claim another's pod range, by id, and which; they count without it."""
        return self._ranges.disputes

    def whose(self, prefix: Network) -> list[str]:
        """Nodes, this one included, that have a range which overlaps this one."""
        own = [self.own.id] if any(prefix.overlaps(other) for other in pod_ranges(self.own)) else []
        return [*own, *self._ranges.holders(prefix)]

    def reconsider(self) -> None:
        """Give nodes what they claim and could not have, where the one that had it is gone meanwhile."""
        if self._ranges.disputes:
            self._changed({}, {})

    def _decode(self, name: str, value: bytes) -> Node:
        node = model.decode(value)
        if node.id != name:
            raise ValueError(f"node {node.id}: expected {name} as in the key")
        return checked(node, self.own) if node.id != self.own.id else node

    def _changed(self, changed: Mapping[str, Node], removed: Mapping[str, Node]) -> None:
        went = [node for node in removed.values() if node.id != self.own.id]
        for node in went:
            self._ranges.drop(node.id)
        came = [self._ranges.settle(node, self.shared.holds) for node in changed.values() if node.id != self.own.id]
        for node in self._ranges.disputed():
            settled = self._ranges.settle(node, self.shared.holds)
            if settled != self.others.get(node.id) and node.id not in changed:
                came.append(settled)
        for number in self._ranges.disputes.keys() & changed.keys():
            log.warning("node %s: %s; it stays with the one that has it", number, self._ranges.disputes[number])
        for node in came:
            NODE_EVENTS.add("update" if node.id in self.others else "add", "kvstore")
            self.others[node.id] = node
        for node in went:
            NODE_EVENTS.add("delete", "kvstore")
            self.others.pop(node.id, None)
        self._cluster.nodes = len(self.others) + 1
        if came or went:
            for subscriber in self._subscribers:
                subscriber(came, went)
