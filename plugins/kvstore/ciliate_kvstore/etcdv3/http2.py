"""One HTTP/2 connection that carries long gRPC streams of small messages to us, as cheaply as Python can read them.

grpc.aio wakes three threads for each message: 250 µs of processor time where etcd tells of one key, and it tells of
each write by itself. Here all streams of a connection are read on the event loop, and what arrives within `WINDOW`
after something was told is read together: four messages for less than grpc.aio needs for one (`docs/cluster.md`).
The price is time: a change after another one is told up to `WINDOW` later; the first one after a pause at once.

What a client of etcd does not need is not here: requests of more than one frame, pushes, priorities.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from urllib.parse import unquote

import hpack
from grpc import StatusCode, aio

from ciliate_kvstore.etcdv3 import frames
from ciliate_kvstore.etcdv3.frames import Frame, ProtocolError

WINDOW = 0.02
"""Seconds that pass, after messages were read, until more are."""
MUCH = 65536
"""Bytes read at once after which nobody waits: there is more, and time is better used than saved."""
PENDING = 4 << 20
"""Bytes that a stream's reader may leave lying before nothing is read any more."""
KEEPALIVE_TIME, KEEPALIVE_TIMEOUT = 10.0, 3.0
"""Seconds of silence until the other side is asked whether it is there, and those that it has for the answer."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_OPEN = (1 << 31) - 1
"""The largest window that flow control knows: it is the socket that is not read while readers are behind."""
_CREDIT = 1 << 24
"""Bytes after which the window is opened again."""
_FIRST_WINDOW = 65535
_ENABLE_PUSH, _INITIAL_WINDOW = 2, 4
_CANCEL = 8
_HTTP = {
    400: StatusCode.INTERNAL,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.UNIMPLEMENTED,
    **dict.fromkeys((429, 502, 503, 504), StatusCode.UNAVAILABLE),
}
"""What an answer means that no gRPC server gave."""
_RESET = {_CANCEL: StatusCode.CANCELLED, **dict.fromkeys((0, 7, 11), StatusCode.UNAVAILABLE)}
"""What RST_STREAM means: cancelled; no error, refused, too much asked: another time; anything else is a defect."""
_CODES = {code.value[0]: code for code in StatusCode}


def rpc_error(code: StatusCode, text: str) -> aio.AioRpcError:
    """An error as grpc.aio raises it, so that callers need to know one kind."""
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details=text)


class Follows(Protocol):
    """A stream of answers, read by whoever asked for it."""

    async def read(self) -> list[Any]:
        """Every answer that came since the last call, in order, at least one; none where the stream ended well.

        AioRpcError where it ended otherwise, after all answers were read.
        """

    def cancel(self) -> None:
        """Have no more of it."""


class Stream:
    """One call: a request went, messages come until a status does."""

    def __init__(self, wire: Wire, number: int, decode: Callable[[bytes], Any]) -> None:
        self._wire = wire
        self._number = number
        self._decode = decode
        self._messages = frames.Messages()
        self._found: list[bytes] = []
        self._news = asyncio.Event()
        self._status: tuple[StatusCode, str] | None = None
        self.pending = 0
        """Bytes that were received and not yet read."""
        self.credit = 0
        """Bytes that were received since the window was opened last."""

    async def read(self) -> list[Any]:
        """As `Follows` says."""
        while not self._found:
            if self._status is not None:
                if self._status[0] is StatusCode.OK:
                    return []
                raise rpc_error(*self._status)
            self._news.clear()
            await self._news.wait()
        found, self._found, self.pending = self._found, [], 0
        self._wire.taken()
        return [self._decode(body) for body in found]

    def cancel(self) -> None:
        """Have no more of it."""
        self.end(StatusCode.CANCELLED, "cancelled here")
        self._wire.cancel(self._number)

    def feed(self, data: bytes) -> bool:
        """Take in content of DATA; says whether it completed a message."""
        found = self._messages.feed(data)
        self.pending += len(data)
        if found:
            self._found += found
            self._news.set()
        return bool(found)

    def end(self, code: StatusCode, text: str) -> None:
        """Nothing more will come; the first reason counts."""
        if self._status is None:
            self._status = (code, text)
            self._news.set()


class Wire(asyncio.Protocol):
    """The connection. ``closed`` once it takes no more streams."""

    def __init__(self, authority: str, scheme: str, window: float = WINDOW) -> None:
        self.closed = False
        self._authority, self._scheme, self._window = authority, scheme, window
        self._loop = asyncio.get_running_loop()
        self._frames = frames.Frames()
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._streams: dict[int, Stream] = {}
        self._next = 1
        self._may_send, self._may_send_each = _FIRST_WINDOW, _FIRST_WINDOW
        self._credit = 0
        self._headers: Frame | None = None
        self._told = False
        self._resting: asyncio.TimerHandle | None = None
        self._paused = False
        self._heard = self._loop.time()
        self._asked = 0.0
        self._beating: asyncio.TimerHandle | None = None

    # the transport's side

    def connection_made(self, transport: Any) -> None:
        """Say who we are and how much we take."""
        self._transport: asyncio.Transport = transport
        settings = struct.pack(">HIHI", _ENABLE_PUSH, 0, _INITIAL_WINDOW, _OPEN)
        self._send(frames.SETTINGS, 0, 0, settings, before=_PREFACE)
        self._open_window(0, _OPEN - _FIRST_WINDOW)
        self._beat_in(KEEPALIVE_TIME)

    def data_received(self, data: bytes) -> None:
        """Take in what arrived; where it completed messages, have a rest."""
        self._heard, self._told = self._loop.time(), False
        try:
            for frame in self._frames.feed(data):
                self._take(frame)
        except (ProtocolError, hpack.HPACKError, struct.error) as error:
            self.fail(f"the other side does not speak HTTP/2 with gRPC: {error}")
            return
        if self._told and self._resting is None and (len(data) < MUCH or self._behind()):
            self._pause()
            self._resting = self._loop.call_later(self._window, self._rested)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of every stream."""
        self.fail(f"connection lost: {exc or 'closed by the other side'}")

    def fail(self, reason: str) -> None:
        """End the connection, and every stream with this reason."""
        self.closed = True
        for timer in (self._resting, self._beating):
            if timer is not None:
                timer.cancel()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(StatusCode.UNAVAILABLE, reason)
        self._transport.abort()

    def retire(self) -> bool:
        """Take no more streams, and end with the last one; says whether there is one."""
        self.closed = True
        if not self._streams:
            self.fail("not needed any more")
        return bool(self._streams)

    # reading in turns

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _rested(self) -> None:
        self._resting = None
        self.taken()

    def taken(self) -> None:
        """A reader took what there was: read on, unless it is too early or another one is behind."""
        if self._paused and self._resting is None and not self._behind():
            self._paused = False
            self._heard = self._loop.time()
            self._transport.resume_reading()

    def _behind(self) -> bool:
        return any(stream.pending > PENDING for stream in self._streams.values())

    # writing

    def _send(self, kind: int, flags: int, stream: int, payload: bytes = b"", before: bytes = b"") -> None:
        if not self._transport.is_closing():
            self._transport.write(before + frames.encode(kind, flags, stream, payload))

    def _open_window(self, stream: int, size: int) -> None:
        self._send(frames.WINDOW_UPDATE, 0, stream, struct.pack(">I", size))

    def stream(
        self, path: str, metadata: Iterable[tuple[str, str]], request: bytes, decode: Callable[[bytes], Any] = bytes
    ) -> Stream:
        """Call a method with one request. AioRpcError where the connection takes none any more."""
        body = frames.message(request)
        if self.closed:
            raise rpc_error(StatusCode.UNAVAILABLE, "the connection is closed")
        if len(body) > min(self._may_send, self._may_send_each, frames.LARGEST):
            raise rpc_error(StatusCode.UNAVAILABLE, f"the other side does not take a request of {len(body)} bytes now")
        number, self._next = self._next, self._next + 2
        self._may_send -= len(body)
        stream = self._streams[number] = Stream(self, number, decode)
        head = [(":method", "POST"), (":scheme", self._scheme), (":path", path), (":authority", self._authority)]
        head += [("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "ciliate")]
        secret = [hpack.NeverIndexedHeaderTuple(name, value) for name, value in metadata]
        self._send(frames.HEADERS, frames.END_HEADERS, number, self._encoder.encode([*head, *secret]))
        # the stream stays open on our side: etcd ends a watch whose client has nothing more to say
        self._send(frames.DATA, 0, number, body)
        return stream

    def cancel(self, number: int) -> None:
        """End a stream that nobody reads any more."""
        if self._streams.pop(number, None) is not None:
            self._send(frames.RST_STREAM, 0, number, struct.pack(">I", _CANCEL))
            self.taken()
        if self.closed and not self._streams:
            self.fail("not needed any more")

    # frames

    def _take(self, frame: Frame) -> None:
        if self._headers is not None and frame.kind != frames.CONTINUATION:
            raise ProtocolError("headers that are not continued")
        action = _ACTIONS.get(frame.kind)
        if action is not None:
            action(self, frame)

    def _data(self, frame: Frame) -> None:
        stream, size = self._streams.get(frame.stream), len(frame.payload)
        self._credit += size
        if self._credit >= _CREDIT:
            self._open_window(0, self._credit)
            self._credit = 0
        if stream is None:
            return  # what was on its way when it was cancelled
        stream.credit += size
        if stream.credit >= _CREDIT:
            self._open_window(frame.stream, stream.credit)
            stream.credit = 0
        self._told |= stream.feed(frames.content(frame))
        if frame.flags & frames.END_STREAM:
            self._end(frame.stream, StatusCode.INTERNAL, "the stream ended without a status")

    def _begin_headers(self, frame: Frame) -> None:
        self._headers = frame._replace(payload=frames.content(frame))
        if frame.flags & frames.END_HEADERS:
            self._end_headers()

    def _continue_headers(self, frame: Frame) -> None:
        begun = self._headers
        if begun is None or begun.stream != frame.stream:
            raise ProtocolError("a continuation of headers that did not begin")
        self._headers = begun._replace(payload=begun.payload + frame.payload)
        if len(self._headers.payload) > 4 * frames.LARGEST:
            raise ProtocolError(f"headers of more than {4 * frames.LARGEST} bytes")
        if frame.flags & frames.END_HEADERS:
            self._end_headers()

    def _end_headers(self) -> None:
        frame, self._headers = self._headers, None
        assert frame is not None
        # also those of streams that are gone: the decoder remembers what it saw
        found: dict[str, str] = {str(name): str(value) for name, value in self._decoder.decode(frame.payload)}
        status = found.get("grpc-status", "")
        if status:
            code = _CODES.get(int(status), StatusCode.UNKNOWN) if status.isdigit() else StatusCode.UNKNOWN
            self._end(frame.stream, code, unquote(found.get("grpc-message", "")))
        elif found.get(":status", "200") != "200":
            answer = found[":status"]
            code = _HTTP.get(int(answer), StatusCode.UNKNOWN) if answer.isdigit() else StatusCode.UNKNOWN
            self._end(frame.stream, code, f"answer {answer} of something that is no gRPC server")
        elif frame.flags & frames.END_STREAM:
            self._end(frame.stream, StatusCode.INTERNAL, "the stream ended without a status")

    def _end(self, number: int, code: StatusCode, text: str) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            stream.end(code, text)

    def _reset(self, frame: Frame) -> None:
        (code,) = struct.unpack(">I", frame.payload)
        self._end(frame.stream, _RESET.get(code, StatusCode.INTERNAL), f"the stream was reset, code {code}")

    def _settings(self, frame: Frame) -> None:
        if frame.flags & frames.ACK:
            return
        for name, value in struct.iter_unpack(">HI", frame.payload):
            if name == _INITIAL_WINDOW:
                self._may_send_each = value
        self._send(frames.SETTINGS, frames.ACK, 0)

    def _ping(self, frame: Frame) -> None:
        if not frame.flags & frames.ACK:
            self._send(frames.PING, frames.ACK, 0, frame.payload)

    def _go_away(self, frame: Frame) -> None:
        last, code = struct.unpack_from(">II", frame.payload)
        self.closed = True
        reason = f"the other side ends the connection, code {code} {frame.payload[8:].decode(errors='replace')}".strip()
        for number in [number for number in self._streams if number > last]:
            self._end(number, StatusCode.UNAVAILABLE, reason)

    def _window_update(self, frame: Frame) -> None:
        (size,) = struct.unpack(">I", frame.payload)
        if not frame.stream:
            self._may_send += size

    # keeping alive

    def _beat_in(self, seconds: float) -> None:
        self._beating = self._loop.call_later(seconds, self._beat)

    def _beat(self) -> None:
        """Ask after silence, and give up where not even that is answered. What waits in the socket is no silence."""
        now = self._loop.time()
        if self._paused or not self._streams:
            self._heard = now
        if self._asked > self._heard:
            self.fail("no answer to a ping in time")
            return
        silence = now - self._heard
        if silence < KEEPALIVE_TIME:
            self._beat_in(KEEPALIVE_TIME - silence)
            return
        self._asked = now
        self._send(frames.PING, 0, 0, b"ciliate?")
        self._beat_in(KEEPALIVE_TIMEOUT)


_ACTIONS = {
    frames.DATA: Wire._data,
    frames.HEADERS: Wire._begin_headers,
    frames.CONTINUATION: Wire._continue_headers,
    frames.RST_STREAM: Wire._reset,
    frames.SETTINGS: Wire._settings,
    frames.PING: Wire._ping,
    frames.GOAWAY: Wire._go_away,
    frames.WINDOW_UPDATE: Wire._window_update,
}
"""Who takes which frame; others are passed over, as the protocol asks."""
