"""The embedded store: asyncio on top of one SQLite connection in one thread.

Writes that arrive while a commit is on its way share the next one (group commit); each is acknowledged only after the
commit is on the disk. Other processes may use the same file: SQLite serialises writers, a touched file wakes watchers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ciliate.kvstore import (
    Batch,
    Compare,
    Event,
    KeyValue,
    KvstoreError,
    Op,
    Snapshot,
    StoreStatus,
    TxnResult,
)
from ciliate.kvstore.base import StoreBase
from ciliate_kvstore.database import Database, Reader
from ciliate_kvstore.wake import Wake

log = logging.getLogger(__name__)
T = TypeVar("T")
REAP_INTERVAL = 5.0
GROUP = 512
POLL = 10.0
"""Seconds after which a watcher looks even if nobody woke it: a writer may die between commit and wake-up."""


class SqliteLease:
    """A lease of the embedded store."""

    def __init__(self, store: SqliteStore, number: int, ttl: float) -> None:
        self._store = store
        self.id = number
        self.ttl = ttl

    async def keep_alive(self) -> None:
        """Begin its time anew; LeaseExpiredError where it has run out."""
        await self._store.write(lambda db: db.keep_alive(self.id))

    async def revoke(self) -> None:
        """End it now, with its keys."""
        await self._store.write(lambda db: db.revoke([self.id]))

    async def keys(self) -> set[str]:
        """The keys under it; LeaseExpiredError where it has run out."""
        return await self._store.read(lambda db: db.lease_keys(self.id))


class SqliteStore(StoreBase):
    """`ciliate.kvstore.Kvstore` over a file."""

    def __init__(self, path: Path, history: int = 100_000) -> None:
        self._path = path
        self._history = history
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore")
        self._wake = Wake(path.with_name(path.name + ".wake"))
        self._queue: list[tuple[Callable[[Database], Any], asyncio.Future[Any]]] = []
        self._kick = asyncio.Event()
        self._leased = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._db: Database | None = None
        self._stopped = False

    async def start(self) -> None:
        """Open the file; KvstoreError where that fails."""
        self._db = await self._in_thread(lambda: Database(self._path))
        self._reader = Reader(self._path)
        self._wake.open()
        self._tasks = [
            asyncio.create_task(self._write_loop(), name="kvstore-writer"),
            asyncio.create_task(self._reap_loop(), name="kvstore-reaper"),
        ]

    async def stop(self) -> None:
        """Finish pending writes and close; watches end."""
        if self._stopped:
            return
        self._stopped = True
        self._kick.set()
        if self._tasks:
            self._tasks[1].cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._wake.close()
        if self._db is not None:
            self._reader.close()
            await self._in_thread(self._db.close)
        self._thread.shutdown()

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except sqlite3.Error as error:
            raise KvstoreError(f"store {self._path}: {error}") from error

    async def read(self, function: Callable[[Database], T]) -> T:
        """Run a read in the store's thread."""
        database = self._database()
        return await self._in_thread(lambda: function(database))

    def _database(self) -> Database:
        if self._db is None or self._stopped:
            raise KvstoreError(f"store {self._path}: is not open")
        return self._db

    async def write(self, function: Callable[[Database], T]) -> T:
        """Run a write in the next commit; returns once that is on the disk."""
        self._database()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append((function, future))
        self._kick.set()
        return await future

    async def _write_loop(self) -> None:
        while not (self._stopped and not self._queue):
            await self._kick.wait()
            self._kick.clear()
            while self._queue:
                group, self._queue = self._queue[:GROUP], self._queue[GROUP:]
                await self._commit(group)
            if self._stopped:
                return

    async def _commit(self, group: list[tuple[Callable[[Database], Any], asyncio.Future[Any]]]) -> None:
        try:
            results = await self._in_thread(self._commit_group, [function for function, _ in group])
        except Exception as error:  # the whole group shares the fate of its commit, whatever stopped it
            for _, future in group:
                if not future.done():
                    future.set_exception(KvstoreError(f"store {self._path}: write failed: {error}"))
            return
        for (_, future), (succeeded, value) in zip(group, results, strict=True):
            if future.done():
                continue
            if succeeded:
                future.set_result(value)
            else:
                future.set_exception(value)

    def _commit_group(self, functions: Sequence[Callable[[Database], Any]]) -> list[tuple[bool, Any]]:
        database = self._db
        if database is None:
            raise KvstoreError(f"store {self._path}: is not open")
        results: list[tuple[bool, Any]] = []
        with database.transaction():
            before = database.revision()
            for function in functions:
                try:
                    with database.savepoint():
                        results.append((True, function(database)))
                except KvstoreError as error:
                    results.append((False, error))
            changed = database.revision() != before
            if changed:
                database.trim(self._history)
        if changed:
            self._wake.touch()
        return results

    async def _reap_loop(self) -> None:
        while True:
            try:
                gone, following = await self.read(lambda db: db.expired())
                if gone:
                    await self.write(lambda db: db.revoke(db.expired()[0]))
            except KvstoreError as error:
                log.warning("leases could not be collected: %s", error)
                following = None
            wait = REAP_INTERVAL if following is None else min(following, REAP_INTERVAL)
            self._leased.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait * random.uniform(1.0, 1.1) + 0.005):
                    await self._leased.wait()

    async def get(self, key: str) -> KeyValue | None:
        """One key, or None."""
        self._database()
        try:
            return self._reader.get(key)
        except sqlite3.Error as error:
            raise KvstoreError(f"store {self._path}: {error}") from error

    async def get_prefix(self, prefix: str) -> Snapshot:
        """Every key that begins with ``prefix``."""
        return await self.read(lambda db: db.get_prefix(prefix))

    async def transaction(
        self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Run ``success`` where every condition holds, else ``failure``."""
        return await self.write(lambda db: db.compare_and_write(compare, success, failure))

    async def lease(self, ttl: float, lease_id: int = 0) -> SqliteLease:
        """A new lease of ``ttl`` seconds, or one again; KvstoreError where ``ttl`` is not positive."""
        if ttl <= 0:
            raise KvstoreError(f"lease: ttl {ttl} given, expected more than 0 seconds")
        if lease_id:
            await self.write(lambda db: db.keep_alive(lease_id))
            return SqliteLease(self, lease_id, ttl)
        number = await self.write(lambda db: db.grant(ttl))
        self._leased.set()
        return SqliteLease(self, number, ttl)

    async def lease_alive(self, lease_id: int) -> bool:
        """Whether a lease, of anybody, still runs."""
        return await self.read(lambda db: db.lease_alive(lease_id))

    async def watch_prefix(self, prefix: str, start_revision: int = 0) -> AsyncIterator[list[Event]]:
        """Changes from a revision on (0: from now), in batches. CompactedError where history is gone."""
        changed = self._wake.subscribe()
        try:
            following = start_revision or await self.read(lambda db: db.revision()) + 1
            yield Batch()
            while not self._stopped:
                changed.clear()
                position = following
                events, following = await self.read(lambda db, start=position: db.events(prefix, start))  # type: ignore[misc]
                if events:
                    yield events
                elif following == position:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL):
                            await changed.wait()
        finally:
            self._wake.unsubscribe(changed)

    async def compact(self, revision: int) -> None:
        """Forget history before ``revision``."""
        await self.write(lambda db: db.compact(revision))

    async def status(self) -> StoreStatus:
        """Health: whether the file answers."""
        try:
            revision = await self.read(lambda db: db.revision())
        except KvstoreError as error:
            return StoreStatus(False, str(error))
        return StoreStatus(True, f"file {self._path}, revision {revision}", revision)
