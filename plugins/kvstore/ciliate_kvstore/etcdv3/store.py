"""`ciliate.kvstore.Kvstore` over etcd (3.3 or newer)."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from ciliate.kvstore import (
    Compare,
    Event,
    KeyValue,
    KvstoreError,
    LeaseExpiredError,
    Op,
    Put,
    Snapshot,
    StoreStatus,
    TxnResult,
    WatchedKeys,
)
from ciliate.kvstore.base import StoreBase
from ciliate.kvstore.limit import RateLimit
from ciliate.kvstore.metrics import measured
from ciliate_kvstore.etcdv3.connection import Connection
from ciliate_kvstore.etcdv3.convert import Convert
from ciliate_kvstore.etcdv3.keys import watch_keys
from ciliate_kvstore.etcdv3.leases import TIME_TO_LIVE, EtcdLease
from ciliate_kvstore.etcdv3.settings import Endpoint, Settings
from ciliate_kvstore.etcdv3.watch import RANGE, Anchors, watch

log = logging.getLogger(__name__)
PAGE = 5000
STATUS_TIMEOUT = 3.0
MIN_VERSION = (3, 3)
"""Conditions on a range of keys came with it."""
DELETE = "/etcdserverpb.KV/DeleteRange"


class EtcdStore(StoreBase):
    """One connection. ``start`` returns, with a line in the log, also where no member answers: that may pass."""

    def __init__(self, settings: Settings, connection: Connection | None = None) -> None:
        """``connection`` is the way to the members; our own where none is given."""
        self._connection = connection or Connection(settings)
        self._messages = self._connection.messages
        self._convert = Convert(settings.prefix, self._messages)
        self._limit = RateLimit(settings.qps, settings.burst)
        self._anchors = Anchors(self._connection, self._convert)
        self._stopped = asyncio.Event()

    async def start(self) -> None:
        """Log in and look around; KvstoreError where the store refuses us."""
        try:
            await self._connection.log_in()
        except KvstoreError:
            if not self._connection.problem:
                raise
        status = await self.status()
        if not status.ok:
            log.warning("%s; going on without, and trying again", status.message)
            return
        log.info("%s", status.message)

    async def stop(self) -> None:
        """End every call and watch."""
        self._stopped.set()
        await self._connection.close()

    async def _range(self, request: Any) -> Any:
        return await self._connection.call(RANGE, request, again=True)

    async def get(self, key: str) -> KeyValue | None:
        """One key, or None."""
        await self._limit.take()
        with measured("get", key):
            answer = await self._range(self._messages.RangeRequest(key=self._convert.key(key)))
            return next(iter(self._convert.items(answer.kvs)), None)

    async def get_prefix(self, prefix: str) -> Snapshot:
        """Every key that begins with ``prefix``."""
        items: list[KeyValue] = []
        revision = 0
        async for page in self.pages(prefix):
            items += page.items
            revision = page.revision
        return Snapshot(items, revision)

    async def first(self, prefix: str) -> KeyValue | None:
        """The first key that begins with ``prefix``, or None."""
        await self._limit.take()
        key, end = self._convert.span(prefix)
        with measured("get", prefix):
            answer = await self._range(self._messages.RangeRequest(key=key, range_end=end, limit=1))
            return next(iter(self._convert.items(answer.kvs)), None)

    async def pages(self, prefix: str) -> AsyncIterator[Snapshot]:
        """Every key that begins with ``prefix``, PAGE at a time, all as they were when the first page was read."""
        key, end = self._convert.span(prefix)
        revision = 0
        while True:
            await self._limit.take()
            with measured("list", prefix):
                request = self._messages.RangeRequest(key=key, range_end=end, limit=PAGE, revision=revision)
                answer = await self._range(request)
                items = self._convert.items(answer.kvs)
            self._anchors.listed(prefix, items, first=not revision)
            revision = revision or answer.header.revision
            yield Snapshot(items, revision)
            if not answer.more:
                return
            key = answer.kvs[-1].key + b"\0"

    async def put_many(self, items: Sequence[Put]) -> int:
        """Write many keys in one transaction; repeated until it is done, because it has no conditions."""
        await self._limit.take()
        with measured("put", items[0].key if items else ""):
            request = self._convert.transaction([], items, [])
            answer = await self._connection.call("/etcdserverpb.KV/Txn", request, again=True)
            return int(answer.header.revision)

    async def delete(self, key: str) -> bool:
        """Delete a key; False where there was none."""
        await self._limit.take()
        with measured("delete", key):
            request = self._messages.DeleteRangeRequest(key=self._convert.key(key))
            return bool((await self._connection.call(DELETE, request, again=True)).deleted)

    async def delete_prefix(self, prefix: str) -> int:
        """Delete every key that begins with ``prefix``; returns how many."""
        await self._limit.take()
        key, end = self._convert.span(prefix)
        with measured("delete", prefix):
            request = self._messages.DeleteRangeRequest(key=key, range_end=end)
            return int((await self._connection.call(DELETE, request, again=True)).deleted)

    async def transaction(
        self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """Run ``success`` where every condition holds, else ``failure``.

        KvstoreError may leave open whether it was done, where there are conditions: look, then decide.
        """
        await self._limit.take()
        first = next(iter([*compare, *success, *failure]), None)
        with measured("transaction", first.key if first else ""):
            request = self._convert.transaction(compare, success, failure)
            answer = await self._connection.call("/etcdserverpb.KV/Txn", request, again=not compare)
            return TxnResult(answer.succeeded, answer.header.revision)

    async def lease(self, ttl: float, lease_id: int = 0) -> EtcdLease:
        """A new lease of ``ttl`` seconds (rounded up), or one again; KvstoreError where ``ttl`` is not positive."""
        if ttl <= 0:
            raise KvstoreError(f"lease: ttl {ttl} given, expected more than 0 seconds")
        if lease_id:
            lease = self._lease(lease_id, ttl)
            await lease.keep_alive()
            return lease
        await self._limit.take()
        with measured("grant"):
            request = self._messages.LeaseGrantRequest(TTL=math.ceil(ttl))
            # done twice it leaves a lease that nobody knows, and that runs out
            answer = await self._connection.call("/etcdserverpb.Lease/LeaseGrant", request, again=True)
            return self._lease(answer.ID, float(answer.TTL))

    def _lease(self, number: int, ttl: float) -> EtcdLease:
        return EtcdLease(self._connection, number, ttl, self._convert.text)

    async def lease_alive(self, lease_id: int) -> bool:
        """Whether a lease, of anybody, still runs."""
        await self._limit.take()
        with measured("lease"):
            try:
                request = self._messages.LeaseTimeToLiveRequest(ID=lease_id)
                return bool((await self._connection.call(TIME_TO_LIVE, request, again=True)).TTL > 0)
            except LeaseExpiredError:
                return False

    async def watch_prefix(self, prefix: str, start_revision: int = 0) -> AsyncIterator[list[Event]]:
        """Changes from a revision on (0: from now), in batches; the first one is empty."""
        if start_revision:
            await self._anchors.check(prefix)
        try:
            async for batch in watch(self._connection, self._convert, prefix, start_revision):
                self._anchors.told(prefix, batch)
                yield batch
        except asyncio.CancelledError:
            if not self._stopped.is_set():
                raise
        except KvstoreError:
            if not self._stopped.is_set():
                raise

    async def watch_keys(self, keys: WatchedKeys) -> AsyncIterator[list[Event]]:
        """Deletions of these keys from now on; the server tells of nothing else."""
        try:
            async for gone in watch_keys(self._connection, self._convert, keys):
                yield gone
        except (asyncio.CancelledError, KvstoreError):
            if not self._stopped.is_set():
                raise

    async def compact(self, revision: int) -> None:
        """Forget history before ``revision``."""
        with measured("compact"):
            request = self._messages.CompactionRequest(revision=revision, physical=True)
            await self._connection.call("/etcdserverpb.KV/Compact", request, again=True)

    # health

    async def status(self) -> StoreStatus:
        """Health: which members answer, whether a majority does, and in what time."""
        return msgspec.structs.replace(await self._status(), remote=True)

    async def _status(self) -> StoreStatus:
        if self._stopped.is_set():
            return StoreStatus(False, "etcd: the store is stopped")
        endpoints = self._connection.settings.endpoints
        answers = await asyncio.gather(*(self._ask(endpoint) for endpoint in endpoints))
        members = [_member(endpoint, answer) for endpoint, answer in zip(endpoints, answers, strict=True)]
        good = [answer for answer in answers if not isinstance(answer, KvstoreError)]
        text = f"etcd: {len(good)}/{len(endpoints)} endpoints: {', '.join(members)}"
        leader = any(answer.leader for answer in good)
        if not leader:
            return StoreStatus(False, f"{text}; no quorum")
        began = time.monotonic()
        try:
            # a read that is not serializable needs a majority
            request = self._messages.RangeRequest(key=self._convert.key("ciliate/.health"), count_only=True)
            async with asyncio.timeout(STATUS_TIMEOUT):
                answer = await self._range(request)
        except TimeoutError:
            return StoreStatus(False, f"{text}; quorum: no answer within {STATUS_TIMEOUT:g} s")
        except KvstoreError as error:
            return StoreStatus(False, f"{text}; quorum: {error}")
        latency = (time.monotonic() - began) * 1000
        revision = answer.header.revision
        return StoreStatus(True, f"{text}; quorum, latency {latency:.1f} ms, revision {revision}", revision)

    async def _ask(self, endpoint: Endpoint) -> Any:
        try:
            request = self._messages.StatusRequest()
            return await self._connection.ask(endpoint, "/etcdserverpb.Maintenance/Status", request, STATUS_TIMEOUT)
        except KvstoreError as error:
            return error


def _member(endpoint: Endpoint, answer: Any) -> str:
    if isinstance(answer, KvstoreError):
        reason = str(answer).removeprefix(f"etcd: {endpoint.name}: ")
        return f"{endpoint.name} away ({reason})"
    role = " leader" if answer.leader and answer.leader == answer.header.member_id else ""
    errors = getattr(answer, "errors", ())  # not every client knows them
    alarms = f" {' '.join(errors)}" if errors else ""
    version = tuple(int(part) for part in answer.version.split(".")[:2] if part.isdigit())
    old = "" if version >= MIN_VERSION else ", too old: 3.3 or newer is needed"
    return f"{endpoint.name} {answer.version}{role}{alarms}{old}"
