"""A store inside one process: revisions, leases, watches and compaction done; where it keeps its content is left open.

For providers of third parties: give `Contents` a function that makes each change durable, feed it what was kept, and
`LocalStore` is a complete store. All instances of a process over the same content share one `Contents`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from ciliate.kvstore import (
    Batch,
    CompactedError,
    Compare,
    Delete,
    Event,
    KeyValue,
    KvstoreError,
    LeaseExpiredError,
    Op,
    Put,
    Snapshot,
    StoreStatus,
    TxnResult,
)
from ciliate.kvstore.base import StoreBase

HISTORY = 10_000
Record = Callable[[list[Event]], None]
"""Makes the events of one transaction durable before it is acknowledged; an exception refuses the transaction."""


def _forget(events: list[Event]) -> None:
    """The record of a store that keeps nothing."""


class Contents:
    """Keys, history and leases. Every write is one step of the event loop, so no two mix."""

    def __init__(self, record: Record = _forget, history: int = HISTORY) -> None:
        self.items: dict[str, KeyValue] = {}
        self.events: list[Event] = []
        self.revision = 0
        self.compacted = 0
        self.changed = asyncio.Event()
        self._record = record
        self._history = history
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._granted = 0

    def replay(self, events: Iterable[Event]) -> None:
        """Take in what an earlier process recorded, in its order. Its leases ended with it: their keys are plain."""
        for event in events:
            self._apply(event, 0)
            self.revision = event.mod_revision
        self.compacted = self.revision

    def write(self, ops: Sequence[Op]) -> None:
        """Run operations as one revision, all or none. LeaseExpiredError where a lease is gone."""
        changes = list(self._changes(ops))
        if not changes:
            return
        self._record([event for event, _ in changes])
        for event, lease in changes:
            self._apply(event, lease)
        self.revision += 1
        self.events += [event for event, _ in changes]
        if len(self.events) > 2 * self._history:
            self.compact(self.events[-self._history].mod_revision)
        self.wake()

    def _changes(self, ops: Sequence[Op]) -> Iterable[tuple[Event, int]]:
        keys = set(self.items)
        for op in ops:
            if isinstance(op, Put):
                if op.lease and op.lease not in self._timers:
                    raise LeaseExpiredError(f"key {op.key}: lease {op.lease} is unknown or has run out")
                keys.add(op.key)
                yield Event("put", op.key, op.value, self.revision + 1, op.lease), op.lease
                continue
            gone = sorted(key for key in keys if key.startswith(op.key)) if op.prefix else [op.key]
            for key in gone:
                if key in keys:
                    keys.discard(key)
                    yield Event("delete", key, b"", self.revision + 1), 0

    def _apply(self, event: Event, lease: int) -> None:
        if event.kind == "delete":
            self.items.pop(event.key, None)
            return
        old = self.items.get(event.key)
        made, version = (old.create_revision, old.version + 1) if old else (event.mod_revision, 1)
        self.items[event.key] = KeyValue(event.key, event.value, event.mod_revision, made, version, lease)

    def holds(self, condition: Compare) -> bool:
        """Whether a condition of a transaction is met."""
        if condition.prefix:
            each = [key for key in self.items if key.startswith(condition.key)]
            none = condition.target != "value" and condition.expected == 0
            return all(self._holds(key, condition) for key in each) if each else none
        return self._holds(condition.key, condition)

    def _holds(self, key: str, condition: Compare) -> bool:
        item = self.items.get(key)
        missing = None if condition.target == "value" else 0
        found = missing if item is None else getattr(item, condition.target)
        return bool(found == condition.expected)

    def since(self, start: int) -> list[Event]:
        """Every change from revision ``start`` on; CompactedError where history is gone."""
        if start <= self.compacted:
            raise CompactedError(self.compacted + 1)
        return [event for event in self.events if event.mod_revision >= start]

    def compact(self, revision: int) -> None:
        """Forget history before ``revision``."""
        self.compacted = max(self.compacted, min(revision, self.revision + 1) - 1)
        self.events = [event for event in self.events if event.mod_revision > self.compacted]

    def wake(self) -> None:
        """Let everybody look who waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    def grant(self, ttl: float) -> int:
        """A new lease."""
        self._granted += 1
        self._arm(self._granted, ttl)
        return self._granted

    def _arm(self, lease: int, ttl: float) -> None:
        self._timers[lease] = asyncio.get_running_loop().call_later(ttl, self.end_lease, lease)

    def has_lease(self, lease: int) -> bool:
        """Whether a lease still runs."""
        return lease in self._timers

    def alive(self, lease: int) -> None:
        """LeaseExpiredError where a lease has run out."""
        if not self.has_lease(lease):
            raise LeaseExpiredError(f"lease {lease} is unknown or has run out")

    def keep_alive(self, lease: int, ttl: float) -> None:
        """Begin a lease anew; LeaseExpiredError where it has run out."""
        self.alive(lease)
        self._timers[lease].cancel()
        self._arm(lease, ttl)

    def end_lease(self, lease: int) -> None:
        """End a lease with its keys; nothing happens where it has ended before."""
        timer = self._timers.pop(lease, None)
        if timer is not None:
            timer.cancel()
            self.write([Delete(key) for key, item in self.items.items() if item.lease == lease])


