"""ICMP echo requests of both families, many at once over one raw socket each. Lives on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from ipaddress import IPv4Address, IPv6Address

Address = IPv4Address | IPv6Address
_ECHO = struct.Struct("!BBHHH")
_REQUEST = {4: 8, 6: 128}
_REPLY = {4: 0, 6: 129}
_DATA = b"ciliate health probe"
_SOL_RAW, _ICMP_FILTER, _ICMP6_FILTER = 255, 1, 1
_CAPACITY = 1 << 16


class Pinger:
    """Sends requests and recognises their answers; use it as a context. Needs the right to open raw sockets."""

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self._waiting: dict[tuple[int, int], tuple[Address, asyncio.Future[None]]] = {}
        self._id = int.from_bytes(os.urandom(2), "big")
        self._sequence = 0

    def __enter__(self) -> Pinger:
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for raw in self._sockets.values():
            loop.remove_reader(raw)
            raw.close()
        self._sockets.clear()

    async def ping(self, address: Address, timeout: float) -> float:
        """Seconds until the answer; TimeoutError without one, OSError where the request cannot be sent."""
        version, number = address.version, self._number()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[version, number] = address, answer
        begin = time.perf_counter()
        try:
            self._socket(version).sendto(request(version, self._id, number), (str(address), 0))
            async with asyncio.timeout(timeout):
                await answer
        finally:
            del self._waiting[version, number]
        return time.perf_counter() - begin

    def _number(self) -> int:
        self._sequence = (self._sequence + 1) % _CAPACITY
        return self._sequence

    def _socket(self, version: int) -> socket.socket:
        raw = self._sockets.get(version)
        if raw is None:
            family, protocol = (socket.AF_INET, 1) if version == 4 else (socket.AF_INET6, 58)
            raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
            _only_replies(raw, version)
            self._sockets[version] = raw
            asyncio.get_running_loop().add_reader(raw, self._read, raw, version)
        return raw

    def _read(self, raw: socket.socket, version: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, source = raw.recvfrom(2048)
                number = answered(version, data, self._id)
                address, future = self._waiting.get((version, number), (None, None))
                if future is not None and not future.done() and str(address) == source[0].partition("%")[0]:
                    future.set_result(None)


def _only_replies(raw: socket.socket, version: int) -> None:
    """Have the kernel drop every other message; a set bit drops its type."""
    if version == 4:
        raw.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", 0xFFFFFFFF & ~(1 << _REPLY[4])))
        return
    words = [0xFFFFFFFF] * 8
    words[_REPLY[6] >> 5] &= ~(1 << (_REPLY[6] & 31))
    raw.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *words))


def request(version: int, identifier: int, number: int) -> bytes:
    """An echo request. The checksum of ICMPv6 covers the addresses and is the kernel's to fill in."""
    bare = _ECHO.pack(_REQUEST[version], 0, 0, identifier, number) + _DATA
    if version == 6:
        return bare
    return _ECHO.pack(_REQUEST[4], 0, checksum(bare), identifier, number) + _DATA


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def answered(version: int, data: bytes, identifier: int) -> int:
    """The number of the request that a message answers, or -1; IPv4 messages come with their IP header."""
    if version == 4:
        data = data[(data[0] & 15) * 4 :] if data else data
    if len(data) < _ECHO.size:
        return -1
    kind, _, _, echoed, number = _ECHO.unpack_from(data)
    return int(number) if (kind, echoed) == (_REPLY[version], identifier) else -1
