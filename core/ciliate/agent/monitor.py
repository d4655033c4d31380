"""Fans the datapath's events out to everybody who watches; nobody watching costs next to nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from ciliate.datapath.events import EventReader, MonitorEvent, decode

log = logging.getLogger(__name__)
QUEUE = 4096
"""Events that a slow listener may lag behind before it loses some; the loss is told to it."""


class Listener:
    """One watcher's queue and the number of events it was too slow for."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(QUEUE)
        self.lost = 0

    def offer(self, event: dict[str, Any]) -> None:
        """Hand over an event, or count it as lost."""
        try:
            self.queue.put_nowait(event)
        except asyncio.QueueFull:
            self.lost += 1


class Monitor:
    """Reads the ring buffer on the loop and describes each event with names that people know."""

    def __init__(self, reader: EventReader, describe: Callable[[MonitorEvent], dict[str, Any]]) -> None:
        self._reader = reader
        self._describe = describe
        self._listeners: set[Listener] = set()
        self.seen = 0
        self.malformed = 0

    @property
    def watched(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def start(self) -> None:
        """Begin to read."""
        asyncio.get_running_loop().add_reader(self._reader.fileno(), self._drain)

    def stop(self) -> None:
        """Stop reading; the ring buffer itself stays."""
        asyncio.get_running_loop().remove_reader(self._reader.fileno())
        self._reader.close()

    def publish(self, event: dict[str, Any]) -> None:
        """Send an event of the agent itself to every listener."""
        for listener in self._listeners:
            listener.offer(event)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        """A listener for as long as the block runs."""
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def _drain(self) -> None:
        for record in self._reader.read():
            self.seen += 1
            if not self._listeners:
                continue
            try:
                event = decode(record)
            except ValueError as error:
                self.malformed += 1
                log.warning("event from the datapath cannot be read: %s", error)
                continue
            self.publish(self._describe(event))


def plain(event: MonitorEvent) -> dict[str, Any]:
    """An event as plain data, with the packet's head in hexadecimal."""
    data: dict[str, Any] = msgspec.to_builtins(event, builtin_types=(bytes,))
    packet = data.get("packet")
    if isinstance(packet, bytes):
        data["packet"] = packet.hex()
    return data
