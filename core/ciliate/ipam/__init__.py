"""Address allocation: what core needs of a provider of kind `ipam`."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, Protocol

import msgspec

Address = IPv4Address | IPv6Address
ROUTER = "router"
HEALTH = "health"
NODE = "node"
"""Owner of addresses in the ranges that the node has on devices of its own: no pod may get them."""
RESERVED_OWNERS = frozenset({ROUTER, HEALTH, NODE})


def attachment_owner(pod: str, container_id: str, ifname: str) -> str:
    """Who an address belongs to: the pod (``namespace/name`` or nothing) for people, the attachment to be unique."""
    return f"{pod or '-'} {container_id}:{ifname}"


class IpamError(Exception):
    """Addresses cannot be given or taken; the text says which, and why."""


class IpamExhausted(IpamError):
    """Every address of a range is in use."""


class IpamConflict(IpamError):
    """The address or the owner is taken."""


class Allocation(msgspec.Struct, frozen=True):
    """Addresses of one owner; a family that is off has None."""

    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    owner: str

    @property
    def addresses(self) -> list[Address]:
        """Those that there are."""
        return [address for address in (self.ipv4, self.ipv6) if address is not None]


class Reservation(NamedTuple):
    """Addresses that nobody else gets from now on; once ``durable`` is done that outlasts the machine."""

    allocation: Allocation
    durable: Awaitable[None]


async def already_durable() -> None:
    """What is durable already."""


async def reserve(ipam: Ipam, owner: str, ipv4: bool = True, ipv6: bool = True) -> Reservation:
    """Addresses at once where the provider has ``reserve``, else by ``allocate``.

    Whoever takes a reservation awaits ``durable`` before telling anybody of the addresses, and gives them back by
    ``release`` where that fails.
    """
    early = getattr(ipam, "reserve", None)
    if early is None:
        return Reservation(await ipam.allocate(owner, ipv4, ipv6), already_durable())
    reservation: Reservation = early(owner, ipv4, ipv6)
    return reservation


class Ipam(Protocol):
    """Hands out addresses; none twice, whatever happens in between.

    A provider may also have ``reserve(owner, ipv4, ipv6) -> Reservation``, which returns before the disk has it.
    """

    async def start(self) -> None:
        """Read what was handed out before."""

    async def stop(self) -> None:
        """Let go; what was handed out stays handed out."""

    async def allocate(self, owner: str, ipv4: bool = True, ipv6: bool = True) -> Allocation:
        """Addresses for ``owner`` of each family that is wanted and on, durable when this returns.

        IpamExhausted where a range is full, IpamConflict where the owner has addresses already.
        """

    async def claim(self, owner: str, addresses: Collection[Address]) -> None:
        """Note that ``owner`` has exactly these. IpamConflict where somebody else has one."""

    async def release(self, owner: str) -> bool:
        """Take everything back from ``owner``; False where it has nothing."""

    def owners(self) -> Mapping[Address, str]:
        """Every address in use, with its owner."""

    @property
    def router(self) -> Allocation:
        """The node's own addresses in the ranges."""

    def capacity(self) -> int:
        """How many owners there is room for in all: the smallest of the ranges that are on."""
