"""Addresses rest before they are used again: as long as other nodes may take the next pod for the last one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Protocol

from ciliate.ipam import (
    RESERVED_OWNERS,
    Address,
    Allocation,
    Ipam,
    IpamConflict,
    IpamExhausted,
    Reservation,
    already_durable,
)


class Rest(Protocol):
    """Knows of which addresses others may not have heard yet that nobody has them."""

    async def resting(self, addresses: Collection[Address]) -> set[Address]:
        """Those that nobody may have yet."""

    def reason(self, addresses: Collection[Address]) -> str:
        """Why, in words."""


class RestingIpam:
    """`ciliate.ipam.Ipam` over a provider, which holds resting addresses for the owner that gave them back.

    So they outlast the agent with the provider's own record; the next agent finds that nothing uses them, and releases
    them here once more. The same attachment may have its own addresses again at any time.
    """

    def __init__(self, ipam: Ipam) -> None:
        self.rest: Rest | None = None
        """Set as soon as it is known; nothing rests before."""
        self._ipam = ipam
        self._owed: dict[Address, str] = {}

    def __getattr__(self, name: str) -> Any:
        """What is as the provider has it. ``reserve`` is there where it is the provider's."""
        found = getattr(self._ipam, name)
        return self._reserve_with(found) if name == "reserve" else found

    @property
    def resting(self) -> Mapping[Address, str]:
        """Addresses that rest, with who had them."""
        return self._owed

    def reason(self, addresses: Collection[Address] = ()) -> str:
        """Why these rest, or all that do; nothing where none does."""
        return self.rest.reason(addresses or self._owed) if self.rest is not None and self._owed else ""

    async def allocate(self, owner: str, ipv4: bool = True, ipv6: bool = True) -> Allocation:
        """As the provider does; IpamExhausted says how many addresses rest."""
        again = self._again(owner, ipv4, ipv6)
        if again is not None:
            return again
        try:
            return await self._ipam.allocate(owner, ipv4, ipv6)
        except IpamExhausted as error:
            raise self._exhausted(error) from error

    def _reserve_with(self, reserve: Any) -> Any:
        def reserved(owner: str, ipv4: bool = True, ipv6: bool = True) -> Reservation:
            again = self._again(owner, ipv4, ipv6)
            if again is not None:
                return Reservation(again, already_durable())
            try:
                given: Reservation = reserve(owner, ipv4, ipv6)
            except IpamExhausted as error:
                raise self._exhausted(error) from error
            return given

        return reserved

    def _again(self, owner: str, ipv4: bool, ipv6: bool) -> Allocation | None:
        """The addresses that an attachment gave back and may have again; None where it has none of those."""
        owed = [address for address, name in self._owed.items() if name == owner]
        if not owed:
            return None
        four = next((item for item in owed if isinstance(item, IPv4Address)), None)
        six = next((item for item in owed if isinstance(item, IPv6Address)), None)
        router = self._ipam.router
        wanted = (ipv4 and router.ipv4 is not None, ipv6 and router.ipv6 is not None)
        if wanted != (four is not None, six is not None) or len(owed) != len(self._held(owner)):
            raise IpamConflict(f"owner {owner}: has addresses that rest, and wants others: {self.reason()}")
        for address in owed:
            del self._owed[address]
        return Allocation(four, six, owner)

    def _exhausted(self, error: IpamExhausted) -> IpamExhausted:
        return IpamExhausted(f"{error}; {self.summary()}: {self.reason()}") if self._owed else error

    def summary(self) -> str:
        """How many rest, in words."""
        count = len(set(self._owed.values()))
        return f"addresses of {count} former pod{'s' * (count != 1)} rest"

    async def claim(self, owner: str, addresses: Collection[Address]) -> None:
        """As the provider does; those that ``owner`` has no more rest first."""
        for address in addresses:
            if self._owed.get(address, owner) != owner:
                raise IpamConflict(f"address {address}: rests: {self.reason()}")
        gone = self._held(owner) - set(addresses)
        resting = await self._resting(owner, gone)
        await self._ipam.claim(owner, {*addresses, *resting})
        for address in addresses:
            self._owed.pop(address, None)
        self._owed.update(dict.fromkeys(resting, owner))

    async def release(self, owner: str) -> bool:
        """Take everything back from ``owner``: what rests first, from then on."""
        held = self._held(owner)
        fresh = held - self._owed.keys()
        resting = await self._resting(owner, held)
        if not resting:
            for address in held:
                self._owed.pop(address, None)
            return await self._ipam.release(owner)
        if resting != held:
            await self._ipam.claim(owner, resting)
        self._owed.update(dict.fromkeys(resting, owner))
        return bool(fresh)

    async def _resting(self, owner: str, addresses: set[Address]) -> set[Address]:
        if self.rest is None or owner in RESERVED_OWNERS:
            return set()
        return await self.rest.resting(addresses)

    async def rested(self, addresses: Collection[Address]) -> None:
        """Give these to whoever comes next."""
        ready: dict[str, set[Address]] = defaultdict(set)
        for address in addresses:
            if address in self._owed:
                ready[self._owed[address]].add(address)
        for owner, free in ready.items():
            left = self._held(owner) - free
            await (self._ipam.claim(owner, left) if left else self._ipam.release(owner))
            for address in free:
                self._owed.pop(address, None)

    def _held(self, owner: str) -> set[Address]:
        return {address for address, name in self._ipam.owners().items() if name == owner}
