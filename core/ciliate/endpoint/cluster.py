"""What the endpoint manager tells the rest of the cluster of endpoints, and asks it about its pods."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from ciliate.workload import NamedPorts

Address = IPv4Address | IPv6Address


class Cluster(Protocol):
    """The other nodes. Nothing here waits for them."""

    def publish(self, addresses: Iterable[Address], identity: int, endpoint: int, ports: NamedPorts) -> None:
        """An endpoint has these addresses, this identity and these named ports now."""

    def withdraw(self, addresses: Iterable[Address]) -> None:
        """Nobody here has these addresses any more."""

    def ports(self, identity: int) -> NamedPorts:
        """Named ports of an identity's pods on other nodes."""


class Alone:
    """No other nodes."""

    def publish(self, addresses: Iterable[Address], identity: int, endpoint: int, ports: NamedPorts) -> None:
        """Nobody to tell."""

    def withdraw(self, addresses: Iterable[Address]) -> None:
        """Nobody to tell."""

    def ports(self, identity: int) -> NamedPorts:
        """None."""
        return {}
