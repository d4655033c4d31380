"""The sizes of packets: what the node's links carry, and what that leaves for pods (inventory DP-E07).

Pods' devices get the route MTU: whatever a pod sends may have to fit into a tunnel. (The seed gives them the device MTU
and limits their default route instead, so that their programs see two numbers.)
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

DEFAULT = 1500
SMALLEST = 1280
"""What IPv6 asks of every link (RFC 8200 section 5)."""
LARGEST = 65520


class Mtu(msgspec.Struct, frozen=True):
    """Bytes of an IP packet: on the node's links (``device``), and from and to pods (``route``)."""

    device: int = DEFAULT
    route: int = DEFAULT


def fit(option: int, links: Iterable[int], overhead: int = 0) -> Mtu:
    """The sizes by option ``mtu`` (0: by the links), the MTUs of the links out of the node, and what tunnels add."""
    device = min((size for size in links if size), default=DEFAULT)
    route = option or min(max(device - overhead, SMALLEST), LARGEST)
    return Mtu(device, route)


class NodeMtu:
    """The sizes as they are now: a service. Pods keep what they were given; new ones get the latest."""

    def __init__(self, current: Mtu | None = None) -> None:
        self.current = current or Mtu()
