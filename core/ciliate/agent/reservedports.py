"""No ephemeral port of the node is a service's: the kernel leaves such ports out when it chooses one for a socket.

The sysctl `ip_local_reserved_ports` is the node's; what others wrote there stays. What was added is on disk before
it is in the kernel, so that it goes again, also by a later agent, once no service needs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from ciliate import atomicfile
from ciliate.ports import HIGHEST, PortRange, common, merged, subtracted

log = logging.getLogger(__name__)
SYSCTL = Path("/proc/sys/net/ipv4")
"""Of both families. Those of this network namespace."""


class ReservedPorts:
    """Keeps the kernel's list. ``sync`` is a duty's step; calls follow one after the other."""

    def __init__(self, file: Path, sysctl: Path = SYSCTL) -> None:
        self._file = file
        self._reserved, self._local = sysctl / "ip_local_reserved_ports", sysctl / "ip_local_port_range"
        self._lock = asyncio.Lock()

    async def sync(self, services: Iterable[PortRange]) -> None:
        """Reserve the ports of services that the kernel might choose, and no other. OSError where that fails."""
        wanted = merged(services)
        async with self._lock:
            await asyncio.to_thread(self._sync, wanted)

    def _sync(self, services: tuple[PortRange, ...]) -> None:
        ours, present = self._ours(), merged(_ranges(self._reserved.read_text().replace(",", " ").split()))
        theirs = subtracted(present, ours)
        first, last = (int(word) for word in self._local.read_text().split())
        added = subtracted(common(services, [(first, last)]), theirs)
        if merged([*theirs, *added]) == present and added == ours:
            return
        # first what may be there from either side, so that a crash leaves nothing that nobody knows of
        self._remember(merged([*ours, *added]))
        self._reserved.write_text(",".join(_text(item) for item in merged([*theirs, *added])) + "\n")
        self._remember(added)
        log.info("ports kept from the node's sockets: %s", ", ".join(map(_text, added)) or "none")

    def _ours(self) -> tuple[PortRange, ...]:
        found = atomicfile.read_json(self._file)
        if not isinstance(found, list):
            return ()
        return merged(_ranges(map(str, found)))

    def _remember(self, ports: tuple[PortRange, ...]) -> None:
        if ports:
            atomicfile.write_json(self._file, [_text(item) for item in ports])
        else:
            atomicfile.remove(self._file)


def _ranges(words: Iterable[str]) -> list[PortRange]:
    found = []
    for word in words:
        first, _, last = word.partition("-")
        if first.isdecimal() and 0 <= int(first) <= int(last or first) <= HIGHEST:
            found.append((int(first), int(last or first)))
    return found


def _text(item: PortRange) -> str:
    return str(item[0]) if item[0] == item[1] else f"{item[0]}-{item[1]}"
