"""Hears from the kernel when something of an endpoint's device goes, so that it can be put back at once.

A filter that somebody deletes leaves a pod without protection until it is back, so nobody waits for a timer here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterator

_LINK, _NEIGHBOUR, _TC, _ADDRESS4, _ROUTE4, _ADDRESS6, _ROUTE6 = 1 << 0, 1 << 2, 1 << 3, 1 << 4, 1 << 6, 1 << 8, 1 << 10
GROUPS = _LINK | _NEIGHBOUR | _TC | _ADDRESS4 | _ROUTE4 | _ADDRESS6 | _ROUTE6
NEWLINK, DELLINK, NEWADDR, DELADDR, NEWROUTE, DELROUTE = 16, 17, 20, 21, 24, 25
DELNEIGH, DELQDISC, DELTFILTER = 29, 37, 45
_HEADER = struct.Struct("=IHHII")
_INDEX = struct.Struct("=4xi")
_FLAGS = struct.Struct("=8xI")
_ATTRIBUTE = struct.Struct("=HH")
_LOSSES = (DELLINK, DELROUTE, DELNEIGH, DELQDISC, DELTFILTER, NEWADDR, DELADDR)
_ATTACH_FILTER = 26
_LOAD_HALF, _LOAD_BYTE, _EQUAL, _ANY_SET, _RETURN = 0x28, 0x30, 0x15, 0x45, 0x06
_UP, _RTA_OIF, _RTMSG, _ROUTE_TYPE = 1, 4, 12, 7
_LOCAL, _ANYCAST = 2, 4
_OF_THE_NODE = (NEWADDR, DELADDR, DELQDISC, DELTFILTER)
BUFFER = 1 << 20


class LossWatch:
    """Calls ``notify`` when a device among ``known`` (interface indexes) loses something. Lives on the event loop.

    Of the devices among ``filtered`` only filters and addresses count, new ones too: neighbours and routes come and go
    on the node's own ones. ``moved`` is called when any address or local route of this namespace comes or goes.
    """

    def __init__(
        self,
        known: Collection[int],
        notify: Callable[[], None],
        filtered: Collection[int] = frozenset(),
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._known = known
        self._filtered = filtered
        self._notify = notify
        self._moved = moved
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Listen in this process's network namespace; OSError where the kernel refuses."""
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            _pass_losses_only(listener)
            listener.bind((0, GROUPS))
        except OSError:
            listener.close()
            raise
        self._socket = listener
        asyncio.get_running_loop().add_reader(listener, self._read, listener)

    def stop(self) -> None:
        """Listen no more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _read(self, listener: socket.socket) -> None:
        lost = moved = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data = listener.recv(65536)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    lost = moved = True  # messages were dropped: anything may be gone
                    continue
                lost = lost or any(self._concerns(index, filters) for index, filters in losers(data))
                moved = moved or moves(data)
        if lost:
            self._notify()
        if moved:
            self._moved()

    def _concerns(self, index: int, filters: bool) -> bool:
        return index in self._known or (filters and index in self._filtered)


def _pass_losses_only(listener: socket.socket) -> None:
    """Let the kernel sort out what is no loss: connecting a container makes ten messages that tell of none.

    New routes pass where they are local ones. A classic filter over the header. It reads numbers in network order,
    which the kernel does not write here.
    """
    end = len(_LOSSES) + 8
    steps = [_step(_LOAD_HALF, 4)]
    steps += [_step(_EQUAL, socket.htons(kind), end - place, 0) for place, kind in enumerate(_LOSSES, 1)]
    steps += [
        _step(_EQUAL, socket.htons(NEWLINK), 4, 0),
        _step(_EQUAL, socket.htons(NEWROUTE), 0, 5),
        _step(_LOAD_BYTE, _HEADER.size + _ROUTE_TYPE),
        _step(_EQUAL, _LOCAL, 4, 0),
        _step(_EQUAL, _ANYCAST, 3, 2),
        _step(_LOAD_BYTE, _HEADER.size + 8 + (0 if sys.byteorder == "little" else 3)),
        _step(_ANY_SET, _UP, 0, 1),
        _step(_RETURN, 0),
        _step(_RETURN, 0xFFFFFFFF),
    ]
    program = ctypes.create_string_buffer(b"".join(steps))
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("@HP", len(steps), ctypes.addressof(program)))


def _step(code: int, value: int, jump: int = 0, other: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump, other, value)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and body of each message."""
    place = 0
    while place + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, place)[:2]
        if length < _HEADER.size:
            return
        yield kind, data[place + _HEADER.size : place + length]
        place += (length + 3) & ~3


def losers(data: bytes) -> Iterator[tuple[int, bool]]:
    """The interface index of each thing that the messages say has gone, and whether it is a filter or an address.

    A device that went down counts too, and an address that came.
    """
    for kind, body in _messages(data):
        if kind == DELROUTE:
            yield _route_device(body), False
        elif kind in _OF_THE_NODE:
            yield _INDEX.unpack_from(body)[0], True
        elif kind in (DELLINK, DELNEIGH) or (kind == NEWLINK and _is_down(body)):
            yield _INDEX.unpack_from(body)[0], False


def moves(data: bytes) -> bool:
    """Whether the messages say that an address, or a route by which the node delivers to itself, came or went."""
    return any(
        kind in (NEWADDR, DELADDR) or (kind in (NEWROUTE, DELROUTE) and body[_ROUTE_TYPE] in (_LOCAL, _ANYCAST))
        for kind, body in _messages(data)
    )


def _is_down(body: bytes) -> bool:
    return not _FLAGS.unpack_from(body)[0] & _UP


def _route_device(body: bytes) -> int:
    place = _RTMSG
    while place + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, place)
        if length < _ATTRIBUTE.size:
            break
        if kind == _RTA_OIF:
            return int.from_bytes(body[place + 4 : place + 8], "little")
        place += (length + 3) & ~3
    return 0
