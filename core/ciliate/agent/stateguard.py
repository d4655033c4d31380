"""What somebody removes from the state directory is written again while the agent, which knows it, still runs.

Without that nobody would notice before the next start, which takes devices without records for leftovers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ciliate.agent import balancing
from ciliate.agent.lock import AgentLock, make_directory
from ciliate.endpoint.state import State
from ciliate.ipam import ROUTER

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint
    from ciliate.endpoint.store import EndpointStore

log = logging.getLogger(__name__)
INTERVAL = 5.0


class _Part(NamedTuple):
    """Something in the directory. ``lost`` blocks and asks whether it is gone."""

    name: str
    lost: Callable[[], bool]
    write: Callable[[], Awaitable[None]]


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
        lost = await asyncio.to_thread(lambda: [part for part in self._parts() if part.lost()])
        if not lost:
            return
        names = ", ".join(part.name for part in lost)
        log.error("state directory %s: %s: somebody removed this; it is written again", self._directory, names)
        await asyncio.to_thread(make_directory, self._directory, "state-dir", 0o750)
        for part in lost:
            await part.write()
        self._told = f"{names} removed by somebody and written again at {time.strftime('%H:%M:%S')}"

    def _parts(self) -> list[_Part]:
        agent, directory = self._agent, self._directory
        policies, workloads, services = (
            directory / name for name in ("policies.json", "workloads.json", balancing.FILE)
        )
        return [
            _Part("the lock", self._lock.lost, self._renew),
            _Part("endpoint records", lambda: bool(self._unrecorded()), self._record),
            _Part("attachments of containers", lambda: bool(self._unattached()), self._attach),
            _Part("policies", lambda: bool(agent.repository.objects()) and not policies.exists(), agent.policies.save),
            _Part("workloads", lambda: agent.workloads.known() and not workloads.exists(), agent.store_workloads),
            _Part("numbers of prefixes", agent.realizer.numbers_lost, agent.realizer.save_numbers),
            _Part("services", lambda: not services.exists(), agent.balancing.manager.save),
        ]

    def _ready(self) -> dict[int, Endpoint]:
        return {item.id: item for item in self._agent.endpoints.endpoints() if item.state == State.READY}

    def _unattached(self) -> list[str]:
        """The names of files that are gone while their endpoints are there; what is there is remembered."""
        directory = self._directory / "cni"
        changed = directory.stat().st_mtime_ns if directory.exists() else 0
        if changed != self._seen:
            present = {path.name: path.read_bytes() for path in directory.glob("*.json")}
            wanted = {f"{item.request.host_ifname}.json" for item in self._ready().values()}
            lost = {name: data for name, data in self._attachments.items() if name in wanted - present.keys()}
            self._attachments = present | lost
            self._seen = -1 if lost else changed
            return list(lost)
        return []

    async def _attach(self) -> None:
        def write() -> None:
            directory = self._directory / "cni"
            directory.mkdir(mode=0o700, exist_ok=True)
            for name in self._unattached():
                (directory / name).write_bytes(self._attachments[name])

        await asyncio.to_thread(write)

    def _unrecorded(self) -> list[Endpoint]:
        ready = self._ready()
        return [ready[number] for number in self._records.missing(ready)]

    async def _record(self) -> None:
        await asyncio.to_thread(self._records.open)
        for endpoint in await asyncio.to_thread(self._unrecorded):
            await self._records.save(endpoint)

    async def _renew(self) -> None:
        await asyncio.to_thread(self._lock.renew)
        # said again, what an owner has is written with everybody else's
        await self._agent.ipam.claim(ROUTER, self._agent.ipam.router.addresses)

    def status(self) -> tuple[str, str]:
        """State and one line for people; what was lost once is worth a look until the agent ends."""
        if self._told:
            return "warning", f"{self._directory}: {self._told}; a store that is a file here begins anew with the agent"
        return "ok", f"complete in {self._directory}"
