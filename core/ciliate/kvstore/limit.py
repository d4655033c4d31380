"""A token bucket: so many operations a second, with a burst. Every client of a shared store has one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ciliate.backoff import pause


class RateLimit:
    """``rate`` operations a second on average, ``burst`` at once after a rest; a rate of 0 is no limit."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.waited = 0.0
        """Seconds that callers have waited in all."""
        self._rate = rate
        self._burst = max(burst, 1)
        self._clock = clock
        self._tokens = float(self._burst)
        self._filled = clock()
        self._turn = asyncio.Lock()

    async def take(self) -> None:
        """Return when the next operation may go, in the order of asking."""
        if not self._rate:
            return
        async with self._turn:
            self._fill()
            if self._tokens < 1:
                wait = (1 - self._tokens) / self._rate
                self.waited += wait
                await pause(wait)
                self._fill()
            self._tokens -= 1

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
