"""This node's keys: written under one lease, and written again whenever the store has lost them.

Wishes (`set`, `remove`) return at once and are carried out in the background, so that nothing on this node waits for
the store. The lease is taken up again after a restart; what then nobody sets again is removed by `settle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ciliate import atomicfile, tasks
from ciliate.backoff import Backoff, ClusterSize, pause, spread
from ciliate.kvstore import Compare, Delete, Event, Kvstore, KvstoreError, Lease, LeaseExpiredError, Op, Put
from ciliate.kvstore.guard import KeyGuard, Restoring

log = logging.getLogger(__name__)
LEASE_TTL = 900.0
SYNC_INTERVAL = 300.0
"""Seconds between comparisons of the lease with what should be under it (inventory 4.11 K2), times ln(1 + nodes)."""
BATCH = 100
MAX_REVISION = 2**63 - 1
RETRY_MIN = 0.05
RETRY_MAX = 5.0


def _nothing() -> None:
    """Where nobody listens."""


class LocalKeys:
    """``problem`` says why the store does not have everything yet, or is empty."""

    def __init__(
        self,
        store: Kvstore,
        *,
        ttl: float = LEASE_TTL,
        sync_interval: float = SYNC_INTERVAL,
        cluster: ClusterSize | None = None,
        state: Path | None = None,
    ) -> None:
        """``state``: a file that remembers the lease over a restart."""
        self.problem = ""
        self.renewals = 0
        """How often a lease was lost and everything was written again."""
        self.lost_earlier = False
        """Whether the lease of an earlier run could not be taken up: its keys went with it, or will."""
        self.on_written: Callable[[], object] = _nothing
        """Called when the store has taken some of this node's wishes."""
        self._store = store
        self._ttl = ttl
        self._interval = sync_interval
        self._cluster = cluster or ClusterSize()
        self._state = state
        self._lease: Lease | None = None
        self._alive_until = 0.0
        self._remembered = 0
        self._granting = asyncio.Lock()
        self._granted = False
        self._wanted: dict[str, bytes] = {}
        self._dirty: dict[str, None] = {}
        self._writing: frozenset[str] = frozenset()
        self._told: set[str] = set()
        self._aloud: dict[str, bytes] = {}
        self._former: set[str] = set()
        self._lost: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._went: dict[str, int] = {}
        """Keys of ours that somebody deleted, with the revision of the last time."""
        self._restore = asyncio.Event()
        self._guards: list[KeyGuard] = []
        self._kick = asyncio.Event()
        self._sync = asyncio.Event()
        self._clean = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin; returns before the store has answered."""
        await asyncio.to_thread(self._read_state)
        loops = {"write": self._write_loop, "lease": self._lease_loop, "sync": self._sync_loop}
        loops["restore"] = self._restore_loop
        self._tasks = [tasks.start(loop(), f"local-keys-{name}") for name, loop in loops.items()]
        self._kick.set()

    async def stop(self) -> None:
        """Write what is left, if the store answers soon; keys and lease stay, for the next run."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self.flush()
        for guard in self._guards:
            await guard.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    @property
    def keys(self) -> Mapping[str, bytes]:
        """What should be in the store."""
        return self._wanted

    @property
    def lease_id(self) -> int:
        """The lease as far as it is known to run; 0 where there is none now."""
        return self._lease.id if self._lease is not None and time.monotonic() < self._alive_until else 0

    async def lease(self) -> int:
        """The lease for a transaction of the caller; KvstoreError where there is none and none can be had."""
        return self.lease_id or (await self._ensure_lease()).id

    def guard(self, prefix: str) -> None:
        """Hear at once of keys below ``prefix`` that somebody else deletes; for prefixes that nobody here follows."""
        if any(guard.keys.prefix == prefix for guard in self._guards):
            return
        guard = KeyGuard(self._store, prefix, self._deleted, self.sync_soon, self._cluster)
        for key in self._wanted:
            guard.keys.add(key)
        self._guards.append(guard)
        guard.start()

    def set(self, key: str, value: bytes) -> None:
        """Have a key in the store from soon on until it is removed."""
        if self._wanted.get(key) != value or key in self._former:
            self._want(key, value)
            self._mark(key)

    def adopt(self, key: str, value: bytes, revision: int = 0) -> None:
        """As `set`, for a key that a transaction of the caller just wrote under ``lease_id``, at ``revision``."""
        self._want(key, value, revision)
        self._written[key] = revision
        self._told.add(key)
        went = max([self._went.get(key, 0), *(guard.keys.went.pop(key, 0) for guard in self._guards)])
        if went <= revision:
            self._dirty.pop(key, None)
        else:  # somebody deleted it before we heard that it was written
            self._mark(key)

    def _want(self, key: str, value: bytes, revision: int = 0) -> None:
        self._wanted[key] = value
        self._former.discard(key)
        self._aloud.pop(key, None)
        for guard in self._guards:
            guard.keys.add(key, revision)

    def remove(self, key: str, aloud: bool = False) -> None:
        """Have a key no longer in the store.

        ``aloud``: where it may have gone with a lease that was lost, which others take for an accident, it is written
        once more first, so that they hear of its removal.
        """
        for guard in self._guards:
            guard.keys.discard(key)
        self._written.pop(key, None)
        self._went.pop(key, None)
        value = self._wanted.pop(key, None)
        if aloud and value is not None:
            self._aloud[key] = value
        if value is not None or key in self._former:
            self._former.discard(key)
            self._mark(key)

    def heard(self, key: str) -> bool:
        """Whether somebody may have read a key of this run, or of an earlier one whose lease runs on."""
        return key in self._told or key in self._writing or key in self._former

    def pending(self, key: str) -> bool:
        """Whether the store has yet to hear the last word on a key."""
        return key in self._dirty or key in self._writing or key in self._former

    def touch(self, keys: Collection[str]) -> None:
        """Somebody saw that the store lacks these: write those that it should have, very soon."""
        self._miss(dict.fromkeys(keys, MAX_REVISION))

    def _deleted(self, events: Sequence[Event]) -> None:
        gone = {event.key: event.mod_revision for event in events}
        self._went |= {key: revision for key, revision in gone.items() if key in self._wanted}
        self._miss(gone)

    def _miss(self, gone: Mapping[str, int]) -> None:
        """Keys with the revision at which they went."""
        lost = {key: revision for key, revision in gone.items() if key in self._wanted}
        if lost:
            self._lost |= lost
            self._restore.set()

    def sync_soon(self) -> None:
        """Compare with the store at the next occasion: it was away."""
        self._sync.set()

    def rebind(self) -> None:
        """Another store has taken the place of the old one: write everything there."""
        self._lose_lease("another store is used now")

    async def flush(self) -> None:
        """Wait until the store has everything."""
        async with self._clean:
            await self._clean.wait_for(lambda: not self._dirty and not self._writing)

    async def settle(self, prefix: str = "") -> None:
        """Remove keys of an earlier run below ``prefix`` that nobody has set again."""
        for key in sorted(key for key in self._former if key.startswith(prefix)):
            log.info("%s was set by an earlier run and by nobody since; it is removed", key)
            self.remove(key)

    def _mark(self, key: str) -> None:
        self._dirty[key] = None
        self._kick.set()

    # the lease

    def _read_state(self) -> None:
        try:
            data = atomicfile.read_json(self._state) if self._state else None
        except atomicfile.StateFileError as error:
            log.warning("%s; a new lease is taken", error)
            data = None
        self._remembered = int(data["lease"]) if isinstance(data, dict) and str(data.get("lease")).isdigit() else 0

    async def _ensure_lease(self) -> Lease:
        async with self._granting:
            return self._lease or await self._grant()

    async def _grant(self) -> Lease:
        began = time.monotonic()
        resumed = await self._resume()
        lease = resumed or await self._store.lease(self._ttl)
        if resumed is None and not self._granted:
            self.lost_earlier = True
        self._granted = True
        self._lease, self._alive_until = lease, began + self._ttl
        if self._state:
            await asyncio.to_thread(atomicfile.write_json, self._state, {"lease": lease.id})
        return lease

    async def _resume(self) -> Lease | None:
        """The lease of the last run, with its keys noted; None where there is none that still runs."""
        number, self._remembered = self._remembered, 0
        if not number:
            return None
        try:
            lease = await self._store.lease(self._ttl, number)
            self._former = await lease.keys() - self._wanted.keys()
        except LeaseExpiredError:
            return None
        except KvstoreError:
            self._remembered = number
            raise
        return lease

    def _lose_lease(self, reason: str) -> None:
        if self._lease is not None:
            self._lease, self._alive_until = None, 0.0
            self.renewals += 1
            log.warning("the lease of this node was lost: %s; %d keys are written anew", reason, len(self._wanted))
        self._former.clear()
        for key in self._wanted:
            self._dirty[key] = None
        self._kick.set()

    def _expired(self, lease: Lease, error: LeaseExpiredError) -> None:
        """A lease is over; there may be another one by now."""
        if lease is self._lease:
            self._lose_lease(str(error))

    async def _lease_loop(self) -> None:
        waiting = Backoff(RETRY_MIN, maximum=max(RETRY_MIN, min(RETRY_MAX, self._ttl / 10)))
        wait = self._ttl / 3
        while True:
            await pause(spread(wait))
            lease = self._lease
            if lease is None:
                wait = self._ttl / 3
                continue
            began = time.monotonic()
            try:
                await lease.keep_alive()
            except LeaseExpiredError as error:
                self._expired(lease, error)
            except KvstoreError as error:
                self.problem = str(error)
                wait = waiting.next()
                continue
            else:
                if lease is self._lease:
                    self._alive_until = began + self._ttl
            waiting.reset()
            wait = self._ttl / 3

    # writing

    async def _write_loop(self) -> None:
        waiting = Backoff(RETRY_MIN, maximum=RETRY_MAX, cluster=self._cluster)
        while True:
            await self._kick.wait()
            self._kick.clear()
            try:
                await self._ensure_lease()
                while self._dirty:
                    await self._write_some()
            except LeaseExpiredError as error:
                self._lose_lease(str(error))
            except KvstoreError as error:
                if not self.problem:
                    log.warning("keys of this node cannot be written: %s; trying again", error)
                self.problem = str(error)
                self._kick.set()
                await waiting.wait()
                continue
            except Exception:
                log.exception("keys of this node cannot be written; trying again")
                self._kick.set()
                await waiting.wait()
                continue
            self.problem = ""
            waiting.reset()
            await self._tell_clean()

    async def _write_some(self) -> None:
        lease = await self._ensure_lease()
        names = list(self._dirty)[:BATCH]
        self._writing = frozenset(names)
        ops: list[Op] = [Put(key, self._wanted[key], lease.id) if key in self._wanted else Delete(key) for key in names]
        aloud = {key: self._aloud[key] for key in names if key in self._aloud}
        for key in names:
            del self._dirty[key]
        try:
            done = await self._store.transaction([Compare(key, "lease", lease.id) for key in aloud], ops)
            if not done.succeeded:
                await self._store.transaction([], [Put(key, value, lease.id) for key, value in aloud.items()])
                done = await self._store.transaction([], ops)
            written = {key: done.revision for key in names if key in self._wanted and self._guarded(key)}
            self._written |= written
            for key in written:
                for guard in self._guards:
                    guard.keys.add(key, done.revision)
        except BaseException:
            # what changed meanwhile is dirty already, and its newest wish is what will be written
            self._dirty = dict.fromkeys(names) | self._dirty
            raise
        finally:
            self._writing = frozenset()
        self._note_told(ops)
        self.on_written()

    def _note_told(self, ops: Sequence[Op]) -> None:
        for op in ops:
            if isinstance(op, Put):
                self._told.add(op.key)
            else:
                self._told.discard(op.key)
                if op.key not in self._dirty:
                    self._aloud.pop(op.key, None)

    async def _tell_clean(self) -> None:
        async with self._clean:
            if not self._dirty:
                self._clean.notify_all()

    def _guarded(self, key: str) -> bool:
        return any(key in guard.keys.keys for guard in self._guards)

    async def _restore_loop(self) -> None:
        """Write again what others deleted: at once, but not with everybody, nor as fast as it is deleted."""
        restoring = Restoring(self._cluster)
        while True:
            await self._restore.wait()
            self._restore.clear()
            await restoring.wait()
            # not what we removed ourselves, and have written since
            gone = [key for key, revision in self._lost.items() if revision > self._written.get(key, 0)]
            lost, self._lost = [key for key in gone if key in self._wanted], {}
            if lost:
                log.warning("%d keys of this node are gone from the store and are written again", len(lost))
            for key in lost:
                self._mark(key)

    # comparing

    async def _sync_loop(self) -> None:
        while True:
            if await pause(spread(self._cluster.interval(self._interval)), self._sync):
                self._sync.clear()
                # many nodes notice the end of an outage together
                await pause(random.random() * self._cluster.interval(0.1))
            with contextlib.suppress(KvstoreError):
                await self._compare()

    async def _compare(self) -> None:
        lease = self._lease
        if lease is None:
            return
        try:
            present = await lease.keys()
        except LeaseExpiredError as error:
            self._expired(lease, error)
            return
        missing = [key for key in self._wanted if key not in present and key not in self._dirty]
        if missing:
            self.touch(missing)
