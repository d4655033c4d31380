"""Other nodes in the tunnel's maps: pod ranges (`ciliate_tunnel`) and addresses (`ciliate_nodes`). Blocking."""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, NamedTuple

from ciliate.datapath import layout
from ciliate.datapath.bpf import Map
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.pins import PinDirectory
from ciliate.datapath.tunnel import TunnelConfig

if TYPE_CHECKING:
    from ciliate.node.model import Node

MAPS = ("ciliate_tunnel", "ciliate_nodes")


class Entry(NamedTuple):
    """One entry of one of the maps."""

    table: str
    key: bytes
    value: bytes


class NodeMaps:
    """Keeps both maps equal to what is known of the other nodes. Without a tunnel they are empty.

    `ciliate_nodes` is there only while a program asks it; ``fill`` is for when it has just been made.
    """

    def __init__(self, pins: PinDirectory, tunnel: TunnelConfig | None) -> None:
        self._pins = pins
        self._tunnel = tunnel
        self._of: dict[str, tuple[Entry, ...]] = {}
        self._users: Counter[tuple[str, bytes]] = Counter()

    def update(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> dict[str, OSError]:
        """Change by a delta; returns what failed, by `Node.id`.

        A range that another node took over stays so; where that one goes, it is again of who has it still.
        """
        failed: dict[str, OSError] = {}
        gone: list[Entry] = []
        for node in deletes:
            gone += self._set(node.id, ())
        fresh: dict[str, tuple[Entry, ...]] = {}
        for node in upserts:
            try:
                fresh[node.id] = self._entries(node)
            except DatapathError as error:
                failed[node.id] = error
                fresh[node.id] = ()
            gone += self._set(node.id, fresh[node.id])
        try:
            written = [entry for entries in fresh.values() for entry in entries]
            left = {entry[:2] for entry in gone if self._users[entry[:2]]} - {entry[:2] for entry in written}
            self._write([*written, *self._heirs(left)])
            self._delete(entry for entry in gone if not self._users[entry.table, entry.key])
        except OSError as error:
            failed |= {node.id: error for node in [*upserts, *deletes]}
        return failed

    def sync(self, nodes: Sequence[Node], prune: bool = True) -> dict[str, OSError]:
        """Make both maps what ``nodes`` mean and, with ``prune``, no more; returns what failed, by `Node.id`."""
        for number in self._of.keys() - {node.id for node in nodes}:
            self._set(number, ())
        failed: dict[str, OSError] = {}
        for node in nodes:
            try:
                self._set(node.id, self._entries(node))
            except DatapathError as error:
                failed[node.id] = error
        for name in MAPS:
            table = self._open(name)
            if table is None:
                continue
            with contextlib.closing(table):
                self._make_equal(table, prune or self._tunnel is None)
        return failed

    def fill(self, pins: PinDirectory) -> None:
        """Write everything that is known so far."""
        self._write([entry for entries in self._of.values() for entry in entries])

    def _entries(self, node: Node) -> tuple[Entry, ...]:
        tunnel = self._tunnel
        if tunnel is None:
            return ()
        to = tunnel.address(node.ipv4, node.ipv6)
        if to is None:
            versions = " or ".join(f"IPv{version}" for version in tunnel.families)
            raise DatapathError(errno.EADDRNOTAVAIL, f"node {node.id}: has no {versions} address to tunnel to")
        value = layout.tunnel_entry(to, node.key)
        ranges: Iterable[IPv4Network | IPv6Network | None] = (node.pods4, node.pods6)
        found = [Entry("ciliate_tunnel", layout.ipcache_key(item), value) for item in ranges if item is not None]
        sender = layout.node_entry(node.key)
        addresses = (address for address in (node.ipv4, node.ipv6) if address is not None)
        return (*found, *(Entry("ciliate_nodes", layout.node_key(address), sender) for address in addresses))

    def _set(self, number: str, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """Note what a node means now; returns what it meant until now."""
        old = self._of.pop(number, ())
        self._users.subtract((entry.table, entry.key) for entry in old)
        self._users.update((entry.table, entry.key) for entry in entries)
        if entries:
            self._of[number] = entries
        for entry in old:
            if not self._users[entry.table, entry.key]:
                del self._users[entry.table, entry.key]
        return old

    def _heirs(self, keys: Collection[tuple[str, bytes]]) -> list[Entry]:
        """What other nodes have for these keys."""
        if not keys:
            return []
        return [entry for entries in self._of.values() for entry in entries if entry[:2] in keys]

    def _write(self, entries: Sequence[Entry]) -> None:
        for name in MAPS:
            pairs = [(entry.key, entry.value) for entry in entries if entry.table == name]
            table = self._open(name) if pairs else None
            if table is not None:
                with contextlib.closing(table):
                    table.update_many(pairs)

    def _delete(self, entries: Iterable[Entry]) -> None:
        gone = list(entries)
        for name in MAPS:
            keys = [entry.key for entry in gone if entry.table == name]
            table = self._open(name) if keys else None
            if table is not None:
                with contextlib.closing(table):
                    table.delete_many(keys)

    def _make_equal(self, table: Map, prune: bool) -> None:
        entries = (entry for entries in self._of.values() for entry in entries)
        wanted: Mapping[bytes, bytes] = {entry.key: entry.value for entry in entries if entry.table == table.name}
        present = dict(table.items())
        table.update_many((key, value) for key, value in wanted.items() if present.get(key) != value)
        table.delete_many([key for key in present if key not in wanted] if prune else [])

    def _open(self, name: str) -> Map | None:
        path = self._pins.of(name)
        if not path.exists():
            return None
        return Map.open(path)
