"""Streams over HTTP/2, judged by the server of grpcio; and by hand where a server does what it should not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
import hpack
import pytest
from grpc import StatusCode, aio
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from hyperframe import frame as raw
from hypothesis import given
from hypothesis import strategies as st

from ciliate_kvstore.etcdv3 import http2
from ciliate_kvstore.etcdv3.http2 import Messages, Stream, Wire, message

from .etcd_harness import until

PATH = "/test.Service/Method"
Handler = Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]


def in_pieces(data: bytes, sizes: Iterable[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(st.lists(st.binary(max_size=60)), st.lists(st.integers(0, 40)))
def test_messages_come_out_as_they_went_in(bodies: list[bytes], sizes: list[int]) -> None:
    data, reader = b"".join(map(message, bodies)), Messages()
    assert [body for piece in in_pieces(data, sizes) for body in reader.feed(piece)] == bodies


def test_what_was_not_asked_for_is_refused() -> None:
    with pytest.raises(http2.MessageError, match="compressed"):
        Messages().feed(b"\1\0\0\0\1x")


# against grpcio


@contextlib.asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[Wire]:
    """A connection to a server of grpcio, whose method is ``handler``."""
    method = grpc.stream_stream_rpc_method_handler(handler)
    server = aio.server(options=[("grpc.max_send_message_length", -1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Method": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connected(port) as wire:
            yield wire
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Wire]:
    loop = asyncio.get_running_loop()
    _, wire = await loop.create_connection(lambda: Wire(f"127.0.0.1:{port}", "http"), "127.0.0.1", port)
    try:
        yield wire
    finally:
        wire.fail("the test is over")


async def everything(stream: Stream) -> list[bytes]:
    found: list[bytes] = []
    async with asyncio.timeout(20):
        while some := await stream.read():
            found += some
    return found


async def test_messages_of_every_size_arrive_in_order() -> None:
    sizes = [0, 1, 5, 16378, 16379, 16380, 100_000, 0, 3_000_000, 7]
    sent = [bytes([number]) * size for number, size in enumerate(sizes)]

    async def handler(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        assert [item async for item in _first(requests)] == [b"please"]
        yield dict(context.invocation_metadata())["token"].encode()
        for body in sent:
            yield body

    async with served(handler) as wire:
        stream = wire.stream(PATH, [("token", "secret" * 50)], b"please")
        assert await everything(stream) == [b"secret" * 50, *sent]


async def _first(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for item in requests:
        yield item
        return


async def test_an_error_comes_after_what_was_sent_before_it() -> None:
    async def handler(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"
        await context.abort(StatusCode.UNAVAILABLE, "no leader: 100 % für heute")

    async with served(handler) as wire:
        stream, found = wire.stream(PATH, [], b""), []
        with pytest.raises(aio.AioRpcError) as caught:
            while True:
                found += await stream.read()
        assert found == [b"one", b"two"]
        assert caught.value.code() is StatusCode.UNAVAILABLE
        assert caught.value.details() == "no leader: 100 % für heute"
        with pytest.raises(aio.AioRpcError) as caught:
            await wire.stream("/test.Service/Unknown", [], b"").read()
        assert caught.value.code() is StatusCode.UNIMPLEMENTED


async def test_many_small_messages_are_read_together() -> None:
    async def handler(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        for number in range(2000):
            yield str(number).encode()

    async with served(handler) as wire:
        stream, reads = wire.stream(PATH, [], b""), []
        while some := await stream.read():
            reads.append(some)
        assert [int(body) for some in reads for body in some] == list(range(2000))
        assert len(reads) < 1000


async def test_a_reader_that_is_behind_makes_the_server_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "PENDING", 200_000)

    async def handler(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        for _ in range(200):
            yield bytes(65536)

    async with served(handler) as wire:
        slow, quick = wire.stream(PATH, [], b""), wire.stream(PATH, [], b"")
        await until(lambda: slow.pending > 200_000 or quick.pending > 200_000)
        quick.cancel()  # who goes keeps nobody waiting
        total, most = 0, 0
        while True:
            most = max(most, slow.pending)
            if not (some := await slow.read()):
                break
            total += sum(map(len, some))
        assert total == 200 * 65536
        assert most < 1_000_000


async def test_who_cancels_is_heard() -> None:
    gone = asyncio.Event()

    async def handler(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"begun"
            await asyncio.Event().wait()
        finally:
            gone.set()

    async with served(handler) as wire:
        stream = wire.stream(PATH, [], b"")
        assert await stream.read() == [b"begun"]
        stream.cancel()
        async with asyncio.timeout(10):
            await gone.wait()
        with pytest.raises(aio.AioRpcError, match="cancelled here"):
            await stream.read()


# against a server that is made by hand


@contextlib.asynccontextmanager
async def by_hand(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Wire]:
    over = asyncio.Event()

    async def serve_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await serve(reader, writer)
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        over.set()

    server = await asyncio.start_server(serve_and_close, "127.0.0.1", 0)
    async with server, asyncio.timeout(20):
        async with connected(server.sockets[0].getsockname()[1]) as wire:
            yield wire
        await over.wait()


def headers(*pairs: tuple[str, str], flags: Iterable[str] = ("END_HEADERS", "END_STREAM"), stream: int = 1) -> bytes:
    return raw.HeadersFrame(stream, data=hpack.Encoder().encode(pairs), flags=flags).serialize()


SETTINGS = raw.SettingsFrame(0).serialize()
OK = headers((":status", "200"), flags=["END_HEADERS"])
TRAILER = hpack.Encoder().encode([("grpc-status", "5"), ("grpc-message", "not%20here")])


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        (headers((":status", "503")), StatusCode.UNAVAILABLE, "answer 503"),
        (headers((":status", "200")), StatusCode.INTERNAL, "without a status"),
        (OK + raw.DataFrame(1, flags=["END_STREAM"]).serialize(), StatusCode.INTERNAL, "without a status"),
        (raw.RstStreamFrame(1, 7).serialize(), StatusCode.UNAVAILABLE, "reset, code 7"),
        (raw.RstStreamFrame(1, 1).serialize(), StatusCode.INTERNAL, "reset, code 1"),
        (raw.GoAwayFrame(0, additional_data=b"bye").serialize(), StatusCode.UNAVAILABLE, "code 0 bye"),
        (b"", StatusCode.UNAVAILABLE, "connection lost"),
        (headers((":status", "200"), ("grpc-status", "999")), StatusCode.UNKNOWN, ""),
        (OK + raw.DataFrame(1, data=b"\1\0\0\0\1x").serialize(), StatusCode.UNAVAILABLE, "a compressed message"),
        (
            OK
            + raw.HeadersFrame(1, data=TRAILER[:3], flags=["END_STREAM"]).serialize()
            + raw.ContinuationFrame(1, data=TRAILER[3:], flags=["END_HEADERS"]).serialize(),
            StatusCode.NOT_FOUND,
            "not here",
        ),
        (raw.ContinuationFrame(1, data=b"x").serialize(), StatusCode.UNAVAILABLE, "does not speak HTTP/2"),
    ],
)
async def test_how_a_stream_ends(answer: bytes, code: StatusCode, text: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"please")
        writer.write(SETTINGS + answer)
        if not answer:
            writer.close()

    async with by_hand(serve) as wire:
        with pytest.raises(aio.AioRpcError) as caught:
            await wire.stream(PATH, [], b"please").read()
        assert (caught.value.code(), text in (caught.value.details() or "")) == (code, True), caught.value.details()


async def test_pings_are_answered_and_silence_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "KEEPALIVE_TIME", 0.05)
    monkeypatch.setattr(http2, "KEEPALIVE_TIMEOUT", 0.2)
    answered, asked = asyncio.Event(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        here = H2Connection(H2Configuration(client_side=False))
        here.initiate_connection()
        here.ping(b"01234567")
        while data := await reader.read(4096):
            for event in here.receive_data(data):
                if isinstance(event, events.PingAckReceived):
                    assert event.ping_data == b"01234567"
                    answered.set()
                elif isinstance(event, events.PingReceived):
                    asked += 1
            if asked < 3:
                writer.write(here.data_to_send())

    async with by_hand(serve) as wire, asyncio.timeout(10):
        with pytest.raises(aio.AioRpcError, match="no answer to a ping"):
            await wire.stream(PATH, [], b"please").read()
        assert answered.is_set() and asked == 3
        assert wire.closed
        with pytest.raises(aio.AioRpcError, match="closed"):
            wire.stream(PATH, [], b"please")


async def test_a_request_that_the_other_side_has_no_room_for_is_refused() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"please")
        writer.write(raw.SettingsFrame(0, settings={4: 10}).serialize() + OK)
        writer.write(raw.DataFrame(1, data=message(b"ready")).serialize())

    async with by_hand(serve) as wire, asyncio.timeout(10):
        assert await wire.stream(PATH, [], b"please").read() == [b"ready"]
        with pytest.raises(aio.AioRpcError, match="does not take a request of 25 bytes"):
            wire.stream(PATH, [], bytes(20))


async def test_the_part_of_a_large_message_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "PENDING", 10_000)
    large = message(bytes(30_000))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"please")
        writer.write(SETTINGS + OK + headers((":status", "200"), flags=["END_HEADERS"], stream=3))
        writer.write(raw.DataFrame(1, data=large[:15_000]).serialize())
        writer.write(raw.DataFrame(3, data=message(b"small")).serialize())
        await writer.drain()
        await reader.readuntil(b"go on")
        writer.write(raw.DataFrame(1, data=large[15_000:30_000]).serialize())
        writer.write(raw.DataFrame(1, data=large[30_000:]).serialize())

    async with by_hand(serve) as wire, asyncio.timeout(10):
        slow, quick = wire.stream(PATH, [], b""), wire.stream(PATH, [], b"please")
        assert await quick.read() == [b"small"]
        wire.stream(PATH, [], b"go on")
        assert await slow.read() == [bytes(30_000)]
