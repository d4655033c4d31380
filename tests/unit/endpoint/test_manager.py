"""The endpoint manager when parts fail: no old right outlives the grace period, nothing is stuck. Tier unit.

Store, identities, policy and workloads are the real ones; what stands for the kernel only notes what it is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from ciliate.endpoint import manager as module
from ciliate.endpoint.manager import EndpointManager, EndpointMissingError
from ciliate.endpoint.model import Endpoint
from ciliate.endpoint.state import State
from ciliate.endpoint.store import EndpointStore
from ciliate.identity import INIT, Identity
from ciliate.identity.filter import LabelFilter
from ciliate.ipcache import Ipcache
from ciliate.labels import LabelSet
from ciliate.policy.repository import Repository
from ciliate.workload import WorkloadRegistry

from .requests import request


class Kernel:
    """Takes the realizer's place and notes the identity that would be in the kernel."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.endpoints: Any = {}
        self.identities: dict[int, int] = {}
        self.failing = 0
        self.hold: asyncio.Event | None = None
        self.calls: list[str] = []

    async def attach(self, endpoint: Endpoint) -> None:
        await self._write("attach", endpoint)

    async def change_identity(self, endpoint: Endpoint) -> None:
        await self._write("change", endpoint)

    async def _write(self, call: str, endpoint: Endpoint) -> None:
        self.calls.append(call)
        if self.hold is not None:
            await self.hold.wait()
        if self.failing:
            self.failing -= 1
            raise OSError("the map is full")
        self._repository.register_endpoint(endpoint.id, endpoint.identity, endpoint.named_ports)
        self.identities[endpoint.id] = endpoint.identity

    async def detach(self, endpoint: Endpoint) -> None:
        if self.failing:
            self.failing -= 1
            raise OSError("the map is busy")
        self._repository.unregister_endpoint(endpoint.id)
        self.identities.pop(endpoint.id, None)

    async def realize(self) -> None:
        self.calls.append("realize")


class Backend:
    """Identities with references, and a switch that takes the store away."""

    def __init__(self) -> None:
        self.references: dict[int, int] = {}
        self._numbers: dict[str, int] = {}
        self.down = False

    async def allocate(self, labels: LabelSet) -> Identity:
        if self.down:
            raise OSError("the store is away")
        number = self._numbers.setdefault(labels.key, 256 + len(self._numbers))
        self.references[number] = self.references.get(number, 0) + 1
        return Identity(number, labels)

    async def release(self, number: int) -> None:
        self.references[number] -= 1
        if not self.references[number]:
            del self.references[number]


