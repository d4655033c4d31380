"""ipcache: which identity stands behind an address or prefix, with a precedence of sources.

Precedence and shadowing are inventory DP-I01 and DP-I02: an entry of a lower source never overwrites one of a
higher source but stays behind it, and shows again when the higher one goes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network

Prefix = IPv4Network | IPv6Network


class Source(enum.IntEnum):
    """Who says so; the higher number wins."""

    CIDR = 1
    KUBERNETES = 2
    KVSTORE = 3
    LOCAL = 4


class Ipcache:
    """The desired table. ``upsert`` and ``delete`` collect effective changes; ``take`` hands them out."""

    def __init__(self) -> None:
        self._claims: dict[Prefix, dict[Source, int]] = {}
        self._dirty: set[Prefix] = set()

    def upsert(self, prefix: Prefix, identity: int, source: Source) -> None:
        """Say that ``prefix`` is ``identity`` according to ``source``."""
        claims = self._claims.setdefault(prefix, {})
        if claims.get(source) != identity:
            claims[source] = identity
            self._dirty.add(prefix)

    def delete(self, prefix: Prefix, source: Source) -> None:
        """Withdraw what ``source`` said of ``prefix``; other sources' claims stay."""
        claims = self._claims.get(prefix)
        if claims is None or claims.pop(source, None) is None:
            return
        self._dirty.add(prefix)
        if not claims:
            del self._claims[prefix]

    def get(self, prefix: Prefix) -> int | None:
        """The identity that holds for exactly this prefix."""
        claims = self._claims.get(prefix)
        return claims[max(claims)] if claims else None

    def source(self, prefix: Prefix) -> Source | None:
        """The source whose claim holds."""
        claims = self._claims.get(prefix)
        return max(claims) if claims else None

    def table(self) -> dict[Prefix, int]:
        """Every prefix with the identity that holds for it."""
        return {prefix: claims[max(claims)] for prefix, claims in self._claims.items()}

    def prefixes(self, source: Source) -> set[Prefix]:
        """Every prefix of which ``source`` says something."""
        return {prefix for prefix, claims in self._claims.items() if source in claims}

    def take(self) -> tuple[dict[Prefix, int], set[Prefix]]:
        """Changes since the last call: entries to write and prefixes to remove."""
        dirty, self._dirty = self._dirty, set()
        upserts: dict[Prefix, int] = {}
        deletes: set[Prefix] = set()
        for prefix in dirty:
            identity = self.get(prefix)
            if identity is None:
                deletes.add(prefix)
            else:
                upserts[prefix] = identity
        return upserts, deletes

    def put_back(self, prefixes: Iterable[Prefix]) -> None:
        """Mark prefixes as not yet written, after a failed write."""
        self._dirty.update(prefixes)

    def differs(self, kernel: Mapping[Prefix, int]) -> tuple[dict[Prefix, int], set[Prefix]]:
        """What would make ``kernel`` equal to the desired table: upserts and deletes."""
        table = self.table()
        upserts = {prefix: identity for prefix, identity in table.items() if kernel.get(prefix) != identity}
        return upserts, {prefix for prefix in kernel if prefix not in table}
