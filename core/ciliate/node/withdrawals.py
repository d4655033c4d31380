"""Addresses whose pods are gone, until nobody can take their next holder for the last one.

Other nodes know an address's identity from the store. An address rests until the store has heard that its pod is gone,
and then for a grace, in which every node that follows the store hears of it too. A node alone needs no grace; where the
store is the node's own, nothing rests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from ipaddress import IPv4Address, IPv6Address

from ciliate import tasks
from ciliate.backoff import pause
from ciliate.ipam import IpamError
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.kvstore.watcher import GRACE

Address = IPv4Address | IPv6Address
log = logging.getLogger(__name__)
RETRY = 5.0
"""Seconds until addresses that could not be freed are freed again."""


class _Leaving:
    """``until``: monotonic time at which the rest ends; None while the store has not heard."""

    def __init__(self, key: str, earlier: bool) -> None:
        self.key = key
        self.earlier = earlier
        self.until: float | None = None


class Withdrawals:
    """Follows addresses from the withdrawal of their keys to the end of their rest.

    ``grace`` is in seconds. ``others`` says whether other nodes are known, ``shared`` whether others read the store.
    """

    def __init__(
        self,
        keys: LocalKeys,
        prefix: str,
        grace: float,
        others: Callable[[], bool],
        shared: Callable[[], Awaitable[bool]],
    ) -> None:
        self.on_rested: Callable[[Collection[Address]], Awaitable[None]] = _nothing
        self._keys, self._prefix = keys, prefix
        self._grace, self._others, self._shared = grace, others, shared
        self._leaving: dict[Address, _Leaving] = {}
        self._settled = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._keys.on_written = self._wake.set
        self._task = tasks.start(self._run(), "withdrawals")

    async def stop(self) -> None:
        """End; whoever comes next begins anew with what the allocator still holds."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def settled(self) -> None:
        """The store has nothing any more that an earlier run told of pods that are gone."""
        self._settled = True
        self._wake.set()

    def leave(self, addresses: Iterable[Address]) -> None:
        """Nobody has these any more: take back what the store was told of them."""
        for address in addresses:
            key = f"{self._prefix}{address}"
            known, heard = key in self._keys.keys, self._keys.heard(key) or not self._settled
            self._keys.remove(key, aloud=heard)
            if heard:
                self._leaving[address] = _Leaving(key, earlier=not (known or self._settled))
        self._wake.set()

    def take(self, addresses: Iterable[Address]) -> None:
        """Somebody has these again."""
        for address in addresses:
            self._leaving.pop(address, None)

    async def resting(self, addresses: Collection[Address]) -> set[Address]:
        """Those of ``addresses``, which nobody has any more, that nobody may have yet.

        Until an earlier run's words are taken back it is not known of any address who was told of it.
        """
        if not addresses or not await self._shared():
            return set()
        if not self._settled:
            for address in addresses:
                self._leaving.setdefault(address, _Leaving(f"{self._prefix}{address}", earlier=True))
            self._wake.set()
        return {address for address in addresses if address in self._leaving}

    def reason(self, addresses: Collection[Address]) -> str:
        """Why these rest, in words."""
        found = [self._leaving[address] for address in addresses if address in self._leaving]
        unheard = sum(item.until is None for item in found)
        if unheard:
            problem = f" ({self._keys.problem})" if self._keys.problem else ""
            return f"the store has not heard yet that their pods are gone{problem}"
        left = max((item.until - time.monotonic() for item in found if item.until is not None), default=0.0)
        return f"other nodes may not have heard yet that their pods are gone, up to {max(math.ceil(left), 1)} s more"

    async def _run(self) -> None:
        while True:
            now = time.monotonic()
            for item in self._leaving.values():
                if item.until is None and self._heard_of(item):
                    item.until = now + self._rest(item)
            done = [address for address, item in self._leaving.items() if item.until is not None and item.until <= now]
            if done:
                await self._end(done)
                continue
            ends = [item.until for item in self._leaving.values() if item.until is not None]
            await pause(min(ends) - now + 0.001 if ends else GRACE, self._wake)
            self._wake.clear()

    def _heard_of(self, item: _Leaving) -> bool:
        return not self._keys.pending(item.key) and (self._settled or not item.earlier)

    def _rest(self, item: _Leaving) -> float:
        if not self._others():
            return 0.0
        # what went with an earlier run's lease, others hold on to for a while
        return self._grace + (GRACE if item.earlier and self._keys.lost_earlier else 0.0)

    async def _end(self, addresses: Collection[Address]) -> None:
        try:
            await self.on_rested(addresses)
        except (IpamError, OSError) as error:
            log.error("%d addresses that have rested cannot be freed: %s; trying again", len(addresses), error)
            for address in addresses:
                if address in self._leaving:
                    self._leaving[address].until = time.monotonic() + RETRY
            return
        self.take(addresses)


async def _nothing(addresses: Collection[Address]) -> None:
    """Where nobody asked."""
