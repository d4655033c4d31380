"""The events of one endpoint: one at a time, in order, and equal ones that wait are one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from ciliate.measure import REGENERATION, SUCCESS

log = logging.getLogger(__name__)
T = TypeVar("T")
WORKERS = 8
"""Endpoints of a node that follow an event at the same time."""


class EventQueue:
    """One endpoint's queue. ``workers`` is shared by the queues of a node; nothing runs where nothing waits."""

    def __init__(self, workers: asyncio.Semaphore) -> None:
        self._workers = workers
        self._turn = asyncio.Lock()
        self._waiting: dict[str, asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.folded = 0
        """Events that were one with an event that waited already."""

    @property
    def waiting(self) -> list[str]:
        """Events that have not begun."""
        return list(self._waiting)

    @property
    def running(self) -> int:
        """Events that have begun and are not done."""
        return len(self._tasks) - len(self._waiting)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have the endpoint to oneself for the block, after every event that came before."""
        async with self._turn:
            yield

    async def submit(self, event: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work`` in its turn and return what it returns; with an event of this name that waits, share its outcome.

        The event goes on where the caller is cancelled.
        """
        task: asyncio.Task[T] | None = self._waiting.get(event)
        if task is None:
            task = asyncio.create_task(self._run(event, work), name=f"endpoint-{event}")
            self._waiting[event] = task
            self._tasks.add(task)
            task.add_done_callback(self._done)
        else:
            self.folded += 1
        return await asyncio.shield(task)

    async def _run(self, event: str, work: Callable[[], Awaitable[T]]) -> T:
        asked = time.perf_counter()
        async with self._turn:
            # from here on what changes is not seen any more: another event of this name has to wait
            del self._waiting[event]
            async with self._workers:
                REGENERATION.observe("waitingForLock", SUCCESS, seconds=time.perf_counter() - asked)
                return await work()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("%s failed: %s", task.get_name(), task.exception())

    async def stop(self) -> None:
        """Cancel what waits and what runs."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._waiting.clear()
