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

from ciliate import listeners
from ciliate.health import hello
from ciliate.listeners import REFUSED, Door, Share

LOOPBACK: Any = ip_address("127.0.0.1")
MANY = 300
PATIENCE = 20.0
"""Seconds after which a wait that nothing ends counts as a failure."""


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Crowd:
    """Connections that begin to ask, and stay."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.sockets: list[socket.socket] = []

    def leave(self) -> None:
        """All of them."""
        for client in self.sockets:
            client.close()

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


async def test_the_health_port_has_room_for_others_whoever_crowds_it(crowd: Crowd) -> None:
    listener = hello.listening(LOOPBACK, 0)
    port, before = listener.getsockname()[1], descriptors()
    server = await hello.serve(listener)
    try:
        await crowd.connect("127.0.0.2", port, MANY)
        held = descriptors() - before - MANY
        assert held <= 20
        assert await hello.ask(LOOPBACK, port, 5) < 5
        assert "127.0.0.2 were refused" in listeners.status()[1]
    finally:
        server.close()
        crowd.leave()
        async with asyncio.timeout(PATIENCE):
            while server.share.connected:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        server.share.close()


class Silent(asyncio.Protocol):
    """Serves nobody."""


def door(share: Share) -> Door:
    made = Door(listeners.tcp_listener("127.0.0.1", 0, 16), share, Silent)
    made.open()
    return made


async def test_who_says_nothing_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "HEAD", 0.05)
    share = Share("silent", 4, 4)
    made = door(share)
    try:
        reader, writer = await asyncio.open_connection(*made.listener.getsockname())
        writer.write(b"GET / HT")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            async with asyncio.timeout(10):
                await reader.readexactly(1)
        writer.close()
        assert (share.connected.total(), share.refused["127.0.0.1"]) == (0, 1)
    finally:
        made.close()
        share.close()


async def test_who_asked_may_wait_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "HEAD", 0.05)
    share = Share("patient", 4, 4)
    made = door(share)
    try:
        reader, writer = await asyncio.open_connection(*made.listener.getsockname())
        for piece in (b"GET / HTTP/1.1\r\n\r", b"\n"):
            writer.write(piece)
            await writer.drain()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await reader.readexactly(1)
        assert share.connected == {"127.0.0.1": 1}
        writer.close()
    finally:
        made.close()
        share.close()


def test_sources_are_counted_by_name_up_to_a_bound() -> None:
    share = Share("bounded", 1, 1)
    assert share.enter("a")
    for number in range(listeners.SOURCES * 2):
        assert not share.enter(f"source {number}")
    assert len(share.refused) == listeners.SOURCES + 1
    assert share.refused[listeners.OTHERS] == listeners.SOURCES
    assert REFUSED.values()["bounded", listeners.OTHERS] == listeners.SOURCES
    share.leave("a")
    assert share.enter("b")
    share.close()


def test_one_listener_has_its_part_of_the_descriptors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners.resource, "getrlimit", lambda number: (80, 80))
    share = Share("small", 1000, 1000)
    assert (share.most, share.each) == (10, 10)
    share.close()
