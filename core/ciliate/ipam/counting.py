"""Counts the addresses that a provider gives and takes back (inventory 4.4, ``ipam_events_total``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ciliate.ipam import Address, Allocation, Ipam, Reservation
from ciliate.measure import IPAM_EVENTS


class CountingIpam:
    """`ciliate.ipam.Ipam` that counts and leaves everything else to the provider behind it."""

    def __init__(self, ipam: Ipam) -> None:
        self._ipam = ipam

    def __getattr__(self, name: str) -> Any:
        """What is not counted. ``reserve`` is there where the provider has it."""
        found = getattr(self._ipam, name)
        return self._counting_reserve(found) if name == "reserve" else found

    async def allocate(self, owner: str, ipv4: bool = True, ipv6: bool = True) -> Allocation:
        """As the provider does."""
        given = await self._ipam.allocate(owner, ipv4, ipv6)
        _count("allocate", given.addresses)
        return given

    def _counting_reserve(self, reserve: Any) -> Any:
        def counted(owner: str, ipv4: bool = True, ipv6: bool = True) -> Reservation:
            given: Reservation = reserve(owner, ipv4, ipv6)
            _count("allocate", given.allocation.addresses)
            return given

        return counted

    async def claim(self, owner: str, addresses: Collection[Address]) -> None:
        """As the provider does."""
        held = self._held(owner)
        await self._ipam.claim(owner, addresses)
        _count("allocate", set(addresses) - held)
        _count("release", held - set(addresses))

    async def release(self, owner: str) -> bool:
        """As the provider does."""
        held = self._held(owner)
        released = await self._ipam.release(owner)
        if released:
            _count("release", held)
        return released

    def _held(self, owner: str) -> set[Address]:
        return {address for address, name in self._ipam.owners().items() if name == owner}


def _count(action: str, addresses: Iterable[Address]) -> None:
    for address in addresses:
        IPAM_EVENTS.add(action, f"ipv{address.version}")
