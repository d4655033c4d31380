"""rtnetlink requests as bytes, many in one system call: what connecting a container is made of, without delay.

pyroute2 does everything that is not in the way of a container that waits; a request there costs about as much as all of
these together.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from ciliate.datapath.errors import DatapathError

Address = IPv4Address | IPv6Address
NEWLINK, NEWADDR, NEWROUTE, NEWNEIGH, NEWQDISC, NEWTFILTER = 16, 20, 24, 28, 36, 44
CREATE, EXCL, REPLACE = 0x400, 0x200, 0x100
GETROUTE = 26
_REQUEST, _ACK, _DUMP = 0x001, 0x004, 0x300
_ERROR, _DONE, _NESTED = 2, 3, 0x8000
_UP = 1
_ADDR_GEN_NONE = 1
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_RECEIVE = 1 << 16


class Batch:
    """Requests that the kernel does in their order. ``action`` of each is what an error says could not be done."""

    def __init__(self) -> None:
        self._messages = bytearray()
        self._last = 0
        self._actions: list[tuple[str, frozenset[int]]] = []

    def add(self, kind: int, flags: int, body: bytes, action: str, accepted: frozenset[int] = frozenset()) -> None:
        """Add one request; error numbers in ``accepted`` count as success."""
        self._actions.append((action, accepted))
        size = _HEADER.size + len(body)
        self._last = len(self._messages)
        self._messages += _HEADER.pack(size, kind, flags | _REQUEST, len(self._actions), 0)
        self._messages += body + b"\0" * (-size % 4)

    def run(self) -> dict[int, int]:
        """Send all to the kernel, in this thread's namespace; DatapathError for the first that is refused.

        The kernel goes on behind a refused request: undo is the caller's. Returns error numbers that were accepted, and
        0 for the last request where it was done, by the requests' numbers from 1 on.
        """
        if not self._actions:
            return {}
        # errors are always answered, so it is enough to ask for the last request's success
        struct.pack_into("=H", self._messages, self._last + 6, self._flags(self._last) | _ACK)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
            kernel.send(self._messages)
            codes = self._answers(kernel)
        for number, code in sorted(codes.items()):
            action, accepted = self._actions[number - 1]
            if code and code not in accepted:
                raise DatapathError(code, f"{action}: {os.strerror(code)}")
        return codes

    def _flags(self, offset: int) -> int:
        flags: int = _HEADER.unpack_from(self._messages, offset)[2]
        return flags

    def _answers(self, kernel: socket.socket) -> dict[int, int]:
        """Error number by the request's sequence number, 0 for success; the last request's is always there.

        The kernel has answered by the time that it has taken the requests, so nothing waits here.
        """
        codes: dict[int, int] = {}
        while len(self._actions) not in codes:
            data, offset = kernel.recv(_RECEIVE), 0
            while offset < len(data):
                size, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
                if kind == _ERROR:
                    codes[sequence] = -struct.unpack_from("=i", data, offset + _HEADER.size)[0]
                offset += size + (-size % 4)
        return codes


def dump(kind: int, body: bytes, action: str) -> Iterator[bytes]:
    """Every object of a kind, as the kernel sends it: a fixed head, then attributes (`attributes` reads them).

    For tables with thousands of entries, where a parser that makes objects of them takes seconds.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, 1, 0) + body)
        while True:
            data, offset = kernel.recv(_RECEIVE), 0
            while offset < len(data):
                size, found, _, _, _ = _HEADER.unpack_from(data, offset)
                if found == _DONE:
                    return
                if found == _ERROR:
                    code = -struct.unpack_from("=i", data, offset + _HEADER.size)[0]
                    raise DatapathError(code, f"{action}: {os.strerror(code)}")
                yield data[offset + _HEADER.size : offset + size]
                offset += size + (-size % 4)


def ask(kind: int, body: bytes, action: str) -> bytes:
    """One object, as the kernel sends it; DatapathError where there is none."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST, 1, 0) + body)
        data = kernel.recv(_RECEIVE)
    size, found, _, _, _ = _HEADER.unpack_from(data)
    if found == _ERROR:
        code = -struct.unpack_from("=i", data, _HEADER.size)[0]
        raise DatapathError(code, f"{action}: {os.strerror(code)}")
    return data[_HEADER.size : size]


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """The attributes of such an object behind its head; nested ones are read by another call."""
    found: dict[int, bytes] = {}
    while offset < len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        found[kind & ~_NESTED] = data[offset + _ATTRIBUTE.size : offset + size]
        offset += max(size, _ATTRIBUTE.size) + (-size % 4)
    return found


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded."""
    size = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(size, kind) + data + b"\0" * (-size % 4)


