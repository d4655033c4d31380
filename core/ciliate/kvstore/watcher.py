"""Follows a prefix of the store: a list, then every change, as typed records in batches. Never a replay of history.

What goes is not withdrawn blindly. Keys are held for a grace period, and come back without a word where they return
within it, when

- a new list lacks them (the store was compacted, restored, wiped or switched): their owners write them again;
- they went together with their lease: that tells of a node that lost the store, not of one that has gone.

A delete by the owner, whose lease runs on, is withdrawn at once (or after ``delete_grace``, where anybody may delete
what others will write again). The grace runs only while the store can be reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Generic, TypeVar

from ciliate import tasks
from ciliate.backoff import Backoff, ClusterSize, pause, spread
from ciliate.kvstore import CompactedError, Event, Kvstore, KvstoreError, following
from ciliate.kvstore.known import LeaseCounts, WatchCache

log = logging.getLogger(__name__)
T = TypeVar("T")
GRACE = 600.0
RETRY_MIN = 0.05
RETRY_MAX = 5.0
ASK_AT_ONCE = 8
"""Leases that are asked for before anything else goes on; more that lost all their keys together have to wait."""
ASK_INTERVAL = 0.1
"""Seconds between two later questions, times ln(1 + nodes)."""
Decode = Callable[[str, bytes], T]
"""Name (the key without the prefix) and value to a record; ValueError where that is malformed. Records are compared."""
OnChange = Callable[[Mapping[str, T], Mapping[str, T]], None]
"""Called on the loop with records that came or changed, and with those that went, by name."""


def _nothing(names: Collection[str]) -> None:
    """What happens where nobody asked for more."""


class Watcher(Generic[T]):
    """``items`` is what is known now; ``synced`` is set once a list was complete; ``problem`` says what is wrong."""

    def __init__(
        self,
        store: Kvstore,
        prefix: str,
        decode: Decode[T],
        on_change: OnChange[T],
        *,
        on_missing: Callable[[Collection[str]], None] = _nothing,
        grace: float = GRACE,
        delete_grace: float = 0.0,
        cache: WatchCache[T] | None = None,
        cluster: ClusterSize | None = None,
    ) -> None:
        """``on_missing`` hears at once of names that the store lacks.

        With a ``cache``, what the last run knew counts from `start` on; what a list then lacks is held for the grace.
        """
        self.prefix = prefix
        self.items: dict[str, T] = {}
        self.synced = asyncio.Event()
        self.problem = "not asked yet"
        self._store = store
        self._decode = decode
        self._on_change = on_change
        self._on_missing = on_missing
        self._grace = grace
        self._delete_grace = delete_grace
        self._cache = cache
        self._cluster = cluster
        self._leases = LeaseCounts()
        self._held: dict[str, float] = {}
        self._holding = asyncio.Event()
        self._unasked: dict[int, list[str]] = {}
        self._asking = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._malformed = 0
        self._told = False

    async def start(self) -> None:
        """Take in the cache and begin; returns before the store has answered (wait for ``synced``)."""
        if self._cache:
            found: dict[str, T] = {}
            for name, value in (await self._cache.read()).items():
                self._decoded(found, name, value)
            await self._take(found, [])
            self._cache.start(self.items)
        self._tasks = [
            tasks.start(self._run(), f"watch-{self.prefix}"),
            tasks.start(self._withdraw_loop(), f"withdraw-{self.prefix}"),
            tasks.start(self._ask_loop(), f"ask-{self.prefix}"),
        ]

    async def stop(self) -> None:
        """Stop following; ``items`` stay as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._cache:
            await self._cache.stop()

    @property
    def held(self) -> int:
        """How many records are known that the store lacks."""
        return len(self._held)

    def holds(self, name: str) -> bool:
        """Whether a record is known that the store lacks."""
        return name in self._held

    async def _run(self) -> None:
        waiting = Backoff(RETRY_MIN, maximum=RETRY_MAX, cluster=self._cluster)
        start = 0
        while True:
            try:
                if not start:
                    start = await self._list() + 1
                    self._connected()
                async with contextlib.aclosing(self._store.watch_prefix(self.prefix, start)) as watch:  # type: ignore[type-var]
                    async for events in watch:
                        self._connected()
                        waiting.reset()
                        start = following(events, start)
                        if events:
                            await self._apply(events)
                start = 0  # another store has taken this one's place
            except CompactedError as error:
                log.info("%s: %s; listing again", self.prefix, error)
                start = 0
                await waiting.wait()
            except KvstoreError as error:
                if not self._told:
                    self._told = True
                    log.warning("%s cannot be followed: %s; trying again", self.prefix, error)
                self.problem = str(error)
                await waiting.wait()
            except Exception:
                log.exception("%s: a change could not be taken in; listing again", self.prefix)
                start = 0
                await waiting.wait()

    def _connected(self) -> None:
        if self.problem and self._held:
            # the time without a store does not count
            until = time.monotonic() + self._grace
            self._held = dict.fromkeys(self._held, until)
            self._holding.set()
        self.problem, self._told = "", False
        self.synced.set()

    async def _list(self) -> int:
        """Take in what the store has now; returns its revision."""
        present: set[str] = set()
        self._leases.clear()
        revision = 0
        async with contextlib.aclosing(self._store.pages(self.prefix)) as pages:  # type: ignore[type-var]
            async for page in pages:
                revision = page.revision
                found: dict[str, T] = {}
                for item in page.items:
                    name = item.key[len(self.prefix) :]
                    present.add(name)
                    self._leases.add(name, item.lease)
                    self._decoded(found, name, item.value)
                await self._take(found, [])
                await asyncio.sleep(0)
        self._miss([name for name in self.items if name not in present and name not in self._held], self._grace)
        return revision

    def _decoded(self, found: dict[str, T], name: str, value: bytes) -> None:
        try:
            found[name] = self._decode(name, value)
        except ValueError as error:
            self._malformed += 1
            log.log(
                logging.WARNING if self._malformed == 1 else logging.DEBUG,
                "%s%s: malformed: %s",
                self.prefix,
                name,
                error,
            )

    async def _apply(self, events: list[Event]) -> None:
        """Take in changes; the last one of a name decides."""
        found: dict[str, T] = {}
        gone: dict[str, int] = {}
        for event in events:
            name = event.key[len(self.prefix) :]
            if event.kind == "put":
                gone.pop(name, None)
                self._leases.add(name, event.lease)
                self._decoded(found, name, event.value)
            else:
                found.pop(name, None)
                gone[name] = self._leases.remove(name)
        expired, unasked = await self._expired(set(gone.values()))
        at_once = [name for name, lease in gone.items() if lease not in expired and not self._delete_grace]
        await self._take(found, at_once)
        if gone:
            self._on_missing(gone)
            self._miss([name for name, lease in gone.items() if lease in expired], self._grace, tell=False)
            self._ask_later({name: lease for name, lease in gone.items() if lease in unasked})
            if self._delete_grace:
                later = [name for name, lease in gone.items() if lease not in expired]
                self._miss(later, self._delete_grace, tell=False)

    async def _expired(self, leases: set[int]) -> tuple[frozenset[int], frozenset[int]]:
        """Which of these leases took their keys along, as far as is known, and which were not asked for.

        One that has keys left here has not. Those that were not asked for are among the first.
        """
        expired = set()
        emptied = [lease for lease in leases if lease and not self._leases.count(lease)]
        for lease in emptied[:ASK_AT_ONCE]:
            if not await self._runs(lease):
                expired.add(lease)
        # many at once are most likely an outage; asking for each would keep everything else waiting
        later = emptied[ASK_AT_ONCE:]
        return frozenset([*expired, *later]), frozenset(later)

    async def _runs(self, lease: int) -> bool:
        try:
            return await self._store.lease_alive(lease)
        except KvstoreError:
            return False  # not known: then rather hold

    async def _ask_loop(self) -> None:
        """Ask for those leases that could not be asked for at once; what they let go on purpose is withdrawn."""
        while True:
            await self._asking.wait()
            self._asking.clear()
            while self._unasked:
                lease, names = self._unasked.popitem()
                if await self._runs(lease):
                    await self._take({}, [name for name in names if name in self._held])
                await pause(spread(self._cluster.interval(ASK_INTERVAL) if self._cluster else ASK_INTERVAL))

    def _ask_later(self, gone: Mapping[str, int]) -> None:
        for name, lease in gone.items():
            self._unasked.setdefault(lease, []).append(name)
        if self._unasked:
            self._asking.set()

    async def _take(self, found: Mapping[str, T], gone: Collection[str]) -> None:
        for name in found:
            self._held.pop(name, None)
        changed = {name: record for name, record in found.items() if self.items.get(name) != record}
        removed = {name: self.items.pop(name) for name in gone if name in self.items}
        self.items.update(changed)
        for name in removed:
            self._held.pop(name, None)
        if changed or removed:
            self._on_change(changed, removed)
            if self._cache:
                self._cache.changed()

    def _miss(self, names: Collection[str], grace: float, tell: bool = True) -> None:
        """Hold names that the store lacks."""
        known = [name for name in names if name in self.items]
        if not known:
            return
        until = time.monotonic() + grace
        for name in known:
            self._held.setdefault(name, until)
        self._holding.set()
        if grace == self._grace:
            log.info("%s: the store lacks %d keys; they are held for %g s", self.prefix, len(known), grace)
        if tell:
            self._on_missing(known)

    async def _withdraw_loop(self) -> None:
        """Withdraw what is missing for longer than its grace, while the store can be reached."""
        while True:
            await self._holding.wait()
            self._holding.clear()
            while self._held:
                await pause(max(min(self._held.values()) - time.monotonic(), 0) + 0.001, self._holding)
                self._holding.clear()
                await self._withdraw()

    async def _withdraw(self) -> None:
        now = time.monotonic()
        due = [name for name, until in self._held.items() if until <= now]
        if self.problem:
            self._held.update(dict.fromkeys(due, now + self._grace))
            return
        await self._take({}, due)
