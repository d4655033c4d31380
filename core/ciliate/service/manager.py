"""The services of this node: the one place through which all of them come, on their way to disk and kernel."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ciliate.datapath import lblayout
from ciliate.datapath.loadbalancer import Counts, Entry, LoadBalancer, Shares
from ciliate.service.model import Problem, Rules, ServiceError, ServiceSpec, check
from ciliate.service.selection import maglev_table
from ciliate.service.store import ServiceStore
from ciliate.service.table import Change, Key, Record, ServiceTable, frontend_key

log = logging.getLogger(__name__)
T = TypeVar("T")
EXTERNAL_KINDS = frozenset({"NodePort", "LoadBalancer", "ExternalIP"})
MAGLEV = "maglev"
MANY = 1000


@contextlib.asynccontextmanager
async def _many(count: int) -> AsyncIterator[None]:
    """Makes many objects that stay: meanwhile nobody looks for garbage among them, nor ever again."""
    if count < MANY:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def entry_of(record: Record, backends: Mapping[int, Key], algorithm: str = "") -> Entry:
    """A service as the kernel has it. Of one that is past only matters whether there is a table: it needs no backends'
    keys."""
    table: Sequence[int] | None = None
    count = len(record.backends) - record.behind
    if algorithm == MAGLEV and count:
        table = maglev_table([(backends[number], number) for number in record.backends[:count] if backends]) or (0,)
    flags = lblayout.EXTERNAL if record.kind in EXTERNAL_KINDS and not record.at_home else 0
    flags |= lblayout.LOCAL_ONLY if record.local_only else 0
    # ranges of the other family alone let nobody in
    flags |= lblayout.RANGES if record.ranges else 0
    return Entry(
        record.id,
        record.frontend,
        record.backends,
        record.local,
        record.affinity,
        flags,
        tuple(record.networks()),
        table,
        record.behind,
    )


class ServiceManager:
    """Services by number. Calls change table, disk and kernel in this order, one after the other.

    Where the kernel refuses, the call fails and ``behind`` says so; ``sync`` brings the kernel up later.
    """

    def __init__(self, store: ServiceStore, balancer: LoadBalancer, algorithm: str, rules: Rules) -> None:
        self.table = ServiceTable(rules.pods)
        self.rules = rules
        self.events: Counter[str] = Counter()
        self.adopted = Counts(0, 0)
        self.shares = Shares()
        self.behind = ""
        self.on_failure: Callable[[], None] = lambda: None
        self.on_external: Callable[[], Awaitable[None]] | None = None
        """Called when the first service is there that is for the outside too, after it is in the kernel."""
        self.on_ports: Callable[[], None] = lambda: None
        """Called when services for the outside have come or gone."""
        self._store = store
        self._balancer = balancer
        self._algorithm = algorithm
        self._lock = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="services")

    async def start(self) -> None:
        """Take over what is on disk and in the kernel; DamagedError where the file cannot be used."""
        async with _many(MANY):
            self.table.restore(*await self._run(self._store.load))
            await self.sync()
        await self._serve_outside(self.table.records.values())

    async def _serve_outside(self, records: Iterable[Record]) -> None:
        if self.on_external is not None and any(record.kind in EXTERNAL_KINDS for record in records):
            await self.on_external()
            self.on_external = None

    async def stop(self) -> None:
        """Close files and maps; what is in the kernel goes on."""
        async with self._lock:
            await self._run(self._store.close)
            await self._run(self._balancer.close)
        self._worker.shutdown()

    async def sync(self) -> None:
        """Compare the kernel with what should be there and mend it."""
        async with self._lock:
            entries = [self._entry(record) for record in self.table.records.values()]
            self.adopted = await self._run(self._balancer.adopt, entries, self.table.backends)
            self.behind = ""

    async def retry(self) -> None:
        """Bring the kernel up where a call failed to; and move what was written into the file's proper place."""
        if self.behind:
            await self.sync()
        await self._run(self._store.checkpoint)

    def records(self) -> list[Record]:
        """Every service by number."""
        return sorted(self.table.records.values(), key=lambda record: record.id)

    def named(self, name: tuple[str, str]) -> list[Record]:
        """The services of one (namespace, name)."""
        return self.table.named(name)

    def spec(self, number: int) -> ServiceSpec:
        """A service; ServiceMissingError where there is none."""
        return self.table.spec(self.table.get(number))

    async def upsert(
        self,
        specs: Sequence[ServiceSpec],
        deletes: Iterable[int] = (),
        source: str = "api",
        path: str = "services[{}].",
    ) -> list[tuple[Record, bool]]:
        """Make these services so and delete others, all or nothing; returns each with whether it is new.

        ServiceError with every field that is wrong, ServiceMissingError, DatapathError where the kernel refuses.
        """
        gone = list(dict.fromkeys(deletes))
        async with self._lock, _many(len(specs) + len(gone)):
            self._check(specs, path)
            for number in gone:
                self.table.get(number)
            self.table.refuse_overlaps(specs, path)
            self._refuse_excess(specs)
            change, records = self.table.plan(specs, gone, source)
            if not change.empty:
                await self._follow(change)
            fresh = {record.id for record, old in change.upserts if old is None}
            return [(record, record.id in fresh) for record in records]

    async def delete(self, numbers: Iterable[int]) -> None:
        """Delete services; ServiceMissingError where one is not there, and none is deleted."""
        await self.upsert((), numbers)

    async def delete_all(self, source: str | None = None) -> int:
        """Delete every service, or those of a source; returns how many."""
        found = [record.id for record in self.table.records.values() if source in (None, record.source)]
        await self.delete(found)
        return len(found)

    async def save(self) -> None:
        """Write the file again, which somebody removed."""
        async with self._lock:
            await self._run(self._store.save)

    async def stored_objects(self) -> list[Any]:
        """The manifests that were kept."""
        return await self._run(self._store.objects)

    async def keep_objects(self, objects: Mapping[str, Any], removed: Collection[str]) -> None:
        """Keep manifests by name and forget others."""
        await self._run(self._store.keep_objects, objects, removed)

    async def collect_flows(self, now: int) -> None:
        """Forget flows that are over, and look who has how many of the node's ports."""
        self.shares = await self._run(self._balancer.collect, now)

    def _check(self, specs: Sequence[ServiceSpec], path: str) -> None:
        problems: list[Problem] = []
        for index, spec in enumerate(specs):
            problems += check(spec, self.rules, path.format(index))
            if len(problems) > 100:
                break
        if problems:
            raise ServiceError(problems)

    def _refuse_excess(self, specs: Sequence[ServiceSpec]) -> None:
        """The maps have an end; a change that would pass it is refused before anything is written."""
        room, table = self._balancer.room(), self.table
        if len(table.records) + len(specs) > room["services"]:
            fronts = {frontend_key(spec.frontend_address) for spec in specs}
            count = len(fronts | {record.frontend for record in table.records.values()})
            if count > room["services"]:
                raise ServiceError([Problem("services", count, f"at most {room['services']} (bpf-lb-services-max)")])
        given = sum(len(spec.backend_addresses) for spec in specs)
        if len(table.backends) + given > room["backends"]:
            limit = f"room for {room['backends']} backends in all (bpf-lb-backends-max)"
            raise ServiceError([Problem("backend-addresses", given, limit)])
        # both generations of a changed service are there for a moment
        slots = sum(len(record.backends) for record in table.records.values()) if given > 1000 else 0
        if slots + given > room["slots"]:
            limit = f"room for {room['slots']} slots in all (bpf-lb-slots-max)"
            raise ServiceError([Problem("backend-addresses", given, limit)])

    async def _follow(self, change: Change) -> None:
        next_ids = (self.table.ids.next, self.table.backend_ids.next)
        upserts = [(self._entry(new), self._entry(old, past=True) if old else None) for new, old in change.upserts]
        deletes = [self._entry(record, past=True) for record in change.deletes]
        self.events["add"] += sum(1 for _, old in change.upserts if old is None)
        self.events["update"] += sum(1 for _, old in change.upserts if old is not None)
        self.events["delete"] += len(change.deletes)

        def work() -> None:
            self._store.commit(change, next_ids)
            self._balancer.write(change.backends, upserts, deletes, change.gone)

        try:
            await self._run(work)
            await self._serve_outside(new for new, _ in change.upserts)
            fresh = (new for new, old in change.upserts if old is None or old.frontend != new.frontend)
            if any(record.kind in EXTERNAL_KINDS for record in (*fresh, *change.deletes)):
                self.on_ports()
        except Exception as error:
            self.behind = str(error)
            self.on_failure()
            raise

    def _entry(self, record: Record, past: bool = False) -> Entry:
        return entry_of(record, {} if past else self.table.backends, self._algorithm)

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)
