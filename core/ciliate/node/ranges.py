"""What a node may say of itself, and whose pod ranges are whose: who can write into the store can write anything."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec

from ciliate.node.model import Node

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def homes(node: Node) -> list[Address]:
    """Where a node is reached by the others."""
    return [address for address in (node.ipv4, node.ipv6) if address is not None]


def pod_ranges(node: Node) -> list[Network]:
    """The ranges of a node's pods."""
    return [prefix for prefix in (node.pods4, node.pods6) if prefix is not None]


def unusable(address: Address) -> bool:
    """Whether no other host can be reached by this address."""
    return address.is_loopback or address.is_multicast or address.is_unspecified


def checked(node: Node, own: Node) -> Node:
    """A node without addresses that are not of its ranges. ValueError where it says what cannot be, or takes ours."""
    for address in homes(node):
        if unusable(address):
            raise ValueError(f"InternalIP: {address} given, expected the address of a node")
        if address in homes(own):
            raise ValueError(f"InternalIP: {address} given, which is this node's")
        if any(address in prefix for prefix in pod_ranges(own)):
            raise ValueError(f"InternalIP: {address} given, which is in the pod range of this node")
    for prefix in pod_ranges(node):
        _check_range(prefix, own)
    inner = ((name, getattr(node, name)) for name in ("router4", "router6", "health4", "health6"))
    ranges = pod_ranges(node)
    outside = {name: None for name, found in inner if found and not any(found in prefix for prefix in ranges)}
    return msgspec.structs.replace(node, **outside) if outside else node


def _check_range(prefix: Network, own: Node) -> None:
    address = prefix.network_address
    if not prefix.prefixlen or unusable(address) or address.is_link_local:
        raise ValueError(f"AllocCIDR: {prefix} given, expected a range that pods can have")
    if any(prefix.overlaps(other) for other in pod_ranges(own)):
        raise ValueError(f"AllocCIDR: {prefix} given, which overlaps the range of this node")
    if any(home in prefix for home in homes(own)):
        raise ValueError(f"AllocCIDR: {prefix} given, in which this node's own address is")


class Ranges:
    """Pod ranges by who has them. One that overlaps a living node's is disputed: it stays with who had it first.

    A node that is gone and still kept loses it to who comes, and so does one to another node at the same address.
    """

    def __init__(self) -> None:
        self.disputes: dict[str, str] = {}
        """Nodes without a range that they claim, by `Node.id`, and why."""
        self._rows: dict[int, list[tuple[int, int, str]]] = {4: [], 6: []}
        self._claims: dict[str, Node] = {}

    def settle(self, node: Node, gone: Callable[[str], bool]) -> Node:
        """A node as it counts: without ranges that are another's. ``gone`` tells who is only kept."""
        self.drop(node.id)
        self._claims[node.id] = node
        changes: dict[str, None] = {}
        for name, prefix in (("pods4", node.pods4), ("pods6", node.pods6)):
            if prefix is None:
                continue
            holder = next((item for item in self.holders(prefix) if not self._yields(item, node, gone)), None)
            if holder is None:
                insort(self._rows[prefix.version], _row(prefix, node.id))
            else:
                changes[name] = None
                self.disputes[node.id] = f"its pod range {prefix} overlaps that of {holder}"
        return msgspec.structs.replace(node, **changes) if changes else node

    def _yields(self, holder: str, node: Node, gone: Callable[[str], bool]) -> bool:
        other = self._claims.get(holder)
        return other is None or gone(holder) or homes(other) == homes(node)

    def drop(self, number: str) -> None:
        """Forget a node."""
        node = self._claims.pop(number, None)
        self.disputes.pop(number, None)
        for prefix in pod_ranges(node) if node is not None else ():
            rows = self._rows[prefix.version]
            row = _row(prefix, number)
            if row in rows[(index := max(bisect_right(rows, row) - 1, 0)) : index + 1]:
                del rows[index]

    def holders(self, prefix: Network) -> Iterator[str]:
        """Nodes that have a range which overlaps this one, or an address of it."""
        low, high = int(prefix.network_address), int(prefix.broadcast_address)
        rows = self._rows[prefix.version]
        index = bisect_right(rows, (high, high + 1, ""))
        # ranges of living nodes do not overlap each other, so few are looked at
        while index and rows[index - 1][1] >= low:
            index -= 1
            yield rows[index][2]

    def disputed(self) -> Iterable[Node]:
        """Nodes that may get what they claim now, as they said it."""
        return [self._claims[number] for number in list(self.disputes)]


def _row(prefix: Network, number: str) -> tuple[int, int, str]:
    return int(prefix.network_address), int(prefix.broadcast_address), number
