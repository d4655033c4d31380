"""From known nodes to the kernel: routes or tunnels to the pods of every other node, kept equal to what is known."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from ciliate.measure import NODE_VALIDATIONS
from ciliate.node.model import Node

PART = 256
"""Nodes that the datapath is told of at once."""


class UnreachableError(OSError):
    """The kernel has no way to some nodes; the text says how many, and why for one of them."""


class NodeDatapath(Protocol):
    """What the datapath does with the other nodes. Both methods return what failed, by ``Node.id``; they do not raise
    for single nodes, so that one bad node never stands in the way of the others.

    In mode ``tunnel=disabled`` with ``auto-direct-node-routes`` a node means routes: ``pods4`` via ``ipv4``, ``pods6``
    via ``ipv6``, both directly reachable. With a tunnel it means entries from its pod ranges to ``ipv4`` and a route of
    the ranges into the tunnel device. Without both it means nothing and is done at once.
    A node whose addresses changed comes as an upsert under its old id: what its old form left is removed with it.
    """

    async def update_nodes(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> Mapping[str, OSError]:
        """Change by a delta; cost follows the delta. ``deletes`` are as they were last given."""

    async def sync_nodes(self, nodes: Sequence[Node], prune: bool = True) -> Mapping[str, OSError]:
        """Make the kernel exactly this: also removes what an earlier run left of nodes that are gone meanwhile.

        The agent calls it only when it knows the whole cluster, and every few minutes to mend what others broke.
        Without ``prune`` what is there of other nodes stays.
        """


def _parts(upserts: Sequence[Node], deletes: Sequence[Node]) -> Iterator[tuple[Sequence[Node], Sequence[Node]]]:
    """A delta in parts: those who wait for the datapath meanwhile get their turn in between."""
    for start in range(0, max(len(upserts), len(deletes)), PART):
        yield upserts[start : start + PART], deletes[start : start + PART]


class Peers:
    """The desired table of other nodes, and which of them the kernel has."""

    def __init__(self, datapath: NodeDatapath) -> None:
        self._datapath = datapath
        self._wanted: dict[str, Node] = {}
        self._dirty: set[str] = set()
        self._present: dict[str, Node] = {}
        self._lock = asyncio.Lock()
        self.errors: dict[str, str] = {}
        """Why a node cannot be reached, by its id."""

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The desired table."""
        return self._wanted

    def change(self, upserts: Iterable[Node], deletes: Iterable[Node] = ()) -> None:
        """Note that nodes came, changed or went; ``reconcile`` brings it into the kernel."""
        for node in deletes:
            if self._wanted.pop(node.id, None) is not None:
                self._dirty.add(node.id)
        for node in upserts:
            if self._wanted.get(node.id) != node:
                self._wanted[node.id] = node
                self._dirty.add(node.id)

    async def reconcile(self) -> None:
        """Bring changes and what failed before into the kernel.

        UnreachableError where it has no way to single nodes, any other OSError where nothing was done.
        """
        async with self._lock:
            dirty, self._dirty = self._dirty, set()
            upserts = [self._wanted[number] for number in sorted(dirty & self._wanted.keys())]
            deletes = [
                self._present[number] for number in sorted(dirty - self._wanted.keys()) if number in self._present
            ]
            try:
                for some, others in _parts(upserts, deletes):
                    self._done(some, others, await self._datapath.update_nodes(some, others))
            except BaseException:
                self._dirty |= dirty
                raise
        self._raise()

    async def sync(self, prune: bool = True) -> None:
        """Compare every node with the kernel and mend what differs; raises as ``reconcile``.

        Without ``prune`` nodes that the kernel has and nobody knows stay.
        """
        async with self._lock:
            nodes = list(self._wanted.values())
            self._dirty.clear()
            failed = await self._datapath.sync_nodes(nodes, prune)
            gone = [node for number, node in self._present.items() if number not in self._wanted]
            self._done(nodes, gone if prune else [], failed)
        NODE_VALIDATIONS.add(amount=len(nodes))
        self._raise()

    def _done(self, upserts: Iterable[Node], deletes: Iterable[Node], failed: Mapping[str, OSError]) -> None:
        for node in upserts:
            self.errors.pop(node.id, None)
            self._present[node.id] = node
        for node in deletes:
            self.errors.pop(node.id, None)
            if node.id not in failed:
                self._present.pop(node.id, None)
        self.errors.update((number, str(error)) for number, error in failed.items())
        self._dirty.update(failed)

    def _raise(self) -> None:
        if self.errors:
            number, error = next(iter(self.errors.items()))
            raise UnreachableError(f"{len(self.errors)} nodes cannot be reached: {number}: {error}")
