"""This node as a member of its cluster: what it tells the others and what their news set in motion here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciliate.datapath.noderoutes import own_address
from ciliate.kvstore import StoreStatus
from ciliate.kvstore.watcher import GRACE
from ciliate.node import Node, NodeRegistry, Peers
from ciliate.node.addresses import PREFIX, ClusterAddresses
from ciliate.node.peers import UnreachableError
from ciliate.node.records import Address
from ciliate.node.withdrawals import Withdrawals

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.config import AgentConfig
    from ciliate.ipam import Ipam

log = logging.getLogger(__name__)
SYNC_INTERVAL = 60.0
"""Seconds between comparisons of every node with the kernel, times ln(1 + nodes) (inventory 4.12 F7)."""
RETRY_INTERVAL = 15.0
"""Seconds between attempts to find a way to nodes that the kernel has none to."""
SETTLE_INTERVAL = 3600.0
CACHE = "nodes.json"
NOT_ASKED = StoreStatus(True, "not asked yet")
PURGE = "conntrack-purge"
"""The duty that forgets flows of addresses that are gone."""
WINDOW = 0.01
"""Seconds between two writes of other nodes' addresses to the kernel, at least; each costs as much as many entries."""


class Membership:
    """Nodes and their pods' addresses, as parts of a running agent."""

    def __init__(self, agent: Agent, own: Node) -> None:
        self._agent = agent
        store, keys, size = agent.kvstore, agent.local_keys, agent.cluster
        cache = Path(agent.config.state_dir) / CACHE
        self.registry = NodeRegistry(store, keys, own, size, cache)
        self.withdrawals = Withdrawals(
            keys, PREFIX, agent.config.address_reuse_grace, lambda: bool(self.registry.others), self._shared
        )
        self.addresses = ClusterAddresses(
            store, keys, own, agent.ipcache, size, self._addresses_changed, self.registry, self.withdrawals
        )
        self.addresses.on_gone = self._addresses_gone
        self.peers = Peers(agent.datapath.nodes)
        self._unreachable = ""
        self._last = 0.0
        self._next: asyncio.TimerHandle | None = None
        self._purge: asyncio.TimerHandle | None = None
        self._settled = False
        self._heard = 0.0  # when the store had said once what nodes there are
        self._running = False

    @classmethod
    async def of(cls, agent: Agent) -> Membership:
        """The membership of an agent whose datapath runs; its endpoints' addresses are told from now on."""
        membership = cls(agent, await local_node(agent.config, agent.ipam))
        agent.services.add(NodeRegistry, membership.registry)
        agent.endpoints.told = membership.addresses
        agent.resting.rest, membership.withdrawals.on_rested = membership.withdrawals, agent.resting.rested
        return membership

    async def _shared(self) -> bool:
        """Whether other nodes may read what this one writes to its store."""
        if self._agent.store_status == NOT_ASKED:
            self._agent.store_status = await self._agent.kvstore.status()
        return self._agent.store_status.remote or bool(self.registry.others)

    async def start(self) -> None:
        """Begin to follow the cluster. What an earlier run left in the kernel counts until the store is heard."""
        self.addresses.inherit(await self._agent.datapath.ipcache())
        self.registry.subscribe(self._nodes_changed)
        await self.registry.start()
        await self.addresses.start()
        self.withdrawals.start()

    def start_duties(self) -> None:
        """Have the kernel follow."""
        run = self._agent.controllers.run
        run("node-routes", self._reconcile, RETRY_INTERVAL)
        run("node-sync", self._sync, SYNC_INTERVAL, shared=True)
        run(PURGE, self._agent.datapath.flows.purge, SYNC_INTERVAL)
        run("cluster-settle", self._settle, SETTLE_INTERVAL, shared=True)
        self._running = True
        self._trigger("node-routes")

    async def stop(self) -> None:
        """Stop following; nothing is taken back."""
        for timer in (self._next, self._purge):
            if timer is not None:
                timer.cancel()
        await self.withdrawals.stop()
        await self.addresses.stop()
        await self.registry.stop()

    async def _reconcile(self) -> None:
        await self._reach(self.peers.reconcile())

    async def _sync(self) -> None:
        """Mend what differs in the kernel, once it is known what should be there.

        What an earlier run left of nodes that this one never heard of stays as long as that of nodes that are missing
        in the store: a node that was killed with this one may come back later, and may not have been written down.
        """
        loop = asyncio.get_running_loop()
        self.registry.reconsider()
        if self.registry.complete:
            self._heard = self._heard or loop.time()
            await self._reach(self.peers.sync(prune=loop.time() - self._heard >= GRACE))

    async def _reach(self, work: Coroutine[None, None, None]) -> None:
        """That another node cannot be reached is its own or the network's fault: it shows, but no duty has failed."""
        try:
            await work
        except UnreachableError as error:
            if str(error) != self._unreachable:
                log.warning("%s", error)
            self._unreachable = str(error)
        else:
            self._unreachable = ""

    async def _settle(self) -> None:
        """Once after the start: take back what an earlier run told of pods that are gone."""
        if not self._settled:
            await self.addresses.settle()
            self._settled = True
            self._trigger("node-sync")

    def _nodes_changed(self, came: list[Node], went: list[Node]) -> None:
        self.peers.change(came, went)
        self._trigger("node-routes")

    def _addresses_changed(self, identities: set[int]) -> None:
        if identities:
            self._agent.endpoints.tell_policy(identities)
        self._realize_soon()

    def _addresses_gone(self, addresses: Collection[Address]) -> None:
        """What conntrack holds of them goes, a little later: the ipcache first says that nobody has them."""
        self._agent.datapath.flows.mark(addresses)
        if self._purge is None:
            loop = asyncio.get_running_loop()
            self._purge = loop.call_later(self._agent.datapath.flows.pause, self._purge_now)

    def _purge_now(self) -> None:
        self._purge = None
        self._trigger(PURGE)

    def _realize_soon(self) -> None:
        """At once where nothing came for a while; else what comes within `WINDOW` goes to the kernel together."""
        loop = asyncio.get_running_loop()
        if self._next is not None:
            return
        wait = self._last + WINDOW - loop.time()
        if wait <= 0:
            self._realize_now()
        else:
            self._next = loop.call_later(wait, self._realize_now)

    def _realize_now(self) -> None:
        self._next, self._last = None, asyncio.get_running_loop().time()
        self._trigger("addresses")

    def _trigger(self, duty: str) -> None:
        if self._running:
            self._agent.controllers.trigger(duty)

    async def remove(self, name: str) -> int:
        """Tell the whole cluster that another node will not come back; returns how many of its addresses went.

        KeyError where no such node is known, KvstoreError where the store fails.
        """
        node = next((item for item in self.registry.others.values() if item.name == name), None)
        if node is None:
            raise KeyError(name)
        count = await self.addresses.remove_node(node)
        await self.registry.remove(node)
        return count

    def status(self) -> tuple[str, str]:
        """State and one line for people."""
        mode, count = self._agent.config.tunnel, len(self.registry.others) + 1
        routing = "direct routing" if mode == "disabled" else f"tunnels ({mode})"
        text = f"{count} nodes, {len(self.addresses.shared.items)} addresses of pods, {routing}"
        if self.peers.errors:
            name, reason = next(iter(self.peers.errors.items()))
            return "warning", f"{text}; {len(self.peers.errors)} cannot be reached: {name}: {reason}"
        if self.registry.disputes:
            name, reason = next(iter(self.registry.disputes.items()))
            return "warning", f"{text}; {len(self.registry.disputes)} nodes claim what another has: {name}: {reason}"
        held = self.registry.shared.held
        if held:
            return "warning", f"{text}; {held} nodes are not in the store and kept for a while"
        if self.registry.shared.problem:
            return "warning", f"{text}; as last known: {self.registry.shared.problem}"
        return "ok", text

    def describe(self) -> list[dict[str, Any]]:
        """Every node, this one first, for ``ciliate node list``."""
        others = sorted(self.registry.others.values(), key=lambda node: (node.cluster, node.name))
        return [self._described(node, node.id == self.registry.own.id) for node in (self.registry.own, *others)]

    def _described(self, node: Node, own: bool) -> dict[str, Any]:
        problem = self.registry.disputes.get(node.id, "") or self.peers.errors.get(node.id, "")
        if not own and not problem and self.registry.shared.holds(node.id):
            problem = "is not in the store any more; kept for a while"
        return {
            "name": node.name,
            "cluster": node.cluster,
            "local": own,
            "primary-address": {"ipv4": _text(node.ipv4), "ipv6": _text(node.ipv6)},
            "router-address": {"ipv4": _text(node.router4), "ipv6": _text(node.router6)},
            "pod-range": {"ipv4": _text(node.pods4), "ipv6": _text(node.pods6)},
            "health-address": {"ipv4": _text(node.health4), "ipv6": _text(node.health6)},
            "encryption-key": node.key,
            "problem": problem,
        }


def _text(value: object) -> str:
    return "" if value is None else str(value)


async def local_node(config: AgentConfig, ipam: Ipam) -> Node:
    """This node, as its configuration and its namespace have it. A family that is off has no ranges."""
    four, six = config.enable_ipv4, config.enable_ipv6
    ipv4 = await _own(config.ipv4_node, 4)
    ipv6 = await _own(config.ipv6_node, 6)
    return Node(
        name=config.node_name,
        cluster=config.cluster_name,
        ipv4=IPv4Address(ipv4) if ipv4 else None,
        ipv6=IPv6Address(ipv6) if ipv6 else None,
        router4=ipam.router.ipv4,
        router6=ipam.router.ipv6,
        pods4=config.ipv4_range if four else None,
        pods6=config.ipv6_range if six else None,
    )


async def _own(option: str, version: int) -> str:
    if option != "auto":
        return option
    return _text(await asyncio.to_thread(own_address, version))
