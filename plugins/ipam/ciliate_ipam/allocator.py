"""Host-scope allocation: a range per family, owners in a file that is written before an address is handed out.

Addresses are handed out round-robin, so that one that was released rests for as long as possible; ranges are never
enumerated, so an IPv6 /64 costs no more than an IPv4 /24.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any

from ciliate import atomicfile
from ciliate.ipam import HEALTH, ROUTER, Address, Allocation, IpamConflict, IpamError, IpamExhausted

log = logging.getLogger(__name__)
Network = IPv4Network | IPv6Network


class _Range:
    """One family's range. The first usable address is the router's, the second that of health checks."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.first = 1
        # the last IPv4 address is the broadcast address
        self.last = network.num_addresses - (2 if network.version == 4 else 1)
        self.next = self.first
        if self.last - self.first < 2:
            raise IpamError(f"range {network}: expected room for a router and at least one pod")

    def at(self, offset: int) -> Address:
        return self.network[offset]

    def free(self, used: Mapping[Address, str]) -> Address:
        """The next free address after the one handed out last."""
        for _ in range(len(used) + 1):
            candidate = self.at(self.next)
            self.next = self.next + 1 if self.next < self.last else self.first
            if candidate not in used:
                return candidate
            if self._full(used):
                break
        raise IpamExhausted(f"range {self.network}: all {self.last} addresses are in use")

    def _full(self, used: Mapping[Address, str]) -> bool:
        return len(used) >= self.last and sum(address in self.network for address in used) >= self.last


class HostScope:
    """`ciliate.ipam.Ipam` over the node's ranges."""

    def __init__(self, ranges: Sequence[Network], path: Path) -> None:
        self._ranges = {network.version: _Range(network) for network in ranges}
        if not self._ranges:
            raise IpamError("ipv4-range, ipv6-range: both families are off, expected at least one")
        self._path = path
        self._owners: dict[Address, str] = {}
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Read the file. A damaged one is set aside: the agent claims what its endpoints have before anybody asks.

        IpamError where the file is of another version or cannot be read.
        """
        before = None
        try:
            before = await asyncio.to_thread(atomicfile.read_json, self._path)
            self._load(before if isinstance(before, dict) else {})
        except atomicfile.SchemaError as error:
            raise IpamError(str(error)) from error
        except OSError as error:
            raise IpamError(f"addresses in {self._path}: {error.strerror}") from error
        except ValueError as error:
            self._owners.clear()
            aside = self._path.with_suffix(".broken")
            log.error("addresses in %s are damaged, moved to %s, and begin anew: %s", self._path, aside, error)
            await asyncio.to_thread(self._path.replace, aside)
        async with self._lock:
            for offset, owner in enumerate((ROUTER, HEALTH)):
                for family in self._ranges.values():
                    self._owners.setdefault(family.at(family.first + offset), owner)
            if self._snapshot() != before:
                await self._save()

    def _load(self, data: Mapping[str, Any]) -> None:
        for text, owner in dict(data.get("owners", {})).items():
            address = ip_address(text)
            family = self._ranges.get(address.version)
            # of a range that was changed the old addresses are nobody's; pods that have one are restored by claim
            if family is not None and address in family.network:
                self._owners[address] = str(owner)
        for version, position in dict(data.get("next", {})).items():
            family = self._ranges.get(4 if int(version) == 4 else 6)
            if family is not None and family.first <= int(position) <= family.last:
                family.next = int(position)

    def _snapshot(self) -> dict[str, Any]:
        return {
            "owners": {str(address): owner for address, owner in self._owners.items()},
            "next": {str(version): family.next for version, family in self._ranges.items()},
        }

    async def _save(self) -> None:
        try:
            await asyncio.to_thread(atomicfile.write_json, self._path, self._snapshot())
        except OSError as error:
            text = f"addresses cannot be written to {self._path}: {error.strerror}"
            raise IpamError(text) from error

    async def stop(self) -> None:
        """Nothing is held open."""

    async def allocate(self, owner: str, ipv4: bool = True, ipv6: bool = True) -> Allocation:
        """Addresses for ``owner``, on disk when this returns."""
        if not owner:
            raise IpamError("owner: expected a name")
        async with self._lock:
            if owner in self._owners.values():
                raise IpamConflict(f"owner {owner}: has addresses already")
            taken: dict[int, Address] = {}
            for version, wanted in ((4, ipv4), (6, ipv6)):
                if wanted and version in self._ranges:
                    taken[version] = self._ranges[version].free(self._owners)
            await self._commit({**self._owners, **dict.fromkeys(taken.values(), owner)})
        return _allocation(owner, taken.values())

    async def claim(self, owner: str, addresses: Collection[Address]) -> None:
        """Note that ``owner`` has exactly these."""
        async with self._lock:
            for address in addresses:
                holder = self._owners.get(address, owner)
                if holder != owner:
                    raise IpamConflict(f"address {address}: belongs to {holder}, not to {owner}")
            others = {address: name for address, name in self._owners.items() if name != owner}
            await self._commit({**others, **dict.fromkeys(addresses, owner)})

    async def release(self, owner: str) -> bool:
        """Take everything back from ``owner``."""
        async with self._lock:
            kept = {address: name for address, name in self._owners.items() if name != owner}
            if len(kept) == len(self._owners):
                return False
            await self._commit(kept)
            return True

    async def _commit(self, owners: dict[Address, str]) -> None:
        before, self._owners = self._owners, owners
        try:
            await self._save()
        except BaseException:
            self._owners = before
            raise

    def owners(self) -> Mapping[Address, str]:
        """Every address in use, with its owner."""
        return dict(self._owners)

    @property
    def router(self) -> Allocation:
        """The node's own addresses."""
        return _allocation(ROUTER, [address for address, owner in self._owners.items() if owner == ROUTER])

    def capacity(self) -> int:
        """How many owners the smaller range has room for."""
        return min(family.last for family in self._ranges.values())


def _allocation(owner: str, addresses: Collection[Address]) -> Allocation:
    four = next((address for address in addresses if isinstance(address, IPv4Address)), None)
    six = next((address for address in addresses if isinstance(address, IPv6Address)), None)
    return Allocation(four, six, owner)
