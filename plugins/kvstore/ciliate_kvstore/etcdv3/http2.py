"""One HTTP/2 connection that carries long gRPC streams of small messages to us, as cheaply as Python can read them.

grpc.aio wakes three threads for each message: 250 µs of processor time where etcd tells of one key, and it tells of
each write by itself. Here all streams of a connection are read on the event loop, and what arrives within `WINDOW`
after something was told is read together: h2 needs 8 µs a message then (`docs/dependencies.md`).
The price is time: a change after another one is told up to `WINDOW` later; the first one after a pause at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from urllib.parse import unquote

import hpack
from grpc import StatusCode, aio
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error, StreamClosedError
from h2.settings import SettingCodes, Settings

WINDOW = 0.02
"""Seconds that pass, after messages were read, until more are."""
MUCH = 65536
"""Bytes read at once after which nobody waits: there is more, and time is better used than saved."""
PENDING = 4 << 20
"""Bytes of messages that a stream's reader may leave lying before nothing is read any more."""
KEEPALIVE_TIME, KEEPALIVE_TIMEOUT = 10.0, 3.0
"""Seconds of silence until the other side is asked whether it is there, and those that it has for the answer."""
_OPEN = (1 << 31) - 1
"""The largest window that flow control knows: it is the socket that is not read while readers are behind."""
_FIRST_WINDOW = 65535
_HTTP = {
    400: StatusCode.INTERNAL,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.UNIMPLEMENTED,
    **dict.fromkeys((429, 502, 503, 504), StatusCode.UNAVAILABLE),
}
"""What an answer means that no gRPC server gave."""
_RESET = {
    ErrorCodes.CANCEL: StatusCode.CANCELLED,
    **dict.fromkeys(
        (ErrorCodes.NO_ERROR, ErrorCodes.REFUSED_STREAM, ErrorCodes.ENHANCE_YOUR_CALM), StatusCode.UNAVAILABLE
    ),
}
"""What RST_STREAM means: cancelled; no error, refused, too much asked: another time; anything else is a defect."""
_CODES = {code.value[0]: code for code in StatusCode}
_PREFIX = struct.Struct(">BI")
"""What stands before each message of gRPC: whether it is compressed, and its length."""


def rpc_error(code: StatusCode, text: str) -> aio.AioRpcError:
    """An error as grpc.aio raises it, so that callers need to know one kind."""
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details=text)


class MessageError(Exception):
    """The other side does not speak gRPC as its protocol says."""


def message(body: bytes) -> bytes:
    """A message as gRPC puts it into the data of a stream."""
    return _PREFIX.pack(0, len(body)) + body


