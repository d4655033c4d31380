"""Those who do nothing wrong: an echo server, and a client with connections that stay and connections that come anew.

Standard library only, run by path inside a network namespace.

    bystanders.py serve PORT                    prints "ready"; echoes TCP and UDP until its input ends
    bystanders.py talk LASTING ADDRESS PORT     prints "ready"; talks until its input ends, then prints counts as JSON:
        {"established": 50, "broken": 0, "opened": 400, "failed": 0, "why": {}}

Every other lasting connection says something once a second, the others at the very end alone. One is broken where no
echo comes within the time limit. New connections are opened at a fixed pace, say one thing and end.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections import Counter
from typing import Any

PATIENCE = 5.0
"""Seconds within which an echo must come, or a connection must stand: one lost SYN is sent again after one."""
PACE = 0.02
"""Seconds between two new connections."""
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo(asyncio.DatagramProtocol):
    """UDP's part of the server."""

    def connection_made(self, transport: Any) -> None:
        """Keep what answers."""
        self._transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        """Send it back."""
        self._transport.sendto(data, peer)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echo one connection to its end."""
    try:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    except OSError:
        return  # the client reports it
    finally:
        writer.close()


async def input_ends() -> None:
    """Wait until whoever started this closes its end."""
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)


async def serve(port: int) -> None:
    """Answer on a port of every address."""
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    server = await asyncio.start_server(answer, sock=listener)
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    datagrams.bind(("::", port))
    await asyncio.get_running_loop().create_datagram_endpoint(Echo, sock=datagrams)
    print("ready", flush=True)
    await input_ends()
    server.close()


async def echoed(stream: Stream, text: bytes) -> bool:
    """Whether the other end answers in time."""
    reader, writer = stream
    writer.write(text)
    async with asyncio.timeout(PATIENCE):
        return await reader.readexactly(len(text)) == text


class Client:
    """The client's connections and counts."""

    def __init__(self, address: str, port: int) -> None:
        self._target = (address, port)
        self.counts: Counter[str] = Counter()
        self.why: Counter[str] = Counter()

    async def open(self) -> Stream:
        """A new connection."""
        async with asyncio.timeout(PATIENCE):
            return await asyncio.open_connection(*self._target)

    async def establish(self) -> Stream | None:
        """A connection that is to last; what an earlier attack left may be in its way, and counts as broken."""
        self.counts["established"] += 1
        try:
            stream = await self.open()
            await echoed(stream, b"first")
        except (OSError, EOFError) as error:
            self.counts["broken"] += 1
            self.why[f"at the start: {type(error).__name__}"] += 1
            return None
        return stream

    async def last(self, stream: Stream, often: bool, ending: asyncio.Event) -> None:
        """Keep one connection until the end, and see whether it still is one."""
        try:
            while not ending.is_set():
                if often:
                    await echoed(stream, b"still here")
                await asyncio.sleep(1.0)
            await echoed(stream, b"at last")
        except (OSError, EOFError) as error:
            self.counts["broken"] += 1
            self.why[f"established: {type(error).__name__}"] += 1
        finally:
            stream[1].close()

    async def open_one(self) -> None:
        """One connection from its beginning to its end."""
        self.counts["opened"] += 1
        try:
            stream = await self.open()
            try:
                await echoed(stream, b"hello")
            finally:
                stream[1].close()
        except (OSError, EOFError) as error:
            self.counts["failed"] += 1
            self.why[f"new: {type(error).__name__}"] += 1

    async def open_many(self, ending: asyncio.Event) -> None:
        """New connections at their pace."""
        async with asyncio.TaskGroup() as tasks:
            while not ending.is_set():
                tasks.create_task(self.open_one())
                await asyncio.sleep(PACE)


async def talk(lasting: int, address: str, port: int) -> None:
    """Run a client to the end of its input."""
    client, ending = Client(address, port), asyncio.Event()
    streams = [stream for _ in range(lasting) if (stream := await client.establish())]
    print("ready", flush=True)
    async with asyncio.TaskGroup() as tasks:
        for number, stream in enumerate(streams):
            tasks.create_task(client.last(stream, bool(number % 2), ending))
        tasks.create_task(client.open_many(ending))
        await input_ends()
        ending.set()
    counts = {name: client.counts[name] for name in ("established", "broken", "opened", "failed")}
    print(json.dumps({**counts, "why": client.why}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve(int(sys.argv[2])))
    else:
        asyncio.run(talk(int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
