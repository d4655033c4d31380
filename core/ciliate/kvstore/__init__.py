"""What core needs of a key-value store. Backends are plugins; names follow etcd's, so that its users can read them.

Every write transaction gets one revision, greater than all before it. A watch sees every change after its start
revision, once, in order, or raises CompactedError where history no longer reaches back so far.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec


class KvstoreError(Exception):
    """The store refused or failed; the text says what and why."""


class CompactedError(KvstoreError):
    """History before ``compact_revision`` is gone: list again, then watch from the list's revision + 1."""

    def __init__(self, compact_revision: int) -> None:
        super().__init__(f"history before revision {compact_revision} was compacted")
        self.compact_revision = compact_revision


class LeaseExpiredError(KvstoreError):
    """The lease is unknown or has run out."""


class LockTimeoutError(KvstoreError):
    """Somebody else held the lock all the time."""


class LockLostError(KvstoreError):
    """The lock's lease ran out inside of its block, which was cancelled: somebody else may hold it now."""


MAX_OPS = 128
"""Operations, and conditions, that a transaction may have with every store."""


class KeyValue(msgspec.Struct, frozen=True, gc=False):
    """One key. ``version`` counts its writes since it was created; ``lease`` is 0 where it has none."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int
    version: int = 1
    lease: int = 0


class Snapshot(msgspec.Struct, frozen=True):
    """Keys as they were at one revision, sorted."""

    items: list[KeyValue]
    revision: int


class Event(msgspec.Struct, frozen=True, gc=False):
    """One change; ``value`` is empty for a delete. ``lease`` is that of a put, where the store tells it."""

    kind: Literal["put", "delete"]
    key: str
    value: bytes
    mod_revision: int
    lease: int = 0


class Batch(list[Event]):
    """Changes of a watch, in order; ``revision`` is the one up to which everything has been told.

    An empty one says that the watch stands, or that nothing has changed up to ``revision``.
    """

    def __init__(self, events: Iterable[Event] = (), revision: int = 0) -> None:
        super().__init__(events)
        self.revision = revision


def following(events: list[Event], start: int) -> int:
    """The revision from which a watch goes on that began at ``start`` and told ``events``."""
    told = events[-1].mod_revision if events else 0
    return max(start, told + 1, events.revision + 1 if isinstance(events, Batch) else 0)


NOTED = 1024
"""Keys of which is kept that they went before anybody watched them."""


class WatchedKeys:
    """Keys of which somebody wants to hear when they are deleted; they may change while they are watched."""

    def __init__(self, prefix: str) -> None:
        """All of them are below ``prefix``."""
        self.prefix = prefix
        self.keys: dict[str, int] = {}
        """Each with the revision after which its deletion counts; 0: from when it is watched."""
        self.changed = asyncio.Event()
        self.went: dict[str, int] = {}
        """Keys that nobody watched yet when they went, with the revision: the last ones that a store told of."""

    def note(self, key: str, revision: int) -> None:
        """A key that is not watched went: whoever wrote it may not have heard yet that it was there."""
        self.went.pop(key, None)
        self.went[key] = revision
        if len(self.went) > NOTED:
            del self.went[next(iter(self.went))]

    def add(self, key: str, since: int = 0) -> None:
        """Watch a key from soon on, where it is below the prefix; of one that was written at revision ``since`` nothing
        is missed that comes after that."""
        if key.startswith(self.prefix) and since > self.keys.get(key, -1):
            self.keys[key] = since
            self.changed.set()

    def forget(self) -> None:
        """Watch all of them from now on: what was before somebody compares."""
        self.keys = dict.fromkeys(self.keys, 0)

    def discard(self, key: str) -> None:
        """Watch it no longer."""
        if key in self.keys:
            del self.keys[key]
            self.changed.set()


class Compare(msgspec.Struct, frozen=True):
    """A condition on one key. ``version`` 0 and ``mod_revision`` 0 say that it does not exist.

    With ``prefix`` it has to hold for every key that begins so; ``version`` 0 then says that there is none.
    """

    key: str
    target: Literal["version", "mod_revision", "create_revision", "lease", "value"]
    expected: int | bytes
    prefix: bool = False


class Put(msgspec.Struct, frozen=True):
    """Write a key, under a lease where one is given."""

    key: str
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True):
    """Delete a key, or every key that begins with it."""

    key: str
    prefix: bool = False


Op = Put | Delete


class TxnResult(msgspec.Struct, frozen=True):
    """Which branch ran, and the store's revision afterwards."""

    succeeded: bool
    revision: int


