"""Places (`ciliate.policy.places`) from the repository into the kernel's map `ciliate_place`.

Policy entries of a place are in the kernel before an address can be found to be there, and go after it: until then
addresses there are found to be at the place around it, of which the older policies speak.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import TypeVar

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
        self._written: dict[Prefix, int] = {}

    async def add(self) -> None:
        """Let policies speak of new places; their prefixes have local identities already."""
        added = list(self._repository.wanted_places() - self._numbers.keys())
        for some in parts(added):
            found = {prefix: self._local.number(prefix) for prefix in some}
            self._numbers.update(found)
            self._repository.add_places({number: prefix for prefix, number in found.items()})
            await asyncio.sleep(0)

    async def write(self, held: Collection[Prefix]) -> list[int]:
        """Write what policies speak of by now, leave out what none does but those ``held``; returns these places.

        What could not be written is written by the next call; raises OSError then.
        """
        gone = self._numbers.keys() - self._repository.wanted_places() - set(held)
        wanted = {prefix: number for prefix, number in self._numbers.items() if prefix not in gone}
        if wanted != self._written:
            upserts = {prefix: number for prefix, number in wanted.items() if self._written.get(prefix) != number}
            deletes = self._written.keys() - wanted.keys()
            await self._datapath.change_places(_table(upserts), {layout.ipcache_key(prefix) for prefix in deletes})
            self._written = dict(wanted)
        numbers = [self._numbers[prefix] for prefix in gone]
        self._numbers = wanted
        for some in parts(numbers):
            self._repository.remove_places(some)
            await asyncio.sleep(0)
        return numbers

    async def resync(self) -> None:
        """Compare with the kernel, and mend what differs."""
        wanted = dict(self._numbers)
        upserts, deletes = await self._datapath.compare_places(_table(wanted))
        if upserts or deletes:
            await self._datapath.change_places(upserts, deletes)
        self._written = wanted


T = TypeVar("T")
PART = 64
"""Prefixes that are done before others get their turn."""


def parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Long lists in parts, between which others get their turn."""
    for start in range(0, len(items), PART):
        yield items[start : start + PART]


def _table(places: dict[Prefix, int]) -> dict[bytes, bytes]:
    return {layout.ipcache_key(prefix): layout.place_entry(number) for prefix, number in places.items()}
