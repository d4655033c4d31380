"""Probes over the loopback: answers, silence, and what the messages look like. Tier unit (ICMP needs root)."""

from __future__ import annotations

import asyncio
import os
import socket
from ipaddress import IPv4Address, ip_address

import pytest

from ciliate.health import hello, ping, probing
from ciliate.health.ping import Pinger, answered, checksum, request
from ciliate.node import Node

LOOPBACK = IPv4Address("127.0.0.1")


def test_checksum_of_rfc_1071() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    assert checksum(request(4, 7, 9)) == 0


@pytest.mark.parametrize(
    ("version", "data", "number"),
    [
        (4, b"\x45" + bytes(19) + ping._ECHO.pack(0, 0, 0, 7, 9), 9),
        (4, b"\x45" + bytes(19) + ping._ECHO.pack(0, 0, 0, 8, 9), -1),
        (4, b"\x45" + bytes(19) + ping._ECHO.pack(8, 0, 0, 7, 9), -1),
        (4, b"", -1),
        (4, b"\x45" + bytes(20), -1),
        (6, ping._ECHO.pack(129, 0, 0, 7, 9), 9),
        (6, ping._ECHO.pack(128, 0, 0, 7, 9), -1),
    ],
)
def test_answers_are_told_from_everything_else(version: int, data: bytes, number: int) -> None:
    assert answered(version, data, 7) == number


async def test_hello_is_answered_and_nothing_else() -> None:
    listener = hello.listening(LOOPBACK, 0)
    port = listener.getsockname()[1]
    server = await hello.serve(listener)
    try:
        assert 0 < await hello.ask(LOOPBACK, port, 5) < 5
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /secrets HTTP/1.1\r\n\r\n")
        assert b"404" in await reader.readline()
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x" * 10000)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
    finally:
        server.close()
    with pytest.raises(OSError):
        await hello.ask(LOOPBACK, port, 5)


async def test_who_answers_with_something_else_is_not_well() -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"SSH-2.0-other\r\n")
        writer.close()

    server = await asyncio.start_server(other, "127.0.0.1", 0)
    async with server:
        with pytest.raises(OSError, match="SSH"):
            await hello.ask(LOOPBACK, server.sockets[0].getsockname()[1], 5)


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_ping(address: str) -> None:
    with Pinger() as pinger:
        found = await asyncio.gather(*(pinger.ping(ip_address(address), 5) for _ in range(20)))
    assert all(0 < latency < 5 for latency in found)


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets need root")
async def test_what_is_told_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(probing, "PORT", taken.getsockname()[1])
        monkeypatch.setattr(probing, "TIMEOUT", 0.05)
        alone = Node(name="alone", ipv4=LOOPBACK)
        silent = Node(name="silent", ipv4=LOOPBACK, health4=IPv4Address("127.0.0.2"))
        quiet, told = await probing.probe_all([alone, silent], alone.id, 1.0)
    assert quiet.local and not quiet.problem and quiet.paths[0].http is None
    assert not told.local and not told.reachable("node") and not told.reachable("endpoint")
    assert told.problem.startswith("node 127.0.0.1: HTTP")
