"""Hears of MAC addresses of pods' devices that somebody changes inside their namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Callable

from ciliate.datapath import rtnl
from ciliate.datapath.errors import DatapathError

_NETLINK, _LISTEN_ALL_NSID, _LINK_GROUP = 270, 8, 1
_ATTACH_FILTER = 26
_HEADER = struct.Struct("=IHHII")
_HEAD = 16
_ADDRESS, _PEER, _NAMESPACE, _TARGET = 1, 5, 37, 46
_GETLINK = 18
_LINK = struct.Struct("=BxHiII")
BUFFER = 1 << 20


class MacWatch:
    """Calls ``notify`` with the index of the node's end of a pair and the MAC that its other end has now.

    Of what was missed it tells by ``notify(0, b"")``. Lives on the event loop.
    """

    def __init__(self, notify: Callable[[int, bytes], None]) -> None:
        self._notify = notify
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Listen in every namespace that a device pair leads to; OSError where the kernel refuses."""
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            _pass_links_only(listener)
            listener.setsockopt(_NETLINK, _LISTEN_ALL_NSID, 1)
            listener.bind((0, _LINK_GROUP))
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
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data, ancillary, _, _ = listener.recvmsg(65536, socket.CMSG_SPACE(4))
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    self._notify(0, b"")
                    continue
                # what is told of this namespace's own devices comes without a namespace's number
                if any(level == _NETLINK and kind == _LISTEN_ALL_NSID for level, kind, _ in ancillary):
                    self._tell(data)

    def _tell(self, data: bytes) -> None:
        place = 0
        while place + _HEADER.size <= len(data):
            length, kind = _HEADER.unpack_from(data, place)[:2]
            if length < _HEADER.size:
                return
            if kind == rtnl.NEWLINK:
                found = rtnl.attributes(data[place + _HEADER.size : place + length], _HEAD)
                if _ADDRESS in found and _PEER in found:
                    self._notify(int.from_bytes(found[_PEER], "little"), found[_ADDRESS])
            place += (length + 3) & ~3


def _pass_links_only(listener: socket.socket) -> None:
    """A classic filter over the header: nothing but news of devices."""
    steps = struct.pack("=HBBI", 0x28, 0, 0, 4)
    steps += struct.pack("=HBBI", 0x15, 0, 1, socket.htons(rtnl.NEWLINK))
    steps += struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF) + struct.pack("=HBBI", 0x06, 0, 0, 0)
    program = ctypes.create_string_buffer(steps)
    listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("@HP", 4, ctypes.addressof(program)))


def other_end(index: int) -> bytes:
    """The MAC of a pair's end in its namespace, asked from here; nothing where it is gone. Blocking."""
    try:
        near = _link(index)
        if _PEER not in near or _NAMESPACE not in near:
            return b""
        far = _link(int.from_bytes(near[_PEER], "little"), near[_NAMESPACE])
    except DatapathError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL, errno.ENONET):
            return b""
        raise
    # a kernel that does not know other namespaces answers for this one
    return far.get(_ADDRESS, b"") if _TARGET in far else b""


def _link(index: int, namespace: bytes = b"") -> dict[int, bytes]:
    body = _LINK.pack(0, 0, index, 0, 0) + (rtnl.attribute(_TARGET, namespace) if namespace else b"")
    return rtnl.attributes(rtnl.ask(_GETLINK, body, f"device {index}"), _HEAD)
