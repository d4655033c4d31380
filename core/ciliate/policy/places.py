"""Places: where the address of a pod or node lies, among the prefixes that Kubernetes ipBlocks name.

Pods with the same labels share an identity, and an ipBlock may mean some of them and not others. So a policy may speak
of an address beside the identity: its place is the narrowest prefix around it that some ipBlock names, exceptions
included. A block means a place where the prefix lies in the block and in none of its exceptions; it never lies half in
it. Places have the numbers of the prefixes' local identities, and 0 is no place. What is not a pod or node has the
identity of its prefix already, and no place.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ciliate.policy.model import CidrPeer, Network

NOWHERE = 0


def inside(inner: Network, outer: Network) -> bool:
    """True where ``inner`` lies in ``outer``."""
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def covers(peer: CidrPeer, prefix: Network | None) -> bool:
    """Whether a block means addresses of this prefix, or (None) an address that is not known.

    An address that is not known is meant by a whole family without exceptions, for a pod has some address.
    """
    if prefix is None:
        return peer.cidr.prefixlen == 0 and not peer.exclude
    return inside(prefix, peer.cidr) and not any(inside(prefix, hole) for hole in peer.exclude)


class Places:
    """Numbers of prefixes, found by address and by prefix."""

    def __init__(self) -> None:
        self._prefixes: dict[int, Network | None] = {}
        self._tables: dict[tuple[int, int], dict[int, int]] = {}
        self._lengths: dict[int, list[int]] = {4: [], 6: []}
        self._rows: dict[int, list[tuple[int, int, int]]] = {4: [], 6: []}
        """(address, length, number), sorted: places within a prefix are one slice."""
        self._unknown: set[int] = set()

    def __len__(self) -> int:
        return len(self._prefixes)

    def __contains__(self, number: int) -> bool:
        return number in self._prefixes

    def prefix(self, number: int) -> Network | None:
        """The prefix of a place; None where the number is none, or of the place of addresses that are not known."""
        return self._prefixes.get(number)

    def add(self, number: int, prefix: Network | None) -> None:
        """Know a place; ``prefix`` None: of addresses that are not known."""
        self._prefixes[number] = prefix
        if prefix is None:
            self._unknown.add(number)
        else:
            name = prefix.version, prefix.prefixlen
            table = self._tables.get(name)
            if table is None:
                table = self._tables[name] = {}
                self._sort(prefix.version)
            table[int(prefix.network_address)] = number
            insort(self._rows[prefix.version], (int(prefix.network_address), prefix.prefixlen, number))

    def remove(self, number: int) -> None:
        """Forget a place."""
        self._unknown.discard(number)
        prefix = self._prefixes.pop(number, None)
        if prefix is not None:
            name = prefix.version, prefix.prefixlen
            rows, row = self._rows[prefix.version], (int(prefix.network_address), prefix.prefixlen, number)
            index = bisect_left(rows, row)
            if index < len(rows) and rows[index] == row:
                del rows[index]
            self._tables[name].pop(int(prefix.network_address), None)
            if not self._tables[name]:
                del self._tables[name]
                self._sort(prefix.version)

    def _sort(self, version: int) -> None:
        self._lengths[version] = sorted((length for one, length in self._tables if one == version), reverse=True)

    def of(self, address: IPv4Address | IPv6Address) -> int:
        """The place of an address, by its longest prefix."""
        number, size = int(address), address.max_prefixlen
        for length in self._lengths[address.version]:
            found = self._tables[address.version, length].get(number >> (size - length) << (size - length))
            if found is not None:
                return found
        return NOWHERE

    def meant(self, peer: CidrPeer) -> Iterator[int]:
        """Every place that a block means."""
        rows = self._rows[peer.cidr.version]
        last = int(peer.cidr.broadcast_address)
        for index in range(bisect_left(rows, (int(peer.cidr.network_address), 0, 0)), len(rows)):
            if rows[index][0] > last:
                break
            number = rows[index][2]
            if covers(peer, self._prefixes[number]):
                yield number
        if covers(peer, None):
            yield from self._unknown
