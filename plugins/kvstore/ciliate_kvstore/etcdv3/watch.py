"""A watch: one stream, from a revision on, until something breaks. Who watches goes on from what was told last.

Two ways to lose events are found here: history that was compacted, and a store that lost its data (a wiped directory,
an old backup), whose revisions begin again lower. Both are CompactedError: list again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from grpc import aio

from ciliate.kvstore import Batch, CompactedError, KeyValue, KvstoreError
from ciliate_kvstore.etcdv3.connection import Connection
from ciliate_kvstore.etcdv3.convert import Convert
from ciliate_kvstore.etcdv3.http2 import Follows

WATCH = "/etcdserverpb.Watch/Watch"
RANGE = "/etcdserverpb.KV/Range"
STAND_TIMEOUT = 10.0
"""Seconds within which a member has to say that a watch stands."""


class Anchors:
    """For each prefix a key with its last write, which is still there as long as the store has its data.

    A write is known by revision, value and lease: a store that was filled anew may have the same key at this revision.
    """

    def __init__(self, connection: Connection, convert: Convert) -> None:
        self._connection = connection
        self._convert = convert
        self._anchors: dict[str, tuple[str, int, int]] = {}
        self._checked: dict[str, int] = {}

    def listed(self, prefix: str, items: Sequence[KeyValue], first: bool) -> None:
        """A page of a list was read."""
        if first:
            self._anchors.pop(prefix, None)
            self._checked[prefix] = self._connection.losses
        newest = max(items, key=lambda item: item.mod_revision, default=None)
        if newest is not None and newest.mod_revision > self._anchors.get(prefix, ("", 0, 0))[1]:
            self._anchors[prefix] = (newest.key, newest.mod_revision, hash((newest.value, newest.lease)))

    def told(self, prefix: str, batch: Batch) -> None:
        """A watch told changes."""
        for event in reversed(batch):
            if event.kind == "put":
                self._anchors[prefix] = (event.key, event.mod_revision, hash((event.value, event.lease)))
                return

    async def check(self, prefix: str) -> None:
        """CompactedError where the store does not have any more what it had before the last loss of the connection."""
        losses = self._connection.losses
        if prefix not in self._anchors or self._checked.get(prefix) == losses:
            return
        revision = self._anchors[prefix][1]
        if not await self._stands(prefix, 0) and not await self._stands(prefix, revision):
            raise CompactedError(revision + 1)
        self._checked[prefix] = losses

    async def _stands(self, prefix: str, at: int) -> bool:
        key, revision, content = self._anchors[prefix]
        request = self._connection.messages.RangeRequest(key=self._convert.key(key), revision=at)
        try:
            answer = await self._connection.call(RANGE, request, again=True)
        except CompactedError:
            return False
        except KvstoreError as error:
            if "future revision" in str(error):
                return False
            raise
        return any(kv.mod_revision == revision and hash((kv.value, kv.lease)) == content for kv in answer.kvs)


async def watch(connection: Connection, convert: Convert, prefix: str, start: int) -> AsyncIterator[Batch]:
    """Changes from ``start`` on (0: from now). The first batch is empty and says that the watch stands.

    What etcd tells of several writes in a row, each in an answer of its own, is one batch.
    """
    key, end = convert.span(prefix)
    # not in fragments: etcd cuts a large answer in quadratic time (100,000 deletions in 16 s; whole in 1 s)
    create = connection.messages.WatchCreateRequest(key=key, range_end=end, start_revision=start, progress_notify=True)
    endpoint, call = await connection.follow(WATCH, connection.messages.WatchRequest(create_request=create))
    try:
        found = await _stand(connection, endpoint, call, start)
        yield Batch()
        while True:
            last = next((answer for answer in found if answer.canceled or answer.compact_revision), None)
            told = found if last is None else found[: found.index(last)]
            if told:
                yield convert.batch([event for answer in told for event in answer.events], told[-1].header.revision)
            if last is not None:
                raise await canceled(connection, endpoint, last)
            if not (found := await call.read()):
                raise connection.lost(endpoint, "the stream ended")
    except aio.AioRpcError as error:
        raise await connection.stream_failed(endpoint, error) from error
    finally:
        call.cancel()


async def _stand(connection: Connection, endpoint: Any, call: Follows, start: int) -> list[Any]:
    """Wait until the member says that the watch stands; what it told besides."""
    try:
        async with asyncio.timeout(STAND_TIMEOUT):
            found = await call.read()
    except TimeoutError:
        raise connection.lost(endpoint, "no answer in time") from None
    if not found:
        raise connection.lost(endpoint, "the stream ended")
    answer = found[0]
    if answer.canceled or answer.compact_revision:
        raise await canceled(connection, endpoint, answer)
    if answer.header.revision + 1 < start:
        raise CompactedError(answer.header.revision + 1)
    return found[1:]


async def canceled(connection: Connection, endpoint: Any, answer: Any) -> KvstoreError:
    """What to raise where the server ended a watch."""
    if answer.compact_revision:
        return CompactedError(answer.compact_revision)
    return await connection.refused(endpoint, answer.cancel_reason)
