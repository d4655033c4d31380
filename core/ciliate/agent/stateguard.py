"""What somebody removes from the state directory is written again while the agent, which knows it, still runs.

Without that nobody would notice before the next start, which takes devices without records for leftovers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ciliate import atomicfile
from ciliate.agent import balancing
from ciliate.agent.lock import AgentLock
from ciliate.directories import make_directory
from ciliate.endpoint.state import State
from ciliate.ipam import ROUTER
from ciliate.statefile import StateFile

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint
    from ciliate.endpoint.store import EndpointStore

log = logging.getLogger(__name__)
INTERVAL = 5.0


class _Part(NamedTuple):
    """Something in the directory. ``lost`` asks whether somebody removed it; what its writer is about to write is not
    lost. ``owed`` says whether its writer failed."""

    name: str
    lost: Callable[[], Awaitable[bool]]
    write: Callable[[], Awaitable[None]]
    owed: Callable[[], bool] = lambda: False


class StateGuard:
    """A duty (``look``) and a status source. ``directory`` is the state directory."""

    def __init__(self, agent: Agent, directory: Path, lock: AgentLock, records: EndpointStore) -> None:
        self._agent = agent
        self._records = records
        self._directory = directory
        self._lock = lock
        self._attachments: dict[str, bytes] = {}
        self._seen = -1
        self._told = ""

    async def look(self) -> None:
        """Write again what is gone; OSError or AgentRunningError where that cannot be."""
        parts = self._parts()
        lost = [part for part in parts if await part.lost()]
        for part in parts:
            if part not in lost and part.owed():
                log.warning("state directory %s: %s: could not be written before", self._directory, part.name)
                await part.write()
        if not lost:
            return
        names = ", ".join(part.name for part in lost)
        log.error("state directory %s: %s: somebody removed this; it is written again", self._directory, names)
        await asyncio.to_thread(make_directory, self._directory, "state-dir", 0o750)
        for part in lost:
            await part.write()
        self._told = f"{names} removed by somebody and written again at {time.strftime('%H:%M:%S')}"

    def _parts(self) -> list[_Part]:
        agent = self._agent
        return [
            # made before the agent does anything else, and written by nobody but this guard
            _Part("the lock", self._lock_lost, self._renew),
            _Part("services", self._services_lost, agent.balancing.manager.save),
            _Part("endpoint records", self._records_lost, self._record),
            _Part("attachments of containers", self._attachments_lost, self._attach),
            _file("policies", agent.policies.file, agent.policies.save),
            _file("workloads", agent.workload_file, agent.store_workloads),
            _file("numbers of prefixes", agent.realizer.numbers, agent.realizer.save_numbers),
        ]

    async def _lock_lost(self) -> bool:
        return await asyncio.to_thread(self._lock.lost)

    async def _services_lost(self) -> bool:
        return not await asyncio.to_thread((self._directory / balancing.FILE).exists)

    def _ready(self) -> dict[int, Endpoint]:
        return {item.id: item for item in self._agent.endpoints.endpoints() if item.state == State.READY}

    async def _still(self, gone: Callable[[dict[int, Endpoint]], Collection[int]]) -> list[Endpoint]:
        """Endpoints that were ready before ``gone`` looked (in a thread) and are so afterwards: of those it is true.

        An endpoint becomes ready after its files are written, and they are removed after it is so no more.
        """
        before = self._ready()
        missing = await asyncio.to_thread(gone, before)
        after = self._ready()
        return [before[number] for number in missing if after.get(number) is before[number]]

    async def _unattached(self) -> dict[str, bytes]:
        """The files that are gone while their endpoints are there; what is there is remembered."""
        present: dict[str, bytes] = {}
        changed = await asyncio.to_thread(_change, self._directory / "cni")
        if changed == self._seen:
            return {}

        def gone(ready: dict[int, Endpoint]) -> list[int]:
            present.update(_contents(self._directory / "cni"))
            return [number for number, item in ready.items() if _attachment(item) in self._attachments.keys() - present]

        lost = {_attachment(item): self._attachments[_attachment(item)] for item in await self._still(gone)}
        self._attachments = present | lost
        self._seen = -1 if lost else changed
        return lost

    async def _attachments_lost(self) -> bool:
        return bool(await self._unattached())

    async def _attach(self) -> None:
        def write(files: dict[str, bytes]) -> None:
            directory = self._directory / "cni"
            directory.mkdir(mode=0o700, exist_ok=True)
            for name, data in files.items():
                atomicfile.write_bytes(directory / name, data)

        await asyncio.to_thread(write, await self._unattached())

    async def _unrecorded(self) -> list[Endpoint]:
        return await self._still(self._records.missing)

    async def _records_lost(self) -> bool:
        return bool(await self._unrecorded())

    async def _record(self) -> None:
        await asyncio.to_thread(self._records.open)
        # all are asked for at once, while they are ready: whoever removes one later does so after this
        await asyncio.gather(*[self._records.save(endpoint) for endpoint in await self._unrecorded()])

    async def _renew(self) -> None:
        await asyncio.to_thread(self._lock.renew)
        # said again, what an owner has is written with everybody else's
        await self._agent.ipam.claim(ROUTER, self._agent.ipam.router.addresses)

    def status(self) -> tuple[str, str]:
        """State and one line for people; what was lost once is worth a look until the agent ends."""
        if self._told:
            return "warning", f"{self._directory}: {self._told}; a store that is a file here begins anew with the agent"
        return "ok", f"complete in {self._directory}"


def _file(name: str, file: StateFile, write: Callable[[], Awaitable[None]]) -> _Part:
    return _Part(name, file.gone, write, lambda: file.owed)


def _attachment(endpoint: Endpoint) -> str:
    return f"{endpoint.request.host_ifname}.json"


def _change(directory: Path) -> int:
    """When something came or went there, in ns; 0 where the directory is gone."""
    try:
        return directory.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _contents(directory: Path) -> dict[str, bytes]:
    found = {}
    for path in directory.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # it goes with its container
            found[path.name] = path.read_bytes()
    return found