class Messages:
    """Puts the messages of one stream together."""

    def __init__(self) -> None:
        self._parts = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now. MessageError where one is compressed: we never said that we can."""
        if not self._parts and len(data) >= _PREFIX.size and data[0] == 0:
            # nearly all: one message in one frame
            length = _PREFIX.unpack_from(data)[1]
            if length == len(data) - _PREFIX.size:
                return [data[_PREFIX.size :]]
        self._parts += data
        found, at = [], 0
        while len(self._parts) - at >= _PREFIX.size:
            compressed, length = _PREFIX.unpack_from(self._parts, at)
            if compressed:
                raise MessageError("a compressed message, which nobody asked for")
            after = at + _PREFIX.size + length
            if after > len(self._parts):
                break
            found.append(bytes(self._parts[at + _PREFIX.size : after]))
            at = after
        del self._parts[:at]
        return found


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
        self._messages = Messages()
        self._found: list[bytes] = []
        self._news = asyncio.Event()
        self._status: tuple[StatusCode, str] | None = None
        self.pending = 0
        """Bytes of whole messages that were not read yet."""

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
        """Take in data; says whether it completed a message."""
        found = self._messages.feed(data)
        if found:
            self._found += found
            # of whole ones only: nobody can read, and so make room for, the part of one
            self.pending += sum(map(len, found))
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
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._h2.local_settings = Settings(
            client=True, initial_values={SettingCodes.ENABLE_PUSH: 0, SettingCodes.INITIAL_WINDOW_SIZE: _OPEN}
        )
        self._streams: dict[int, Stream] = {}
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
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_OPEN - _FIRST_WINDOW)
        self._flush()
        self._beat_in(KEEPALIVE_TIME)

    def data_received(self, data: bytes) -> None:
        """Take in what arrived; where it completed messages, have a rest."""
        self._heard, self._told = self._loop.time(), False
        try:
            for event in self._h2.receive_data(data):
                action = _ACTIONS.get(type(event))
                if action is not None:
                    action(self, event)
        except (H2Error, MessageError) as error:
            self.fail(f"the other side does not speak HTTP/2 with gRPC: {error or type(error).__name__}")
            return
        self._flush()
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

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def stream(
        self, path: str, metadata: Iterable[tuple[str, str]], request: bytes, decode: Callable[[bytes], Any] = bytes
    ) -> Stream:
        """Call a method with one request. AioRpcError where the connection takes none any more."""
        if self.closed:
            raise rpc_error(StatusCode.UNAVAILABLE, "the connection is closed")
        body = message(request)
        head = [(":method", "POST"), (":scheme", self._scheme), (":path", path), (":authority", self._authority)]
        head += [("content-type", "application/grpc"), ("te", "trailers"), ("user-agent", "ciliate")]
        secret = [hpack.NeverIndexedHeaderTuple(name, value) for name, value in metadata]
        try:
            number = self._h2.get_next_available_stream_id()
            self._h2.send_headers(number, [*head, *secret])
            if len(body) > self._h2.local_flow_control_window(number):
                self._h2.reset_stream(number, ErrorCodes.CANCEL)
                self._flush()
                text = f"the other side does not take a request of {len(body)} bytes now"
                raise rpc_error(StatusCode.UNAVAILABLE, text)
            # the stream stays open on our side: etcd ends a watch whose client has nothing more to say
            for at in range(0, len(body), self._h2.max_outbound_frame_size):
                self._h2.send_data(number, body[at : at + self._h2.max_outbound_frame_size])
        except H2Error as error:  # more streams than the other side takes, no numbers left
            raise rpc_error(StatusCode.UNAVAILABLE, f"no stream can be had: {error}") from error
        self._flush()
        stream = self._streams[number] = Stream(self, number, decode)
        return stream

    def cancel(self, number: int) -> None:
        """End a stream that nobody reads any more."""
        if self._streams.pop(number, None) is not None:
            self._h2.reset_stream(number, ErrorCodes.CANCEL)
            self._flush()
            self.taken()
        if self.closed and not self._streams:
            self.fail("not needed any more")

    # what happened

    def _data(self, event: events.DataReceived) -> None:
        self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            self._told |= stream.feed(event.data)

    def _answered(self, event: events.ResponseReceived | events.TrailersReceived) -> None:
        found = {bytes(name): bytes(value).decode(errors="replace") for name, value in event.headers}
        status, answer = found.get(b"grpc-status", ""), found.get(b":status", "200")
        if status:
            code = _CODES.get(int(status), StatusCode.UNKNOWN) if status.isdecimal() else StatusCode.UNKNOWN
            self._end(event.stream_id, code, unquote(found.get(b"grpc-message", "")))
        elif answer != "200":
            code = _HTTP.get(int(answer), StatusCode.UNKNOWN) if answer.isdecimal() else StatusCode.UNKNOWN
            self._end(event.stream_id, code, f"answer {answer} of something that is no gRPC server")

    def _ended(self, event: events.StreamEnded) -> None:
        self._end(event.stream_id, StatusCode.INTERNAL, "the stream ended without a status")
        if self._streams.pop(event.stream_id, None) is not None:
            with contextlib.suppress(StreamClosedError):  # it was reset besides, as servers do that heard enough
                self._h2.end_stream(event.stream_id)

    def _reset(self, event: events.StreamReset) -> None:
        code = event.error_code or ErrorCodes.NO_ERROR
        self._end(event.stream_id, _RESET.get(code, StatusCode.INTERNAL), f"the stream was reset, code {int(code)}")
        self._streams.pop(event.stream_id, None)

    def _end(self, number: int, code: StatusCode, text: str) -> None:
        stream = self._streams.get(number)
        if stream is not None:
            stream.end(code, text)

    def _go_away(self, event: events.ConnectionTerminated) -> None:
        # h2 reads nothing more on it; nothing is lost, a watch goes on elsewhere from what it knows
        said = (event.additional_data or b"").decode(errors="replace")
        self.fail(f"the other side ends the connection, code {int(event.error_code or 0)} {said}".strip())

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
        self._h2.ping(b"ciliate?")
        self._flush()
        self._beat_in(KEEPALIVE_TIMEOUT)


_ACTIONS: dict[type[events.Event], Callable[[Wire, Any], None]] = {
    events.DataReceived: Wire._data,
    events.ResponseReceived: Wire._answered,
    events.TrailersReceived: Wire._answered,
    events.StreamEnded: Wire._ended,
    events.StreamReset: Wire._reset,
    events.ConnectionTerminated: Wire._go_away,
}
"""What each event of h2 does; the others change nothing for us."""
