"""Deletions of single keys: one stream with a watch for each key, so that a node hears of its own keys alone."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from ciliate.kvstore import Event, WatchedKeys
from ciliate_kvstore.etcdv3.connection import Connection
from ciliate_kvstore.etcdv3.convert import Convert
from ciliate_kvstore.etcdv3.leases import stream_error
from ciliate_kvstore.etcdv3.watch import STAND_TIMEOUT, WATCH, canceled


class _Stream:
    """Watches of one stream by number; ``asked`` are those whose number the server has not told yet, in order."""

    def __init__(self, connection: Connection, convert: Convert, keys: WatchedKeys, call: Any) -> None:
        self.asked: deque[tuple[str, int]] = deque()
        self._messages = connection.messages
        self._convert = convert
        self._keys = keys
        self._call = call
        self._numbers: dict[int, str] = {}
        self._watched: set[str] = set()
        self._begun: dict[int, int] = {}
        """The revision after which a watch tells everything, by its number."""

    async def follow(self) -> None:
        """Ask for what is new, and no longer for what went."""
        self._keys.changed.clear()
        wanted = dict(self._keys.keys)
        for number, key in list(self._numbers.items()):
            # a watch that began later than its key was written may have missed that it went
            if key not in wanted or 0 < wanted[key] < self._begun[number]:
                await self._drop(number)
        for key in wanted.keys() - self._watched:
            start = wanted[key] + 1 if wanted[key] else 0
            create = self._messages.WatchCreateRequest(
                key=self._convert.key(key),
                start_revision=start,
                filters=[0],  # no puts
            )
            self.asked.append((key, start))
            self._watched.add(key)
            await self._call.write(self._messages.WatchRequest(create_request=create))

    async def _drop(self, number: int) -> None:
        self._watched.discard(self._numbers.pop(number))
        del self._begun[number]
        cancel = self._messages.WatchCancelRequest(watch_id=number)
        await self._call.write(self._messages.WatchRequest(cancel_request=cancel))

    def take(self, answer: Any) -> list[Event]:
        """Deletions of an answer that are still wanted."""
        if answer.created:
            key, start = self.asked.popleft()
            self._numbers[answer.watch_id] = key
            self._begun[answer.watch_id] = start - 1 if start else answer.header.revision
            if key not in self._keys.keys or 0 < self._keys.keys[key] < self._begun[answer.watch_id]:
                self._keys.changed.set()  # it went meanwhile, or was written before
        found = self._convert.batch(answer.events, answer.header.revision)
        return [event for event in found if event.kind == "delete" and event.key in self._keys.keys]

    def ended(self, answer: Any) -> bool:
        """Whether the server ended a watch that we want."""
        return bool(answer.canceled) and (answer.created or answer.watch_id in self._numbers)


async def watch_keys(connection: Connection, convert: Convert, keys: WatchedKeys) -> AsyncIterator[list[Event]]:
    """Deletions of ``keys``; the first list is empty and says that all there were are watched."""
    endpoint, call = await connection.stream(WATCH)
    stream = _Stream(connection, convert, keys, call)
    reader: asyncio.Task[Any] | None = None
    changed: asyncio.Task[Any] | None = None
    stands = False
    try:
        while True:
            async with asyncio.timeout(STAND_TIMEOUT):
                await stream.follow()
            if not stands and not stream.asked:
                stands = True
                yield []
            # a read is never given up: that would end the stream
            reader = reader or asyncio.ensure_future(call.read())
            changed = changed or asyncio.ensure_future(keys.changed.wait())
            limit = STAND_TIMEOUT if stream.asked else None
            done, _ = await asyncio.wait((reader, changed), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError
            if changed in done:
                changed = None
            if reader in done:
                answer, reader = reader.result(), None
                if answer is aio.EOF:
                    raise await stream_error(connection, endpoint, call)
                if stream.ended(answer):
                    raise await canceled(connection, endpoint, answer)
                if gone := stream.take(answer):
                    yield gone
    except TimeoutError:
        raise connection.lost(endpoint, "no answer in time") from None
    except aio.AioRpcError as error:
        raise await connection.stream_failed(endpoint, error) from error
    except asyncio.InvalidStateError as error:
        raise await stream_error(connection, endpoint, call) from error
    finally:
        call.cancel()
        left = [task for task in (reader, changed) if task is not None]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
