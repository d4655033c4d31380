"""Bytes to frames (RFC 9113, section 4), and frames to the messages of gRPC. Pure: no input, no output."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
LARGEST = 16384
"""Bytes of payload that a frame may have: we ask for no more than the least that everybody has to take."""
_HEAD = struct.Struct(">BHBBI")
_PREFIX = struct.Struct(">BI")


class ProtocolError(Exception):
    """The other side does not speak as the protocol says."""


class Frame(NamedTuple):
    """One frame; stream 0 is the connection itself."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def encode(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame as it goes over the wire."""
    length = len(payload)
    return _HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream) + payload


class Frames:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now. ProtocolError where one is larger than we take."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= _HEAD.size:
            high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
            length = high << 16 | low
            if length > LARGEST:
                raise ProtocolError(f"a frame of {length} bytes, expected at most {LARGEST}")
            after = at + _HEAD.size + length
            if after > end:
                break
            yield Frame(kind, flags, stream & 0x7FFFFFFF, data[at + _HEAD.size : after])
            at = after
        self._rest = data[at:]


def content(frame: Frame) -> bytes:
    """The payload of DATA or HEADERS without padding and priority. ProtocolError where those are longer than it."""
    start, end = 0, len(frame.payload)
    if frame.flags & PADDED:
        if not end:
            raise ProtocolError("a padded frame without the length of its padding")
        start, end = 1, end - frame.payload[0]
    if frame.kind == HEADERS and frame.flags & HAS_PRIORITY:
        start += 5
    if start > end:
        raise ProtocolError("a frame with more padding than content")
    return frame.payload[start:end] if frame.flags & (PADDED | HAS_PRIORITY) else frame.payload


def message(body: bytes) -> bytes:
    """A message as gRPC puts it into DATA."""
    return _PREFIX.pack(0, len(body)) + body


class Messages:
    """Puts the messages of one stream together."""

    def __init__(self) -> None:
        self._parts = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now. ProtocolError where one is compressed: we never said that we can."""
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
                raise ProtocolError("a compressed message, which nobody asked for")
            after = at + _PREFIX.size + length
            if after > len(self._parts):
                break
            found.append(bytes(self._parts[at + _PREFIX.size : after]))
            at = after
        del self._parts[:at]
        return found
