"""A stream of blocking gRPC with the methods of one of grpc.aio: a thread reads and hands over to the loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from grpc import aio

AHEAD = 64
"""Answers that are read before somebody wants them; then the server has to wait."""
JOIN_TIMEOUT = 5.0


def error_of(error: Any) -> aio.AioRpcError:
    """An error of blocking gRPC as one of grpc.aio."""
    return aio.AioRpcError(error.code(), aio.Metadata(), aio.Metadata(), error.details())


class Stream:
    """``ended`` is called on the loop when it is over."""

    def __init__(self, method: Any, metadata: Any, ended: Callable[[Stream], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: asyncio.Queue[Any] = asyncio.Queue()
        self._room = threading.Semaphore(AHEAD)
        self._cancelled = False
        self._over = asyncio.Event()
        self._error: aio.AioRpcError | None = None
        self._ended = ended
        try:
            self._call = method(self._sent(), metadata=metadata)
        except ValueError as error:
            raise asyncio.InvalidStateError(str(error)) from error
        self._thread = threading.Thread(target=self._read, name="etcd3-stream", daemon=True)
        self._thread.start()

    def _sent(self) -> Iterator[Any]:
        while (request := self._requests.get()) is not None:
            yield request

    def _read(self) -> None:
        error = None
        try:
            for answer in self._call:
                self._room.acquire()
                if self._cancelled:
                    break
                self._hand(self._answers.put_nowait, answer)
        except grpc.RpcError as failure:
            error = error_of(failure)
        finally:
            self._requests.put(None)
            self._hand(self._end, error)

    def _hand(self, function: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(function, value)

    def _end(self, error: aio.AioRpcError | None) -> None:
        self._error = error
        self._over.set()
        self._answers.put_nowait(aio.EOF)
        self._ended(self)

    async def write(self, request: Any) -> None:
        """Send a request; `asyncio.InvalidStateError` where the stream is over."""
        if self._over.is_set():
            raise asyncio.InvalidStateError("the stream is over")
        self._requests.put(request)

    async def read(self) -> Any:
        """The next answer, or ``aio.EOF``; `aio.AioRpcError` where the stream broke."""
        answer = await self._answers.get()
        if answer is not aio.EOF:
            self._room.release()
            return answer
        self._answers.put_nowait(aio.EOF)
        if self._error is not None:
            raise self._error
        return aio.EOF

    def cancel(self) -> None:
        """End it; its thread ends soon after."""
        self._cancelled = True
        self._call.cancel()
        self._requests.put(None)
        self._room.release()

    def join(self) -> None:
        """Wait until its thread has ended; blocks."""
        self._thread.join(JOIN_TIMEOUT)

    async def code(self) -> grpc.StatusCode:
        """How it ended."""
        await self._over.wait()
        code: grpc.StatusCode = grpc.StatusCode.OK if self._error is None else self._error.code()
        return code

    async def details(self) -> str:
        """What the server said at the end."""
        await self._over.wait()
        return "" if self._error is None else self._error.details() or ""

    async def initial_metadata(self) -> aio.Metadata:
        """Nothing that anybody here reads."""
        return aio.Metadata()

    async def trailing_metadata(self) -> aio.Metadata:
        """Nothing that anybody here reads."""
        return aio.Metadata()
