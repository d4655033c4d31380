"""Places (`ciliate.policy.places`) from the repository into the kernel's map `ciliate_place`.

Policy entries of a place are in the kernel before an address can be found to be there, and go after it: until then
addresses there are found to be at the place around it, of which the older policies speak.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Network, IPv6Network

from ciliate.datapath import Datapath, layout
from ciliate.identity.local import LocalIdentities
from ciliate.policy.repository import Repository

Prefix = IPv4Network | IPv6Network


class KernelPlaces:
    """Keeps repository and kernel equal to the prefixes that ipBlocks name. Calls are serialised by the caller."""

    def __init__(self, datapath: Datapath, repository: Repository, local: LocalIdentities) -> None:
        self._datapath = datapath
        self._repository = repository
        self._local = local
        self._numbers: dict[Prefix, int] = {}
        self._written: dict[bytes, bytes] = {}

    def add(self) -> None:
        """Let policies speak of new places; their prefixes have local identities already."""
        added = self._repository.pod_cidrs() - self._numbers.keys()
        if added:
            found = {prefix: self._local.number(prefix) for prefix in added}
            self._numbers.update(found)
            self._repository.add_places({number: prefix for prefix, number in found.items()})

    async def write(self, held: Collection[Prefix]) -> list[int]:
        """Write what policies speak of by now, leave out what none does but those ``held``; returns these places.

        What could not be written is written by the next call; raises OSError then.
        """
        gone = self._numbers.keys() - self._repository.pod_cidrs() - set(held)
        wanted = {prefix: number for prefix, number in self._numbers.items() if prefix not in gone}
        if wanted or self._written:
            table = _table(wanted)
            upserts = {key: value for key, value in table.items() if self._written.get(key) != value}
            deletes = self._written.keys() - table.keys()
            if upserts or deletes:
                await self._datapath.change_places(upserts, deletes)
            self._written = table
        numbers = [self._numbers[prefix] for prefix in gone]
        self._numbers = wanted
        self._repository.remove_places(numbers)
        return numbers

    async def resync(self) -> None:
        """Compare with the kernel, and mend what differs."""
        wanted = _table(self._numbers)
        upserts, deletes = await self._datapath.compare_places(wanted)
        if upserts or deletes:
            await self._datapath.change_places(upserts, deletes)
        self._written = wanted


def _table(places: dict[Prefix, int]) -> dict[bytes, bytes]:
    return {layout.ipcache_key(prefix): layout.place_entry(number) for prefix, number in places.items()}
