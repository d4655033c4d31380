"""What somebody removes from the state directory is told from what its own writer has not finished. Tier unit.

Agent, policies, pods, prefixes and records are the real ones; what stands for the kernel only notes what it is told.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.endpoint.requests import request
from tests.unit.endpoint.test_manager import Backend, Kernel

from ciliate import atomicfile
from ciliate.agent.daemon import Agent
from ciliate.agent.stateguard import StateGuard
from ciliate.config import AgentConfig
from ciliate.endpoint.manager import EndpointManager
from ciliate.endpoint.store import EndpointStore
from ciliate.identity.filter import LabelFilter
from ciliate.manifest import loads
from ciliate.plugin import PluginManager
from ciliate.service.store import ServiceStore

PATIENCE = 10.0
"""Seconds after which a wait that nothing ends counts as a failure."""
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: a, namespace: default}
spec: {endpointSelector: {}, ingress: [{fromCIDR: [192.0.2.0/24]}]}
"""
POD = {"kind": "Pod", "metadata": {"name": "a", "namespace": "default", "labels": {"app": "a"}}}


class Services:
    """As much of the service manager as writes its file."""

    def __init__(self, directory: Path) -> None:
        self._store = ServiceStore(directory / "services.db")

    async def save(self) -> None:
        self._store.save()


class Node:
    """An agent's parts that keep something in the state directory, and the guard of that."""

    def __init__(self, directory: Path) -> None:
        config = AgentConfig(state_dir=str(directory), run_dir=str(directory / "run"))
        self.directory = directory
        self.agent = agent = Agent(config, PluginManager.load())
        agent.datapath, agent.backend = SimpleNamespace(), Backend()  # type: ignore[assignment]
        agent.ipam = SimpleNamespace()  # type: ignore[assignment]
        agent._make_endpoints()
        agent.balancing = SimpleNamespace(manager=Services(directory))  # type: ignore[assignment]
        agent._lock.acquire()
        self.records = EndpointStore(directory / "endpoints")
        self.records.open()
        kernel = Kernel(agent.repository)
        self.endpoints = agent.endpoints = EndpointManager(
            realizer=kernel,  # type: ignore[arg-type]
            repository=agent.repository,
            backend=agent.backend,
            ipcache=agent.ipcache,
            workloads=agent.workloads,
            label_filter=LabelFilter(""),
            store=self.records,
        )
        agent.policies._realizer = kernel  # type: ignore[assignment]
        agent.policies.on_change = lambda revision: None
        self.guard = StateGuard(agent, directory, agent._lock, self.records)

    async def import_policy(self) -> None:
        await self.agent.policies.import_documents(loads(POLICY, "a.yaml"))

    async def number_prefix(self) -> None:
        await self.agent.realizer._add_prefixes({ip_network("192.0.2.0/24")})

    async def add_endpoint(self) -> None:
        await self.endpoints.create(request())

    async def put_pod(self) -> None:
        await self.agent.put_workloads([POD])

    async def close(self) -> None:
        await self.endpoints.stop()
        self.agent._lock.release()


class Disk:
    """Once it is held the next flush waits for ``release``; others pass, as on a disk with several queues."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.busy, self._go, self._fsync = threading.Event(), threading.Event(), os.fsync
        self._held = False
        patch.setattr(os, "fsync", self._flush)

    def _flush(self, descriptor: int) -> None:
        if self._held:
            self._held = False
            self.busy.set()
            assert self._go.wait(PATIENCE * 6)
        self._fsync(descriptor)

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._go.set()


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("ciliate.agent.lock._NAMESPACE", f"\0ciliate-test-{os.getpid()}", raising=False)
    made = Node(tmp_path)
    yield made
    await made.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, node: Node) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.release()


Act = Callable[[Node], Awaitable[None]]
WRITERS: dict[str, tuple[list[Act], Act, str]] = {
    "endpoint records": ([], Node.add_endpoint, "endpoints/*.json"),
    "policies": ([], Node.import_policy, "policies.json"),
    "workloads": ([], Node.put_pod, "workloads.json"),
    "numbers of prefixes": ([], Node.number_prefix, "cidr-identities.json"),
}
"""By part: what is done before, what writes it, and its files."""


@pytest.mark.parametrize("name", WRITERS)
async def test_what_its_writer_has_not_finished_is_not_lost(name: str, node: Node, disk: Disk) -> None:
    before, write, pattern = WRITERS[name]
    for step in before:
        await step(node)
    disk.hold()
    writing = asyncio.ensure_future(write(node))
    assert await asyncio.to_thread(disk.busy.wait, PATIENCE)
    async with asyncio.timeout(PATIENCE):
        await node.guard.look()
    assert node.guard.status()[0] == "ok"
    disk.release()
    await writing
    await node.guard.look()
    assert node.guard.status()[0] == "ok"
    for path in node.directory.glob(pattern):
        path.unlink()
    await node.guard.look()
    assert name in node.guard.status()[1]
    assert list(node.directory.glob(pattern))


async def test_what_goes_while_somebody_looks_is_not_lost(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.add_endpoint()
    [number] = [endpoint.id for endpoint in node.endpoints.endpoints()]
    loop, missing = asyncio.get_running_loop(), node.records.missing

    def late(numbers: Any) -> list[int]:
        wanted = list(numbers)
        asyncio.run_coroutine_threadsafe(node.endpoints.delete(number), loop).result(PATIENCE)
        return missing(wanted)

    monkeypatch.setattr(node.records, "missing", late)
    await node.guard.look()
    monkeypatch.undo()
    assert node.guard.status()[0] == "ok"
    assert not list(node.directory.glob("endpoints/*.json"))


async def test_writers_of_one_file_do_not_meet(node: Node, disk: Disk) -> None:
    disk.hold()
    first = asyncio.ensure_future(node.put_pod())
    assert await asyncio.to_thread(disk.busy.wait, PATIENCE)
    second = asyncio.ensure_future(node.agent.put_workloads([{**POD, "metadata": {**POD["metadata"], "name": "b"}}]))
    await asyncio.wait([second], timeout=0.1)
    disk.release()
    await asyncio.gather(first, second)
    kept = atomicfile.read_json(node.directory / "workloads.json")
    assert {pod["name"] for pod in kept["pods"]} == {"a", "b"}
