"""Host-scope allocation: a range per family, owners in a file that is written before an address is handed out.

Addresses are handed out round-robin, so that one that was released rests for as long as possible; ranges are never
enumerated, so an IPv6 /64 costs no more than an IPv4 /24.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any

from ciliate import atomicfile
from ciliate.durable import DurableWriter
from ciliate.ipam import HEALTH, ROUTER, Address, Allocation, IpamConflict, IpamError, IpamExhausted, Reservation

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
        self._holders: dict[str, list[Address]] = {}
        self._leaving: set[Address] = set()
        self._texts: dict[Address, str] = {}
        self._writer = DurableWriter()
        self._saving = asyncio.Lock()
        self._changed = self._saved = 0

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
        for offset, owner in enumerate((ROUTER, HEALTH)):
            for family in self._ranges.values():
                self._owners.setdefault(family.at(family.first + offset), owner)
        for address, owner in list(self._owners.items()):
            self._note(address, owner)
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
            "owners": {
                self._texts[address]: owner for address, owner in self._owners.items() if address not in self._leaving
            },
            "next": {str(version): family.next for version, family in self._ranges.items()},
        }

    async def _save(self) -> None:
        """Return once a file is durable that has everything up to now; many who wait share one write."""
        self._changed += 1
        mine = self._changed
        async with self._saving:
            if self._saved >= mine:
                return
            now, data = self._changed, atomicfile.encode(self._snapshot())
            try:
                await self._writer.write(self._path, data)
            except OSError as error:
                text = f"addresses cannot be written to {self._path}: {error.strerror}"
                raise IpamError(text) from error
            self._saved = now

    def _note(self, address: Address, owner: str) -> None:
        self._owners[address] = owner
        self._texts[address] = str(address)
        held = self._holders.setdefault(owner, [])
        if address not in held:
            held.append(address)

    def _forget(self, owner: str, addresses: Iterable[Address]) -> None:
        held = self._holders.get(owner, [])
        for address in [address for address in addresses if address in held]:
            held.remove(address)
            self._leaving.discard(address)
            del self._owners[address], self._texts[address]
        if not held:
            self._holders.pop(owner, None)

    async def stop(self) -> None:
        """Let go of the writing thread."""
        await asyncio.to_thread(self._writer.close)

    async def allocate(self, owner: str, ipv4: bool = True, ipv6: bool = True) -> Allocation:
        """Addresses for ``owner``, on disk when this returns."""
        reservation = self.reserve(owner, ipv4, ipv6)
        await reservation.durable
        return reservation.allocation

    def reserve(self, owner: str, ipv4: bool = True, ipv6: bool = True) -> Reservation:
        """Addresses for ``owner``, which nobody else gets; they are on disk once ``durable`` is done.

        Where that fails the owner has none any more.
        """
        if not owner:
            raise IpamError("owner: expected a name")
        if owner in self._holders:
            raise IpamConflict(f"owner {owner}: has addresses already")
        wanted = {4: ipv4, 6: ipv6}
        taken = [family.free(self._owners) for version, family in self._ranges.items() if wanted[version]]
        for address in taken:
            self._note(address, owner)
        saving = asyncio.ensure_future(self._change(owner, taken, []))
        return Reservation(_allocation(owner, taken), saving)

    async def claim(self, owner: str, addresses: Collection[Address]) -> None:
        """Note that ``owner`` has exactly these."""
        for address in addresses:
            holder = self._owners.get(address, owner)
            if holder != owner or address in self._leaving:
                raise IpamConflict(f"address {address}: belongs to {holder}, not to {owner}")
        held = self._holders.get(owner, [])
        gone = [address for address in held if address not in addresses]
        await self._change(owner, [address for address in addresses if address not in held], gone)

    async def release(self, owner: str) -> bool:
        """Take everything back from ``owner``."""
        gone = [address for address in self._holders.get(owner, []) if address not in self._leaving]
        if gone:
            await self._change(owner, [], gone)
        return bool(gone)

    async def _change(self, owner: str, added: Sequence[Address], gone: Sequence[Address]) -> None:
        """Give and take addresses: nobody else gets those given from now on, or those taken before that is durable.

        Whatever fails or is cancelled leaves everything as it was.
        """
        for address in added:
            self._note(address, owner)
        self._leaving.update(gone)
        try:
            await self._save()
        except BaseException:
            self._forget(owner, added)
            self._leaving.difference_update(gone)
            raise
        self._forget(owner, gone)

    def owners(self) -> Mapping[Address, str]:
        """Every address in use, with its owner."""
        return dict(self._owners)

    @property
    def router(self) -> Allocation:
        """The node's own addresses."""
        return _allocation(ROUTER, self._holders[ROUTER])

    def capacity(self) -> int:
        """How many owners the smaller range has room for."""
        return min(family.last for family in self._ranges.values())


def _allocation(owner: str, addresses: Collection[Address]) -> Allocation:
    four = next((address for address in addresses if isinstance(address, IPv4Address)), None)
    six = next((address for address in addresses if isinstance(address, IPv6Address)), None)
    return Allocation(four, six, owner)