def number(kind: int, value: int) -> bytes:
    """An attribute of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def text(kind: int, value: str) -> bytes:
    """An attribute of text."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute of attributes."""
    return attribute(kind | _NESTED, b"".join(parts))


def family(address: Address) -> int:
    """The address family's number."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def veth(name: str, mac: bytes, peer: str, peer_mac: bytes, peer_netns: int, mtu: int) -> bytes:
    """A veth pair with one end in another namespace, both ends down. An MTU of 0 leaves it to the kernel."""
    sizes = number(4, mtu) if mtu else b""
    other = _LINK.pack(0, 0, 0, 0, 0) + text(3, peer) + attribute(1, peer_mac) + number(28, peer_netns) + sizes
    info = nested(18, text(1, "veth"), nested(2, attribute(1, other)))
    return _LINK.pack(0, 0, 0, 0, 0) + text(3, name) + attribute(1, mac) + sizes + info


def link_up(index: int) -> bytes:
    """A device goes up."""
    return _LINK.pack(0, 0, index, _UP, _UP)


def settings(name: str, ipv4: dict[int, int]) -> bytes:
    """IPv4 settings of a device (numbers as in linux/ip.h)."""
    values = (number(key, value) for key, value in ipv4.items())
    return _LINK.pack(0, 0, 0, 0, 0) + text(3, name) + nested(26, nested(socket.AF_INET, nested(1, *values)))


def no_link_local(name: str) -> bytes:
    """A device makes no link-local IPv6 address of itself."""
    mode = attribute(8, bytes([_ADDR_GEN_NONE]))
    return _LINK.pack(0, 0, 0, 0, 0) + text(3, name) + nested(26, nested(socket.AF_INET6, mode))


def interface_address(index: int, address: Address, flags: int) -> bytes:
    """A host address on a device."""
    head = struct.pack("=BBBBI", family(address), address.max_prefixlen, 0, 0, index)
    return head + attribute(2, address.packed) + attribute(1, address.packed) + number(8, flags)


def route_to(
    index: int,
    destination: Address | None,
    version: int,
    scope: int = 0,
    gateway: Address | None = None,
    source: Address | None = None,
) -> bytes:
    """A route of the main table to one address, or the default route where ``destination`` is None."""
    length = destination.max_prefixlen if destination else 0
    kind = socket.AF_INET if version == 4 else socket.AF_INET6
    # table main, protocol static, type unicast
    head = struct.pack("=BBBBBBBBI", kind, length, 0, 0, 254, 4, scope, 1, 0)
    parts = [attribute(1, destination.packed) if destination else b"", number(4, index)]
    parts.append(attribute(5, gateway.packed) if gateway else b"")
    parts.append(attribute(7, source.packed) if source else b"")
    return head + b"".join(parts)


def neighbour(index: int, address: Address, mac: bytes, state: int) -> bytes:
    """Who has an address on a device."""
    head = struct.pack("=BxxxiHBB", family(address), index, state, 0, 0)
    return head + attribute(1, address.packed) + attribute(2, mac)


def clsact(index: int) -> bytes:
    """The queueing discipline that filters hang on."""
    return struct.pack("=BxxxiIII", 0, index, 0xFFFF0000, 0xFFFFFFF1, 0) + text(1, "clsact")


def ensure_clsact(index: int) -> None:
    """Give a device the queueing discipline that filters hang on, where it has none.

    DatapathError where another one is in its place: filters of both directions would end up at ingress.
    """
    batch = Batch()
    batch.add(NEWQDISC, CREATE, clsact(index), f"device {index}: queueing discipline clsact", frozenset({errno.EINVAL}))
    codes = batch.run()
    if codes[1]:
        text = f"device {index}: another queueing discipline ('ingress') is in the place of clsact, expected none"
        raise DatapathError(errno.EBUSY, text)


def bpf_filter(index: int, parent: int, priority: int, program: int, class_id: int, name: str) -> bytes:
    """A direct-action filter for every protocol, with handle 1."""
    head = struct.pack("=BxxxiIII", 0, index, 1, parent, priority << 16 | socket.htons(3))
    options = nested(2, number(3, class_id), number(6, program), text(7, name), number(8, 1))
    return head + text(1, "bpf") + options