class LocalLease:
    """A lease that a timer of the event loop ends."""

    def __init__(self, contents: Contents, ttl: float, lease_id: int = 0) -> None:
        if lease_id:
            contents.alive(lease_id)
        self.id = lease_id or contents.grant(ttl)
        self.ttl = ttl
        self._contents = contents

    async def keep_alive(self) -> None:
        """Begin its time anew."""
        self._contents.keep_alive(self.id, self.ttl)

    async def revoke(self) -> None:
        """End it now, with its keys."""
        self._contents.end_lease(self.id)

    async def keys(self) -> set[str]:
        """The keys under it."""
        self._contents.alive(self.id)
        return {key for key, item in self._contents.items.items() if item.lease == self.id}


class LocalStore(StoreBase):
    """`ciliate.kvstore.Kvstore` over `Contents`; ``name`` is what its messages call it."""

    def __init__(self, name: str, contents: Contents) -> None:
        self.name = name
        self._contents = contents
        self._stopped = False

    async def start(self) -> None:
        """Nothing to connect to."""

    async def stop(self) -> None:
        """Refuse what comes later; watches end."""
        self._stopped = True
        self._contents.wake()

    def _open(self) -> Contents:
        if self._stopped:
            raise KvstoreError(f"store {self.name}: is stopped")
        return self._contents

    async def get(self, key: str) -> KeyValue | None:
        """One key, or None."""
        return self._open().items.get(key)

    async def get_prefix(self, prefix: str) -> Snapshot:
        """Every key that begins with ``prefix``."""
        contents = self._open()
        found = sorted(key for key in contents.items if key.startswith(prefix))
        return Snapshot([contents.items[key] for key in found], contents.revision)

    async def transaction(
        self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Run ``success`` where every condition holds, else ``failure``; all of it or nothing."""
        contents = self._open()
        holds = all(contents.holds(condition) for condition in compare)
        contents.write(success if holds else failure)
        return TxnResult(holds, contents.revision)

    async def lease(self, ttl: float, lease_id: int = 0) -> LocalLease:
        """A new lease of ``ttl`` seconds, or one again; KvstoreError where ``ttl`` is not positive."""
        if ttl <= 0:
            raise KvstoreError(f"lease: ttl {ttl} given, expected more than 0 seconds")
        return LocalLease(self._open(), ttl, lease_id)

    async def lease_alive(self, lease_id: int) -> bool:
        """Whether a lease still runs."""
        return self._open().has_lease(lease_id)

    async def watch_prefix(self, prefix: str, start_revision: int = 0) -> AsyncIterator[list[Event]]:
        """Changes from a revision on (0: from now), in batches. CompactedError where history is gone."""
        contents = self._open()
        following = start_revision or contents.revision + 1
        yield Batch()
        while not self._stopped:
            contents = self._open()
            changed, start, following = contents.changed, following, max(following, contents.revision + 1)
            events = [event for event in contents.since(start) if event.key.startswith(prefix)]
            if events:
                yield events
            elif following == start:
                await changed.wait()

    async def compact(self, revision: int) -> None:
        """Forget history before ``revision``."""
        self._open().compact(revision)

    async def status(self) -> StoreStatus:
        """Health."""
        revision = self._contents.revision
        return StoreStatus(not self._stopped, f"{self.name}, revision {revision}", revision)
