"""What a watcher remembers beside its records: leases of names, and a file for the time when the store is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from ciliate import atomicfile, tasks
from ciliate.backoff import pause

log = logging.getLogger(__name__)
T = TypeVar("T")
INTERVAL, SHARE = 1.0, 0.002
"""Seconds between two writes of a cache, at least; longer where writing would take more than this share of a processor.
A disk that is slow to sync takes none, and what the file lacks is not known after a kill."""


class LeaseCounts:
    """Which lease each name is under, and how many names each lease has. Names without a lease cost nothing."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}
        self._count: dict[int, int] = {}
        self._same: dict[int, int] = {}

    def clear(self) -> None:
        """Forget all."""
        self._of.clear()
        self._count.clear()
        self._same.clear()

    def add(self, name: str, lease: int) -> None:
        """A name is under a lease now; 0 is none."""
        old = self._of.get(name, 0)
        if old == lease:
            return
        if old:
            self.remove(name)
        if lease:
            # one integer object for all names of a lease
            lease = self._same.setdefault(lease, lease)
            self._of[name] = lease
            self._count[lease] = self._count.get(lease, 0) + 1

    def remove(self, name: str) -> int:
        """A name went; the lease that it had."""
        lease = self._of.pop(name, 0)
        if lease:
            self._count[lease] -= 1
            if not self._count[lease]:
                del self._count[lease], self._same[lease]
        return lease

    def count(self, lease: int) -> int:
        """How many names are under a lease."""
        return self._count.get(lease, 0)


class WatchCache(Generic[T]):
    """A watcher's records in a file, so that an agent that starts without the store comes up with what it knew."""

    def __init__(self, path: Path, encode: Callable[[T], bytes]) -> None:
        """``encode`` is the reverse of the watcher's ``decode``."""
        self._path = path
        self._encode = encode
        self._items: Mapping[str, T] = {}
        self._dirty = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def read(self) -> dict[str, bytes]:
        """What the last run wrote; empty, and a line in the log, where the file is damaged."""
        try:
            data = await asyncio.to_thread(atomicfile.read_json, self._path)
            return msgspec.convert(data or {}, dict[str, bytes])
        except (atomicfile.StateFileError, msgspec.ValidationError) as error:
            log.warning("%s; going on without what it had", error)
            return {}

    def start(self, items: Mapping[str, T]) -> None:
        """Write ``items`` whenever `changed` was called, not too often."""
        self._items = items
        self._task = tasks.start(self._loop(), f"cache-{self._path.name}")

    def changed(self) -> None:
        """The records changed."""
        self._dirty.set()

    async def stop(self) -> None:
        """Write what was not written yet."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            if self._dirty.is_set():
                await self._write()

    async def _loop(self) -> None:
        while True:
            await self._dirty.wait()
            await pause(max(INTERVAL, await self._write() / SHARE))

    async def _write(self) -> float:
        """Write once; the processor's time that it took, in seconds."""
        self._dirty.clear()
        began = time.thread_time()
        data = {name: self._encode(record) for name, record in self._items.items()}
        taken = time.thread_time() - began
        try:
            taken += await asyncio.to_thread(self._store, data)
        except asyncio.CancelledError:
            self._dirty.set()
            raise
        except OSError as error:
            self._dirty.set()
            log.warning("%s cannot be written: %s; trying again", self._path, error)
        return taken

    def _store(self, data: Mapping[str, bytes]) -> float:
        began = time.thread_time()
        atomicfile.write_json(self._path, data, pretty=False)
        return time.thread_time() - began
