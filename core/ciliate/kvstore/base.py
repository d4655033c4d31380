"""A base for stores: what can be derived from transactions, leases and watches, derived once for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from ciliate.backoff import Backoff, pause
from ciliate.kvstore import (
    Compare,
    Delete,
    Event,
    KeyValue,
    KvstoreError,
    Lease,
    LeaseExpiredError,
    LockLostError,
    LockTimeoutError,
    Op,
    Put,
    Snapshot,
    TxnResult,
    WatchedKeys,
)

LOCKS = "ciliate/.locks/"
LOCK_TTL = 15.0
RETRY_MIN = 0.05


class StoreBase(ABC):
    """Subclasses give `get_prefix`, `transaction`, `lease`, `watch_prefix`, `compact`, `status`, `start` and `stop`.

    They may give anything else as well, where they can do it faster.
    """

    @abstractmethod
    async def get_prefix(self, prefix: str) -> Snapshot:
        """Every key that begins with ``prefix``."""

    @abstractmethod
    async def transaction(
        self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Run ``success`` where every condition holds, else ``failure``; all of it or nothing."""

    @abstractmethod
    async def lease(self, ttl: float, lease_id: int = 0) -> Lease:
        """A new lease of ``ttl`` seconds, or ``lease_id`` again."""

    @abstractmethod
    def watch_prefix(self, prefix: str, start_revision: int = 0) -> AsyncIterator[list[Event]]:
        """Changes from ``start_revision`` on (0: from now)."""

    async def first(self, prefix: str) -> KeyValue | None:
        """The first key that begins with ``prefix``, or None."""
        return next(iter((await self.get_prefix(prefix)).items), None)

    async def watch_keys(self, keys: WatchedKeys) -> AsyncIterator[list[Event]]:
        """Deletions of these keys from now on; here by watching their prefix."""
        async with contextlib.aclosing(self.watch_prefix(keys.prefix)) as watch:  # type: ignore[type-var]
            stands = False
            async for events in watch:
                if not stands:
                    yield []
                stands = True
                deleted = [event for event in events if event.kind == "delete"]
                for event in deleted:
                    if event.key not in keys.keys:
                        keys.note(event.key, event.mod_revision)
                if gone := [event for event in deleted if event.key in keys.keys]:
                    yield gone

    async def pages(self, prefix: str) -> AsyncIterator[Snapshot]:
        """Every key that begins with ``prefix``, here as one part."""
        yield await self.get_prefix(prefix)

    async def lease_alive(self, lease_id: int) -> bool:
        """Whether a lease still runs; here by taking it up, which may keep it alive once."""
        try:
            await self.lease(1.0, lease_id)
        except LeaseExpiredError:
            return False
        return True

    async def get(self, key: str) -> KeyValue | None:
        """One key, or None."""
        return next((item for item in (await self.get_prefix(key)).items if item.key == key), None)

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write a key; returns the revision once the write is durable."""
        return await self.put_many([Put(key, value, lease)])

    async def put_many(self, items: Sequence[Put]) -> int:
        """Write many keys as one revision."""
        return (await self.transaction([], items)).revision

    async def delete(self, key: str) -> bool:
        """Delete a key; False where there was none."""
        missing = await self.transaction([Compare(key, "version", 0)], [], [Delete(key)])
        return not missing.succeeded

    async def delete_prefix(self, prefix: str) -> int:
        """Delete every key that begins with ``prefix``; returns how many there were."""
        count = len((await self.get_prefix(prefix)).items)
        await self.transaction([], [Delete(prefix, prefix=True)])
        return count

    @contextlib.asynccontextmanager
    async def lock(self, name: str, timeout: float = 60.0) -> AsyncIterator[None]:
        """Hold a lock for the block; it belongs to a lease, so that a holder that dies loses it."""
        lease = await self.lease(LOCK_TTL)
        holder = _Holder(lease, name)
        try:
            try:
                async with asyncio.timeout(timeout):
                    await self._acquire(LOCKS + name, lease.id)
            except TimeoutError:
                raise LockTimeoutError(f"lock {name}: somebody else held it for {timeout:g} s") from None
            async with holder:
                yield
        finally:
            await holder.release()

    async def _acquire(self, key: str, lease: int) -> None:
        while True:
            claim = await self.transaction([Compare(key, "version", 0)], [Put(key, b"", lease)])
            if claim.succeeded:
                return
            # between the failed claim and this watch nothing can slip by: it begins right behind that revision
            async with contextlib.aclosing(self.watch_prefix(key, claim.revision + 1)) as watch:  # type: ignore[type-var]
                async for events in watch:
                    if any(event.kind == "delete" and event.key == key for event in events):
                        break


class _Holder:
    """Keeps a lock's lease; a block that outlives it is cancelled, because somebody else may hold the lock then."""

    def __init__(self, lease: Lease, name: str) -> None:
        self._lease = lease
        self._name = name
        self._lost = ""
        self._inside: asyncio.Task[None] | None = None
        self._keeper = asyncio.create_task(self._keep(), name=f"lock-{name}")

    async def _keep(self) -> None:
        try:
            await self._beat_until_lost()
        except Exception as error:  # without a keeper the lock is as good as lost, whatever ended it
            self._lost = f"{type(error).__name__}: {error}"
        if self._inside is not None:
            self._inside.cancel()

    async def _beat_until_lost(self) -> None:
        waiting = Backoff(RETRY_MIN, maximum=max(RETRY_MIN, self._lease.ttl / 10))
        until = time.monotonic() + self._lease.ttl
        wait = self._lease.ttl / 3
        while not self._lost:
            await pause(min(wait, max(until - time.monotonic(), 0)))
            began = time.monotonic()
            try:
                async with asyncio.timeout(until - began):
                    await self._lease.keep_alive()
            except (TimeoutError, LeaseExpiredError) as error:
                self._lost = str(error) or "the store did not answer in time"
            except KvstoreError:
                wait = waiting.next()
            else:
                until, wait = began + self._lease.ttl, self._lease.ttl / 3
                waiting.reset()

    async def __aenter__(self) -> None:
        self._inside = asyncio.current_task()

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        inside, self._inside = self._inside, None
        if self._lost:
            if kind is asyncio.CancelledError and inside is not None and inside.uncancel() > 0:
                return  # somebody else wants an end of the task as well
            raise LockLostError(f"lock {self._name} was lost: {self._lost}")

    async def release(self) -> None:
        """Give the lock to the next; where the store cannot be reached it goes with its lease."""
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        with contextlib.suppress(KvstoreError):
            await self._lease.revoke()
