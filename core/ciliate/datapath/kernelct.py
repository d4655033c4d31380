"""The kernel's own conntrack (ctnetlink), as far as masquerading needs it: which flows are translated; forgetting some.

In this thread's network namespace; blocking. A kernel without conntrack has no flows.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from ciliate.datapath.errors import DatapathError
from ciliate.datapath.layout import Address

_NETLINK_NETFILTER, _CTNETLINK = 12, 1
_NEW, _GET, _DELETE = 0, 1, 2
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_TUPLE_ORIG, _TUPLE_REPLY, _TIMEOUT, _ID = 1, 2, 7, 12
_IP, _PROTO = 1, 2
_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ICMP_IDS = {1: 4, 58: 7}
_RECEIVE = 1 << 18
_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_ABSENT = frozenset({errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL})


class Ends(NamedTuple):
    """One direction of a flow. Of ICMP the identifier is both ports."""

    source: Address
    source_port: int
    target: Address
    target_port: int
    proto: int


class KernelFlow(NamedTuple):
    """A flow: how it began, and how answers look. ``seconds``: until it is over; ``handle`` names it for ``forget``."""

    original: Ends
    reply: Ends
    seconds: int
    handle: bytes

    @property
    def translated(self) -> bool:
        """Whether the source is replaced by another one."""
        return (self.reply.target, self.reply.target_port) != (self.original.source, self.original.source_port)


def flows(naming: Collection[bytes] = ()) -> Iterator[KernelFlow]:
    """Every flow of both families; with ``naming`` those in which one of these byte strings is somewhere.

    Those that come or go meanwhile may be missed.
    """
    try:
        kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    except OSError as error:
        if error.errno in _ABSENT:
            return
        raise
    with kernel:
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        for family in (socket.AF_INET, socket.AF_INET6):
            kernel.send(_message(_GET, _REQUEST | _DUMP, family))
            yield from _dumped(kernel, family, naming)


def _message(command: int, flags: int, family: int, body: bytes = b"") -> bytes:
    kind = _CTNETLINK << 8 | command
    return _HEADER.pack(_HEADER.size + 4 + len(body), kind, flags, 1, 0) + struct.pack("=BBH", family, 0, 0) + body


def _dumped(kernel: socket.socket, family: int, naming: Collection[bytes]) -> Iterator[KernelFlow]:
    while True:
        data, place = kernel.recv(_RECEIVE), 0
        while place + _HEADER.size <= len(data):
            length, kind = _HEADER.unpack_from(data, place)[:2]
            if kind == _DONE:
                return
            if kind == _ERROR:
                code = -struct.unpack_from("=i", data, place + _HEADER.size)[0]
                if code in _ABSENT:
                    return
                raise DatapathError(code, f"kernel's conntrack: cannot be read: {os.strerror(code)}")
            body = data[place + _HEADER.size + 4 : place + length]
            if not naming or any(name in body for name in naming):
                flow = _flow(body, family)
                if flow is not None:
                    yield flow
            place += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found, place = {}, 0
    while place + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, place)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[place + _ATTRIBUTE.size : place + length]
        place += (length + 3) & ~3
    return found


def _flow(data: bytes, family: int) -> KernelFlow | None:
    found = _attributes(data)
    original, reply = _ends(found.get(_TUPLE_ORIG, b"")), _ends(found.get(_TUPLE_REPLY, b""))
    if original is None or reply is None:
        return None
    seconds = int.from_bytes(found.get(_TIMEOUT, b""), "big")
    handle = bytes([family]) + _attribute(_TUPLE_ORIG | _NESTED, found[_TUPLE_ORIG])
    return KernelFlow(original, reply, seconds, handle + (_attribute(_ID, found[_ID]) if _ID in found else b""))


def _attribute(kind: int, data: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(size, kind) + data + b"\0" * (-size % 4)


def _ends(data: bytes) -> Ends | None:
    parts = _attributes(data)
    addresses, ports = _attributes(parts.get(_IP, b"")), _attributes(parts.get(_PROTO, b""))
    source, target = (addresses.get(1) or addresses.get(3)), (addresses.get(2) or addresses.get(4))
    if source is None or target is None or 1 not in ports:
        return None
    proto = ports[1][0]
    identifier = _ICMP_IDS.get(proto)
    numbers = (identifier, identifier) if identifier else (2, 3)
    source_port, target_port = (int.from_bytes(ports.get(number, b""), "big") for number in numbers)
    return Ends(ip_address(source), source_port, ip_address(target), target_port, proto)


def forget_addresses(addresses: Collection[Address]) -> int:
    """Delete the flows that one of these addresses has part in; how many went."""

    def concerned(flow: KernelFlow) -> bool:
        ways = flow.original, flow.reply
        return any(address in addresses for way in ways for address in (way.source, way.target))

    try:
        if not int(_COUNT.read_text()):
            return 0  # most nodes: nothing asks for connection tracking
    except FileNotFoundError:
        return 0
    return forget(concerned, [address.packed for address in addresses])


def forget(select: Callable[[KernelFlow], bool], naming: Collection[bytes] = ()) -> int:
    """Delete the flows that ``select`` picks, of those that ``flows`` gives for ``naming``; how many went. Their next
    packets begin anew.
    """
    chosen = [flow for flow in flows(naming) if select(flow)]
    if not chosen:
        return 0
    gone = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as kernel:
        for flow in chosen:
            kernel.send(_message(_DELETE, _REQUEST | _ACK, flow.handle[0], flow.handle[1:]))
            code = -struct.unpack_from("=i", kernel.recv(_RECEIVE), _HEADER.size)[0]
            if code not in (0, errno.ENOENT):
                raise DatapathError(code, f"kernel's conntrack: a flow cannot be deleted: {os.strerror(code)}")
            gone += code == 0
    return gone