class StoreStatus(msgspec.Struct, frozen=True):
    """Health in one line. ``remote``: it is elsewhere, so that its absence is no failure of this node."""

    ok: bool
    message: str
    revision: int = 0
    remote: bool = False


class Lease(Protocol):
    """A lease: keys under it go when it runs out, whether or not its owner lives."""

    id: int
    ttl: float

    async def keep_alive(self) -> None:
        """Begin its time anew; LeaseExpiredError where it has run out."""

    async def revoke(self) -> None:
        """End it now, with its keys."""

    async def keys(self) -> set[str]:
        """The keys under it; LeaseExpiredError where it has run out."""


class Kvstore(Protocol):
    """A key-value store. All methods may raise KvstoreError."""

    async def start(self) -> None:
        """Connect."""

    async def stop(self) -> None:
        """Disconnect; watches end."""

    async def get(self, key: str) -> KeyValue | None:
        """One key, or None."""

    async def get_prefix(self, prefix: str) -> Snapshot:
        """Every key that begins with ``prefix``."""

    async def first(self, prefix: str) -> KeyValue | None:
        """The first key that begins with ``prefix``, or None; costs the same however many there are."""

    def pages(self, prefix: str) -> AsyncIterator[Snapshot]:
        """As `get_prefix`, in parts of one revision: at least one, and never all of a large answer in memory."""

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write a key; returns the revision once the write is durable."""

    async def put_many(self, items: Sequence[Put]) -> int:
        """Write many keys, at most MAX_OPS, in one transaction."""

    async def delete(self, key: str) -> bool:
        """Delete a key; False where there was none."""

    async def delete_prefix(self, prefix: str) -> int:
        """Delete every key that begins with ``prefix``; returns how many."""

    async def transaction(
        self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Run ``success`` where every condition holds, else ``failure``; all of it or nothing."""

    async def lease(self, ttl: float, lease_id: int = 0) -> Lease:
        """A new lease of ``ttl`` seconds; with ``lease_id`` that one again, or LeaseExpiredError where it is gone."""

    async def lease_alive(self, lease_id: int) -> bool:
        """Whether a lease, of anybody, still runs."""

    def lock(self, name: str, timeout: float = 60.0) -> AbstractAsyncContextManager[None]:
        """A lock for the block; a holder that dies loses it. LockTimeoutError after ``timeout`` seconds.

        LockLostError, and an end of the block, where the store could not be reached for as long as the lock lasts.
        """

    def watch_prefix(self, prefix: str, start_revision: int = 0) -> AsyncIterator[list[Event]]:
        """Changes from ``start_revision`` on (0: from now), in batches, until closed. The first batch may be empty.

        CompactedError where they cannot be told any more: history is gone, or the store lost its data. Any other
        KvstoreError is a loss of the connection; go on from the last ``mod_revision`` + 1 then.
        """

    def watch_keys(self, keys: WatchedKeys) -> AsyncIterator[list[Event]]:
        """Deletions of these keys from now on, and of those that are added meanwhile, until closed.

        The first list is empty: the watch stands. KvstoreError is a loss of the connection, and of what happened since.
        """

    async def compact(self, revision: int) -> None:
        """Forget history before ``revision``."""

    async def status(self) -> StoreStatus:
        """Health."""
