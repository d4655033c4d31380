"""Tracked flows: what there is, what is over, and what endpoints that are gone leave behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, NamedTuple

from pyroaring import BitMap

from ciliate.datapath import conntrack, kernelct, layout
from ciliate.datapath.bpf import Map
from ciliate.datapath.conntrack import Sweep
from ciliate.datapath.layout import Address, ConntrackEntry
from ciliate.datapath.pins import PinDirectory

OTHERS = ("ciliate_frag", "ciliate_snat", "ciliate_lb_flow", "ciliate_lb_client", "ciliate_lb_affinity")
"""What else is known of flows by address, where it is there: fragments, mappings, choices of services."""
OTHERS_IN_VALUE = frozenset({"ciliate_snat", "ciliate_lb_client"})
"""Their values begin with an address, which answers are turned to."""
PAUSE, SHARE = 0.2, 10.0
"""Seconds between two purges because of news from other nodes, at least, and as a multiple of what one takes."""

MANY = 1000
"""Ids that are gone together: those that an earlier run left, whose shares the next collection counts."""
BUSY, OFTEN, RARELY = 0.5, 5.0, 20.0
"""Part of a table from where on dead flows are collected at once; seconds between two such collections, at least, and
as a multiple of what one takes."""


class FlowUsage(NamedTuple):
    """What an endpoint has of one table.

    ``share`` is a part of what is its own while the table is nearly full; ``replaced``: how many of its new flows took
    the place of an earlier one so far.
    """

    endpoint: int
    table: str
    entries: int
    share: float
    replaced: int


class Flows:
    """The conntrack maps. ``sweep`` runs a function in the thread for what takes long."""

    def __init__(self, sweep: Callable[..., Awaitable[Any]]) -> None:
        self._sweep = sweep
        self._maps: list[Map] = []
        self._purge = BitMap()  # as a set, all ids but a few would take megabytes
        self._purging = asyncio.Lock()
        self._names: set[Address] = set()
        self._kernel: set[Address] = set()
        self._full = self._collected = self._took = 0.0
        self.pause = PAUSE
        """Seconds to wait after a purge, so that they take little of the time however much news there is."""

    def open(self, pins: PinDirectory) -> None:
        """Open the maps, which are there. May raise OSError."""
        self._pins = pins
        self._maps = [Map.open(pins.of(name)) for name in conntrack.MAPS]
        self._shares = Map.open(pins.of(conntrack.SHARES))

    def close(self) -> None:
        """Close the maps; the flows stay."""
        if self._maps:
            self._shares.close()
        while self._maps:
            self._maps.pop().close()

    async def entries(self) -> list[ConntrackEntry]:
        """Every tracked flow."""
        found: list[ConntrackEntry] = await self._sweep(lambda: list(conntrack.entries(self._maps)))
        return found

    def interval(self, sweep: Sweep) -> float:
        """Seconds until the next collection, by how full the maps were found."""
        return conntrack.next_interval(sweep, sum(table.max_entries for table in self._maps))

    async def collect(self) -> Sweep:
        """Remove dead flows, and those of endpoints that are gone."""
        await self._purge_gone()
        done: Sweep = await self._sweep(conntrack.collect, self._maps, None, self._shares)
        self._collected, self._took = time.monotonic(), done.seconds
        return done

    async def full(self) -> dict[str, float]:
        """How full each table is, 0 to 1, by `conntrack.TABLES`; dead flows count until they are collected."""
        share = await self._sweep(conntrack.share_of, self._shares, 0)
        parts = [used / table.max_entries for used, table in zip(share.used, self._maps, strict=True)]
        self._full = max(parts)
        return dict(zip(conntrack.TABLES, parts, strict=True))

    async def usage(self, endpoints: Iterable[int]) -> list[FlowUsage]:
        """What each of these endpoints has of each table, where it has anything."""
        shares = await self._sweep(lambda: [(number, conntrack.share_of(self._shares, number)) for number in endpoints])
        return [
            FlowUsage(number, name, used, used * conntrack.PART / table.max_entries, replaced)
            for number, share in shares
            for name, table, used, replaced in zip(conntrack.TABLES, self._maps, *share, strict=True)
            if used or replaced
        ]

    def wants_collection(self) -> bool:
        """Whether a table, as last seen by ``full``, is so full that dead flows should go now."""
        return self._full > BUSY and time.monotonic() - self._collected > max(OFTEN, RARELY * self._took)

    async def flush(self, select: Callable[[ConntrackEntry], bool] = lambda entry: True) -> Sweep:
        """Remove the flows that ``select`` picks."""
        done: Sweep = await self._sweep(conntrack.flush, self._maps, select)
        return done

    async def forget(self, endpoint: int, addresses: Iterable[Address] = ()) -> None:
        """Remove the flows of an endpoint that is gone, and all that names its addresses."""
        self._purge.add(endpoint)
        self.mark(addresses)
        await self._purge_gone()

    def mark(self, addresses: Iterable[Address]) -> None:
        """Nobody has these addresses any more: all that names them goes with the next ``purge``."""
        names = set(addresses)
        self._names |= names
        self._kernel |= names

    async def purge(self) -> None:
        """Remove what names addresses that are gone, in the kernel's own conntrack too.

        May raise OSError; what could not be removed is by the next call.
        """
        await self._purge_gone()
        gone = frozenset(self._kernel)
        if gone:
            await self._sweep(kernelct.forget_addresses, gone)
            self._kernel -= gone

    def forget_later(self, known: Collection[int]) -> None:
        """Flows of every id that is not ``known`` go with the next collection, or before the id is used again."""
        self._purge |= BitMap(range(1, layout.MAX_ENDPOINTS + 1)) - BitMap(known)

    async def before_use(self, endpoint: int, addresses: Iterable[Address] = ()) -> None:
        """No flow of an earlier endpoint with this id is left, nor of an earlier holder of one of these addresses."""
        if endpoint in self._purge or not self._names.isdisjoint(addresses):
            await self._purge_gone()

    async def _purge_gone(self) -> None:
        # one after the other: a sweep that began late must not take the flows of an id that is in use again
        async with self._purging:
            gone, names = BitMap(self._purge), frozenset(self._names)
            if not gone and not names:
                return
            began = time.monotonic()
            await self._sweep(conntrack.purge, self._maps, gone, names)
            if names:
                await self._sweep(self._purge_others, names)
            for number in gone if len(gone) < MANY else ():
                await self._sweep(conntrack.forget_share, self._shares, number)
            self._purge -= gone
            self._names -= names
            self.pause = max(PAUSE, SHARE * (time.monotonic() - began))

    def _purge_others(self, names: Collection[Address]) -> None:
        for name in OTHERS:
            path = self._pins.of(name)
            if not path.exists():
                continue
            table = Map.open(path)
            try:
                conntrack.purge_table(table, names, in_value=name in OTHERS_IN_VALUE)
            finally:
                table.close()
