"""A base for stores: what can be derived from transactions, leases and watches, derived once for all of them."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence

from ciliate.backoff import pause
from ciliate.kvstore import (
    Compare,
    Delete,
    Event,
    KeyValue,
    Lease,
    LockTimeoutError,
    Op,
    Put,
    Snapshot,
    TxnResult,
)

LOCKS = "ciliate/.locks/"
LOCK_TTL = 15.0


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
    async def lease(self, ttl: float) -> Lease:
        """A new lease of ``ttl`` seconds."""

    @abstractmethod
    def watch_prefix(self, prefix: str, start_revision: int = 0) -> AsyncIterator[list[Event]]:
        """Changes from ``start_revision`` on (0: from now)."""

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
        keeper = asyncio.create_task(_keep(lease), name=f"lock-{name}")
        try:
            try:
                async with asyncio.timeout(timeout):
                    await self._acquire(LOCKS + name, lease.id)
            except TimeoutError:
                raise LockTimeoutError(f"lock {name}: somebody else held it for {timeout:g} s") from None
            yield
        finally:
            keeper.cancel()
            await lease.revoke()

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


async def _keep(lease: Lease) -> None:
    while True:
        await pause(lease.ttl / 3)
        await lease.keep_alive()
