"""ipcache: which identity stands behind an address or prefix, and which node, with a precedence of sources.

Precedence and shadowing are inventory DP-I01 and DP-I02: an entry of a lower source never overwrites one of a
higher source but stays behind it, and shows again when the higher one goes.

A cluster has hundreds of thousands of entries, so each is kept as two byte strings in the layout that the kernel's map
has: the key, and a value that all entries of one identity on one node share.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from ciliate.datapath import layout

Prefix = IPv4Network | IPv6Network


class Source(enum.IntEnum):
    """Who says so; the higher number wins."""

    GROUP = 0
    CIDR = 1
    KUBERNETES = 2
    KVSTORE = 3
    LOCAL = 4


entry_bytes = lru_cache(maxsize=1 << 16)(layout.ipcache_entry)
"""The value of an entry; equal ones are one object."""


class Ipcache:
    """The desired table. ``upsert``, ``delete`` and ``change`` collect effective changes; ``take`` hands them out."""

    def __init__(self) -> None:
        self._tables: dict[Source, dict[bytes, bytes]] = {source: {} for source in sorted(Source, reverse=True)}
        self._dirty: set[bytes] = set()

    def upsert(
        self, prefix: Prefix, identity: int, source: Source, node: IPv4Address | IPv6Address | None = None, key: int = 0
    ) -> None:
        """Say that ``prefix`` is ``identity`` according to ``source``, on ``node`` (None: here or outside).

        ``key`` is the encryption key of that node, 0 for none.
        """
        self.change(source, {layout.ipcache_key(prefix): entry_bytes(identity, node, key)})

    def delete(self, prefix: Prefix, source: Source) -> None:
        """Withdraw what ``source`` said of ``prefix``; other sources' claims stay."""
        self.change(source, {}, (layout.ipcache_key(prefix),))

    def change(self, source: Source, upserts: Mapping[bytes, bytes], deletes: Iterable[bytes] = ()) -> None:
        """Many claims of one source at once, as keys and values of the kernel's map."""
        table, dirty = self._tables[source], self._dirty
        for key, value in upserts.items():
            if table.get(key) != value:
                table[key] = value
                dirty.add(key)
        for key in deletes:
            if table.pop(key, None) is not None:
                dirty.add(key)

    def entry(self, key: bytes) -> bytes | None:
        """The value that holds for exactly this key."""
        for table in self._tables.values():
            value = table.get(key)
            if value is not None:
                return value
        return None

    def get(self, prefix: Prefix) -> int | None:
        """The identity that holds for exactly this prefix."""
        value = self.entry(layout.ipcache_key(prefix))
        return None if value is None else layout.ipcache_identity(value)

    def source(self, prefix: Prefix) -> Source | None:
        """The source whose claim holds."""
        key = layout.ipcache_key(prefix)
        return next((source for source, table in self._tables.items() if key in table), None)

    def entries(self) -> dict[bytes, bytes]:
        """Every key with the value that holds for it."""
        found: dict[bytes, bytes] = {}
        for table in reversed(self._tables.values()):
            found.update(table)
        return found

    def table(self) -> dict[Prefix, int]:
        """Every prefix with the identity that holds for it; for people, at some microseconds an entry."""
        return {layout.ipcache_prefix(key): layout.ipcache_identity(value) for key, value in self.entries().items()}

    def claims(self, source: Source) -> Mapping[bytes, bytes]:
        """Every claim of one source, whether it holds or a higher one shadows it. Not to be changed."""
        return self._tables[source]

    def __len__(self) -> int:
        return len(set().union(*self._tables.values()))

    def take(self) -> tuple[dict[bytes, bytes], set[bytes]]:
        """Changes since the last call: entries to write and keys to remove."""
        dirty, self._dirty = self._dirty, set()
        upserts: dict[bytes, bytes] = {}
        deletes: set[bytes] = set()
        for key in dirty:
            value = self.entry(key)
            if value is None:
                deletes.add(key)
            else:
                upserts[key] = value
        return upserts, deletes

    def put_back(self, keys: Iterable[bytes]) -> None:
        """Mark keys as not yet written, after a failed write."""
        self._dirty.update(keys)
