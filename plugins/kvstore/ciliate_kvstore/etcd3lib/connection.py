"""The library's clients as the way to the members of a cluster.

Taken from the library are its channels, stubs and messages. Not used is what loses something there:

- its watcher: a watch that the server cancels ends without a word;
- its fail-over: a member that failed once is not used for 300 s, by the wall clock;
- its log-in: the token is never renewed;
- its exceptions: they do not say what the server said.

So each member has a client of its own, and what to do after an error is decided where provider `etcd` decides it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Any

import etcd3
import grpc
from etcd3 import etcdrpc
from grpc import aio

from ciliate_kvstore.etcd3lib.stream import Stream, error_of
from ciliate_kvstore.etcdv3.connection import Connection
from ciliate_kvstore.etcdv3.http2 import Follows
from ciliate_kvstore.etcdv3.leases import stream_error
from ciliate_kvstore.etcdv3.settings import Endpoint, Settings

_STUBS: dict[str, Callable[[Any], Any]] = {
    "KV": lambda client: client.kvstub,
    "Lease": lambda client: client.leasestub,
    "Maintenance": lambda client: client.maintenancestub,
    "Auth": lambda client: client.authstub,
    "Watch": lambda client: etcdrpc.WatchStub(client.channel),
}
_STREAMS = ("Watch", "LeaseKeepAlive")


class Etcd3Connection(Connection):
    """As its base, with the library's client for each member."""

    messages = etcdrpc

    def __init__(self, settings: Settings, renew: Callable[[], Settings] | None = None) -> None:
        super().__init__(settings, renew)
        self._streams: set[Stream] = set()

    def _open(self, endpoint: Endpoint) -> Any:
        credentials, options = self._credentials(endpoint)
        host, _, port = endpoint.target.rpartition(":")
        # never "failed": that is counted by a clock that may jump, and decided here
        member = etcd3.Endpoint(host, port, endpoint.tls, credentials, time_retry=-math.inf, opts=options)
        return etcd3.MultiEndpointEtcd3Client([member], timeout=self.settings.timeout)

    def _method(self, endpoint: Endpoint, path: str) -> Any:
        key = (endpoint, path)
        if key not in self._methods or self._closed:
            service, name = path.removeprefix("/etcdserverpb.").split("/")
            method = getattr(_STUBS[service](self._channel(endpoint)), name)
            make = self._stream if name in _STREAMS else _answer
            self._methods[key] = lambda *arguments, **options: make(method, *arguments, **options)
        return self._methods[key]

    def _stream(self, method: Any, metadata: Any) -> Stream:
        stream = Stream(method, metadata, self._streams.discard)
        self._streams.add(stream)
        return stream

    async def follow(self, path: str, request: Any) -> tuple[Endpoint, Follows]:
        """Open a stream that answers one request for long; KvstoreError where the member is not reached."""
        endpoint, call = await self.stream(path)
        try:
            await call.write(request)
        except asyncio.InvalidStateError as error:
            raise await stream_error(self, endpoint, call) from error
        return endpoint, _OneByOne(call)

    async def close(self) -> None:
        """End every call; every thread is over then."""
        self._closed = True
        self._retire()
        streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        for client in self._retired:
            await asyncio.to_thread(client.close)
        self._retired.clear()
        for stream in streams:
            await asyncio.to_thread(stream.join)


class _OneByOne:
    """A stream of the library as others read theirs."""

    def __init__(self, call: Stream) -> None:
        self._call = call
        self.cancel = call.cancel

    async def read(self) -> list[Any]:
        """The next answer; nothing at the end."""
        answer = await self._call.read()
        return [] if answer is aio.EOF else [answer]


async def _answer(method: Any, request: Any, *, timeout: float, metadata: Any) -> Any:
    """One call, without a thread that waits for it; `aio.AioRpcError` as grpc.aio raises it."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def tell(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(done.set)

    try:
        call = method.future(request, timeout=timeout, metadata=metadata)
    except ValueError as error:
        raise asyncio.InvalidStateError(str(error)) from error
    call.add_done_callback(tell)
    try:
        await done.wait()
    except asyncio.CancelledError:
        call.cancel()
        raise
    try:
        return call.result()
    except grpc.FutureCancelledError:
        raise aio.AioRpcError(grpc.StatusCode.CANCELLED, aio.Metadata(), aio.Metadata(), "cancelled") from None
    except grpc.RpcError as error:
        raise error_of(error) from error
