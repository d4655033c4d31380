"""The smallest HTTP service there is, and its client: ``GET /hello``."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

from ciliate.listeners import Door, Share

PATH = "/hello"
LIMIT = 4096
"""Bytes of a request or an answer, at most."""
MOST, EACH = 128, 8
"""Connections at once, in all and of one source: a node is asked by each other node once in a while."""
BACKLOG = 64
PATIENCE = 5.0
"""Seconds within which a client has to say what it wants."""


def listening(address: IPv4Address | IPv6Address, port: int) -> socket.socket:
    """A socket that listens at one address, in the calling thread's namespace; OSError where that cannot be."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), port))
        # who connects and says nothing stays with the kernel, and costs us nothing
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(PATIENCE))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def share(called: Callable[[str], str] | None = None) -> Share:
    """The bounds of all that one node's health checks answer; ``called`` names a source for people."""
    return Share("health", MOST, EACH, called)


async def serve(listener: socket.socket, bounds: Share | None = None) -> Door:
    """Answer on a listening socket, within bounds of its own where none are given."""

    def make() -> asyncio.Protocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=LIMIT), _answer)

    door = Door(listener, bounds or share(), make)
    door.open()
    return door


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        async with asyncio.timeout(PATIENCE):
            head = await reader.readuntil(b"\r\n\r\n")
            words = head.split(b" ", 2)
            good = words[0] == b"GET" and words[1:2] == [PATH.encode()]
            status, body = ("200 OK", b"Hello\n") if good else ("404 Not Found", b"GET /hello is all there is\n")
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
                "Connection: close\r\n\r\n".encode()
                + body
            )
            await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def ask(address: IPv4Address | IPv6Address, port: int, timeout: float) -> float:
    """Seconds until a node has answered; OSError or TimeoutError where it does not, or with something else."""
    begin = time.perf_counter()
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(str(address), port, limit=LIMIT)
        try:
            writer.write(f"GET {PATH} HTTP/1.1\r\nHost: health\r\nConnection: close\r\n\r\n".encode())
            line = await reader.readline()
        finally:
            writer.close()
    if line.split(b" ")[1:2] != [b"200"]:
        raise OSError(f"it answered {line.decode(errors='replace').strip() or 'nothing'}")
    return time.perf_counter() - begin
