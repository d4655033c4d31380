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
NEWLINK, DELLINK, NEWADDR, DELADDR, DELROUTE, DELNEIGH, DELQDISC, DELTFILTER = 16, 17, 20, 21, 25, 29, 37, 45
_HEADER = struct.Struct("=IHHII")
_INDEX = struct.Struct("=4xi")
_FLAGS = struct.Struct("=8xI")
_ATTRIBUTE = struct.Struct("=HH")
_LOSSES = (DELLINK, DELROUTE, DELNEIGH, DELQDISC, DELTFILTER, NEWADDR, DELADDR)
_ATTACH_FILTER = 26
_LOAD_HALF, _LOAD_BYTE, _EQUAL, _ANY_SET, _RETURN = 0x28, 0x30, 0x15, 0x45, 0x06
_UP, _RTA_OIF, _RTMSG = 1, 4, 12
_OF_THE_NODE = (NEWADDR, DELADDR, DELQDISC, DELTFILTER)
BUFFER = 1 << 20


class LossWatch:
    """Calls ``notify`` when a device among ``known`` (interface indexes) loses something. Lives on the event loop.

    Of the devices among ``filtered`` only filters and addresses count, new ones too: neighbours and routes come and go
    on the node's own ones.
    """

    def __init__(
        self, known: Collection[int], notify: Callable[[], None], filtered: Collection[int] = frozenset()
    ) -> None:
        self._known = known
        self._filtered = filtered
        self._notify = notify
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
        lost = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data = listener.recv(65536)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    lost = True  # messages were dropped: anything may be gone
                    continue
                lost = lost or any(self._concerns(index, filters) for index, filters in losers(data))
        if lost:
            self._notify()

    def _concerns(self, index: int, filters: bool) -> bool:
        return index in self._known or (filters and index in self._filtered)


def _pass_losses_only(listener: socket.socket) -> None:
    """Let the kernel sort out what is no loss: connecting a container makes ten messages that tell of none.

    A classic filter over the header. It reads numbers in network order, which the kernel does not write here.
    """
    end = len(_LOSSES) + 4
    steps = [_step(_LOAD_HALF, 4)]
    steps += [_step(_EQUAL, socket.htons(kind), end - place, 0) for place, kind in enumerate(_LOSSES, 1)]
    steps += [
        _step(_EQUAL, socket.htons(NEWLINK), 0, 2),
        _step(_LOAD_BYTE, _HEADER.size + 8 + (0 if sys.byteorder == "little" else 3)),
        _step(_ANY_SET, _UP, 0, 1),
        _step(_RETURN, 0),
        _step(_RETURN, 0xFFFFFFFF),
    ]
    program = ctypes.create_string_buffer(b"".join(steps))
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("@HP", len(steps), ctypes.addressof(program)))


def _step(code: int, value: int, jump: int = 0, other: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump, other, value)


def losers(data: bytes) -> Iterator[tuple[int, bool]]:
    """The interface index of each thing that the messages say has gone, and whether it is a filter or an address.

    A device that went down counts too, and an address that came.
    """
    place = 0
    while place + _HEADER.size <= len(data):
        length, kind = _HEADER.unpack_from(data, place)[:2]
        if length < _HEADER.size:
            return
        body = data[place + _HEADER.size : place + length]
        if kind == DELROUTE:
            yield _route_device(body), False
        elif kind in _OF_THE_NODE:
            yield _INDEX.unpack_from(body)[0], True
        elif kind in (DELLINK, DELNEIGH) or (kind == NEWLINK and _is_down(body)):
            yield _INDEX.unpack_from(body)[0], False
        place += (length + 3) & ~3


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