class World:
    def __init__(self, path: Path) -> None:
        self.repository = Repository()
        self.kernel = Kernel(self.repository)
        self.backend = Backend()
        self.workloads = WorkloadRegistry()
        self.store = EndpointStore(path / "endpoints")
        self.store.open()
        self.manager = EndpointManager(
            realizer=self.kernel,
            repository=self.repository,
            backend=self.backend,
            ipcache=Ipcache(),
            workloads=self.workloads,
            label_filter=LabelFilter(),
            store=self.store,
            grace_period=0.05,
        )

    def tell(self, ports: list[dict[str, Any]] | None = None, **labels: str) -> set[str]:
        metadata = {"namespace": "default", "name": "pod", "labels": labels}
        return self.workloads.upsert(
            [{"kind": "Pod", "metadata": metadata, "spec": {"containers": [{"ports": ports or []}]}}]
        )

    async def create(self) -> Endpoint:
        pod = request(ipv4=IPv4Address("10.0.0.9"), pod_namespace="default", pod_name="pod")
        return await self.manager.create(pod)

    async def relabel(self, **labels: str) -> None:
        await self.manager.relabel_pods(self.tell(**labels))


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(module, "RETRY_BASE", 0.01)
    made = World(tmp_path)
    yield made
    await made.manager.stop()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_changed_label_gives_another_identity_and_releases_the_old_one_later(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    old = endpoint.identity
    await world.relabel(org="alliance")
    assert endpoint.identity != old and world.kernel.identities[endpoint.id] == endpoint.identity
    assert endpoint.state == State.READY and world.backend.references == {old: 1, endpoint.identity: 1}
    await until(lambda: world.backend.references == {endpoint.identity: 1})
    (record,) = world.store.load()
    assert record.identity == endpoint.identity and record.labels == endpoint.labels


async def test_a_label_that_changes_while_the_endpoint_is_made_is_not_lost(world: World) -> None:
    world.tell(org="empire")
    world.kernel.hold = asyncio.Event()
    creating = asyncio.create_task(world.create())
    await until(lambda: world.kernel.calls)
    changing = asyncio.create_task(world.relabel(org="alliance"))
    await asyncio.sleep(0)
    world.kernel.hold.set()
    endpoint = await creating
    await changing
    assert "k8s:org=alliance" in endpoint.labels.strings()
    assert world.kernel.identities[endpoint.id] == endpoint.identity


async def test_many_changes_at_once_are_few_regenerations(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    world.kernel.calls.clear()
    await asyncio.gather(*(world.relabel(org=f"org-{number}") for number in range(50)))
    assert "k8s:org=org-49" in endpoint.labels.strings()
    assert len([call for call in world.kernel.calls if call == "change"]) <= 2
    await until(lambda: world.backend.references == {endpoint.identity: 1})


async def test_old_rights_end_with_the_grace_period_where_the_store_is_away(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    old = endpoint.identity
    world.backend.down = True
    await world.relabel(org="alliance")
    assert world.kernel.identities[endpoint.id] == old  # within the grace period
    assert endpoint.state == State.WAITING_FOR_IDENTITY and "the store is away" in endpoint.last_error
    assert endpoint.health(1)["bpf"] == "Failure"
    await until(lambda: world.kernel.identities[endpoint.id] == INIT)
    assert endpoint.health(1)["bpf"] == "Warning"
    world.backend.down = False
    await until(lambda: world.kernel.identities[endpoint.id] not in (INIT, old))
    await until(lambda: not endpoint.failures)
    assert endpoint.state == State.READY
    await until(lambda: world.backend.references == {endpoint.identity: 1})


async def test_a_kernel_that_refuses_is_asked_again(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    world.kernel.failing = 2
    await world.relabel(org="alliance")
    assert endpoint.state == State.REGENERATING and "the map is full" in endpoint.last_error
    await until(lambda: endpoint.state == State.READY)
    assert world.kernel.identities[endpoint.id] == endpoint.identity
    await until(lambda: world.backend.references == {endpoint.identity: 1})


async def test_a_full_disk_keeps_no_old_rights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.tell(org="empire")
    endpoint = await world.create()

    def full(endpoint: Endpoint) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "save", full)
        await world.relabel(org="alliance")
        assert world.kernel.identities[endpoint.id] == endpoint.identity
        assert endpoint.state == State.READY and "no space left" in endpoint.last_error
    await until(lambda: not endpoint.failures)
    assert world.store.load()[0].identity == endpoint.identity


async def test_changed_ports_alone_are_followed(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    identity = endpoint.identity
    await world.manager.relabel_pods(world.tell([{"name": "web", "containerPort": 80}], org="empire"))
    assert endpoint.named_ports == {"web": [("TCP", 80)]} and endpoint.identity == identity
    assert world.backend.references == {identity: 1}


async def test_a_pod_that_is_forgotten_keeps_its_labels(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    world.workloads.clear()
    assert not await world.manager.relabel(endpoint)
    await world.manager.change_labels(endpoint, LabelSet.parse(["color=red"]), LabelSet())
    assert {"k8s:org=empire", "unspec:color=red"} <= set(endpoint.labels.strings())


async def test_a_delete_that_the_kernel_refuses_can_be_repeated(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    world.kernel.failing = 1
    with pytest.raises(OSError, match="busy"):
        await world.manager.delete(endpoint.id)
    assert world.manager.get(endpoint.id).state == State.DISCONNECTING
    assert await world.manager.delete(endpoint.id) == []
    with pytest.raises(EndpointMissingError):
        world.manager.get(endpoint.id)
    assert world.backend.references == {} and world.store.load() == []


async def test_a_delete_ends_pending_attempts(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    world.backend.down = True
    await world.relabel(org="alliance")
    assert await world.manager.delete(endpoint.id) == []
    assert world.backend.references == {} and not await world.manager.relabel(endpoint)


async def test_pods_told_before_a_crash_count_after_it(world: World) -> None:
    world.tell(org="empire")
    endpoint = await world.create()
    await world.manager.stop()
    world.tell(org="alliance")
    world.manager._endpoints.clear()
    await world.manager.restore({"lxc1": 7})
    restored = world.manager.get(endpoint.id)
    assert "k8s:org=alliance" in restored.labels.strings() and restored.state == State.READY
    assert world.kernel.identities[endpoint.id] == restored.identity != endpoint.identity
