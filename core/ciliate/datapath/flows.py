"""Tracked flows: what there is, what is over, and what endpoints that are gone leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from pyroaring import BitMap

from ciliate.datapath import conntrack, layout
from ciliate.datapath.bpf import Map
from ciliate.datapath.conntrack import Sweep
from ciliate.datapath.layout import ConntrackEntry
from ciliate.datapath.pins import PinDirectory


class Flows:
    """The conntrack maps. ``sweep`` runs a function in the thread for what takes long."""

    def __init__(self, sweep: Callable[..., Awaitable[Any]]) -> None:
        self._sweep = sweep
        self._maps: list[Map] = []
        self._purge = BitMap()  # as a set, all ids but a few would take megabytes
        self._purging = asyncio.Lock()

    def open(self, pins: PinDirectory) -> None:
        """Open the maps, which are there. May raise OSError."""
        self._maps = [Map.open(pins.of(name)) for name in conntrack.MAPS]

    def close(self) -> None:
        """Close the maps; the flows stay."""
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
        done: Sweep = await self._sweep(conntrack.collect, self._maps)
        return done

    async def flush(self, select: Callable[[ConntrackEntry], bool] = lambda entry: True) -> Sweep:
        """Remove the flows that ``select`` picks."""
        done: Sweep = await self._sweep(conntrack.flush, self._maps, select)
        return done

    async def forget(self, endpoint: int) -> None:
        """Remove the flows of an endpoint that is gone."""
        self._purge.add(endpoint)
        await self._purge_gone()

    def forget_later(self, known: Collection[int]) -> None:
        """Flows of every id that is not ``known`` go with the next collection, or before the id is used again."""
        self._purge |= BitMap(range(1, layout.MAX_ENDPOINTS + 1)) - BitMap(known)

    async def before_use(self, endpoint: int) -> None:
        """No flow of an earlier endpoint with this id is left."""
        if endpoint in self._purge:
            await self._purge_gone()

    async def _purge_gone(self) -> None:
        # one after the other: a sweep that began late must not take the flows of an id that is in use again
        async with self._purging:
            gone = BitMap(self._purge)
            if not gone:
                return
            await self._sweep(conntrack.purge_endpoints, self._maps, gone)
            self._purge -= gone
