"""Hears at once of keys of this node that somebody else deletes, where nobody here follows their prefix.

There are as many keys ``…/value/LABELS/NODE`` as nodes use label sets: to follow them all for the sake of one's own
would cost every node what all others do. So the store is asked for these keys alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from ciliate import tasks
from ciliate.backoff import Backoff, ClusterSize
from ciliate.kvstore import Event, Kvstore, KvstoreError, WatchedKeys

log = logging.getLogger(__name__)
RETRY_MIN = 0.05
RETRY_MAX = 5.0
SPREAD_MIN = 0.005
SPREAD_FACTOR = 20.0
SPREAD_MAX = 1.0
CALM = 30.0
"""Seconds without a loss after which the next one is the first again."""


class Restoring:
    """The wait before keys are written again: 5 to 100 ms times ln(1 + nodes), up to a second where it goes on.

    Many nodes see the same loss, and somebody may delete as fast as we write.
    """

    def __init__(self, cluster: ClusterSize | None = None) -> None:
        self._backoff = Backoff(SPREAD_MIN, factor=SPREAD_FACTOR, maximum=SPREAD_MAX, cluster=cluster)
        self._last = -CALM

    async def wait(self) -> None:
        """Wait before the next round."""
        if time.monotonic() - self._last >= CALM:
            self._backoff.reset()
        await self._backoff.wait()
        self._last = time.monotonic()


class KeyGuard:
    """Tells ``on_gone`` of deletions, and ``on_gap`` once it may have missed some."""

    def __init__(
        self,
        store: Kvstore,
        prefix: str,
        on_gone: Callable[[Sequence[Event]], None],
        on_gap: Callable[[], None],
        cluster: ClusterSize | None = None,
    ) -> None:
        self.keys = WatchedKeys(prefix)
        self._store = store
        self._on_gone = on_gone
        self._on_gap = on_gap
        self._cluster = cluster
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = tasks.start(self._run(), f"guard-{self.keys.prefix}")

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        waiting = Backoff(RETRY_MIN, maximum=RETRY_MAX, cluster=self._cluster)
        stood = False
        while True:
            try:
                async with contextlib.aclosing(self._store.watch_keys(self.keys)) as watch:  # type: ignore[type-var]
                    async for gone in watch:
                        waiting.reset()
                        if gone:
                            self._on_gone(gone)
                        elif stood:
                            self._on_gap()
                        stood = True
            except KvstoreError as error:
                log.debug("keys below %s cannot be watched: %s", self.keys.prefix, error)
            # history may be gone; the comparison after a gap makes up for it
            self.keys.forget()
            stood = True
            await waiting.wait()
