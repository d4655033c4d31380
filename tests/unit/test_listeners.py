"""Listeners have bounds: who opens connections without end is refused and named, and others are served. Tier unit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from ciliate.health import hello

LOOPBACK: Any = ip_address("127.0.0.1")
MANY = 300


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Crowd:
    """Connections that begin to ask, and stay."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.sockets: list[socket.socket] = []

    async def connect(self, source: str, port: int, count: int) -> None:
        """Of one source; what the kernel takes no more is left out."""
        loop = asyncio.get_running_loop()
        for _ in range(count):
            client = self._stack.enter_context(socket.socket())
            client.setblocking(False)
            client.bind((source, 0))
            try:
                async with asyncio.timeout(1):
                    await loop.sock_connect(client, ("127.0.0.1", port))
                    await loop.sock_sendall(client, b"GET")
            except (OSError, TimeoutError):
                continue
            self.sockets.append(client)


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    with ExitStack() as stack:
        yield Crowd(stack)


@pytest.mark.xfail(strict=True, reason="everybody is accepted, and stays for seconds")
async def test_the_health_port_has_room_for_others_whoever_crowds_it(crowd: Crowd) -> None:
    listener = hello.listening(LOOPBACK, 0)
    port, before = listener.getsockname()[1], descriptors()
    server = await hello.serve(listener)
    try:
        await crowd.connect("127.0.0.2", port, MANY)
        held = descriptors() - before - MANY
        assert held <= 20
        assert await hello.ask(LOOPBACK, port, 5) < 5
    finally:
        server.close()
