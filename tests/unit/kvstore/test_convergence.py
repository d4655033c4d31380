"""Many nodes want the same and overlapping label sets, somebody deletes keys, and the operator collects. Tier unit.

What has to hold afterwards, whatever happened in which order: every label set that is in use has one number on every
node, no number stands for two label sets, and master and slave keys of all that is in use are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from ciliate.kvstore import Event, Put
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.lab.etcdserver import Etcd
from ciliate.labels import LabelSet
from ciliate_kvstore.etcdv3.store import EtcdStore
from ciliate_kvstore.identity_backend import MASTERS, VALUES, KvstoreIdentities

from .etcd_harness import namespace, opened

SECONDS = float(os.environ.get("CILIATE_CONVERGENCE_SECONDS", "3"))
ENOUGH = 25 * SECONDS
"""Endpoints that each node makes at least."""
PATIENCE = 50.0
LABELS = [LabelSet.parse([f"k8s:app={number}", "k8s:tier=x"]) for number in range(40)]
PROVIDERS = ["etcd", "etcd3", "etcd", "etcd3"]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with Etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


class Node:
    """One node: its identities, and what its endpoints hold."""

    def __init__(self, store: EtcdStore, name: str) -> None:
        self.local = LocalKeys(store, sync_interval=3600)  # nothing here may wait for the next comparison
        self.identities = KvstoreIdentities(store, name, local=self.local)
        self.held: dict[str, list[int]] = {}
        self.made = 0

    async def churn(self, chance: random.Random, until: float) -> None:
        """Endpoints come and go; one that stays must keep its number. A busy machine takes longer to make as many."""
        while time.monotonic() < until or (self.made <= ENOUGH and time.monotonic() < until + PATIENCE):
            labels = chance.choice(LABELS)
            numbers = self.held.setdefault(labels.key, [])
            if numbers and chance.random() < 0.5:
                await self.identities.release(numbers.pop())
            else:
                number = (await self.identities.allocate(labels)).id
                assert set(numbers) <= {number}, f"{labels.key} is {number} and was {numbers}"
                numbers.append(number)
                self.made += 1
            await asyncio.sleep(chance.random() * 0.01)

    def in_use(self) -> dict[str, int]:
        """Label sets that endpoints here have, with their numbers."""
        return {key: numbers[0] for key, numbers in self.held.items() if numbers}


@contextlib.asynccontextmanager
async def cluster(etcd: Etcd, prefix: str) -> AsyncIterator[list[Node]]:
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for number, provider in enumerate(PROVIDERS):
            store = await stack.enter_async_context(opened(etcd, provider, prefix=prefix))
            node = Node(store, f"n{number}")
            await node.local.start()
            stack.push_async_callback(node.local.stop)
            await node.identities.start()
            stack.push_async_callback(node.identities.stop)
            nodes.append(node)
        yield nodes


async def vandal(store: EtcdStore, chance: random.Random, until: float, prefixes: list[str]) -> int:
    """Deletes keys of all kinds; how many."""
    deleted = 0
    while time.monotonic() < until:
        items = (await store.get_prefix(chance.choice(prefixes))).items
        for item in chance.sample(items, min(len(items), 3)):
            deleted += await store.delete(item.key)
        await asyncio.sleep(chance.random() * 0.2)
    return deleted


async def collector(store: EtcdStore, until: float) -> int:
    """The operator, without any of its patience."""
    operator, removed = KvstoreIdentities(store, "operator"), 0
    while time.monotonic() < until:
        removed += await operator.collect(grace=0.0)
        await asyncio.sleep(0.01)
    return removed


def wrong(nodes: list[Node], masters: dict[int, str], slaves: dict[str, int], one_number: bool) -> list[str]:
    """What does not agree. Without ``one_number`` nodes that began apart may stay so, each with all of its keys."""
    found, used = [], [node.in_use() for node in nodes]
    for key in {key for node in used for key in node}:
        numbers = {node[key] for node in used if key in node}
        if one_number and len(numbers) > 1:
            found.append(f"{key} has the numbers {numbers}")
        for number in numbers:
            if masters.get(number) != key:
                found.append(f"master of {number} is {masters.get(number)}, expected {key}")
    for index, node in enumerate(used):
        for key, number in node.items():
            if slaves.get(f"{key}/n{index}") != number:
                found.append(f"slave of {key} on n{index} is {slaves.get(f'{key}/n{index}')}, expected {number}")
    for slave in slaves:
        key, _, name = slave.rpartition("/")
        if key not in used[int(name[1:])]:
            found.append(f"slave {slave} is left over")
    return found


async def settled(store: EtcdStore, nodes: list[Node], one_number: bool) -> None:
    problems: list[str] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            while True:
                masters = (await store.get_prefix(MASTERS)).items
                slaves = (await store.get_prefix(VALUES)).items
                problems = wrong(
                    nodes,
                    {int(item.key.removeprefix(MASTERS)): item.value.decode() for item in masters},
                    {item.key.removeprefix(VALUES): int(item.value) for item in slaves},
                    one_number,
                )
                if not problems:
                    return
                await asyncio.sleep(0.05)
    assert problems == []


@pytest.mark.parametrize(
    "deleted", [[], [MASTERS], [MASTERS, VALUES]], ids=["nothing", "masters", "masters and slaves"]
)
async def test_nodes_agree_whatever_is_deleted_and_collected_meanwhile(etcd: Etcd, deleted: list[str]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, until = random.Random(seed), time.monotonic() + SECONDS
    prefix = namespace()
    async with cluster(etcd, prefix) as nodes, opened(etcd, prefix=prefix) as other:
        async with asyncio.TaskGroup() as group:
            for node in nodes:
                for _ in range(3):
                    group.create_task(node.churn(random.Random(chance.random()), until))
            collected = group.create_task(collector(other, until))
            if deleted:
                group.create_task(vandal(other, random.Random(chance.random()), until, deleted))
        # who deletes both keys of a label set, milliseconds after it was new, hides it from those who lag behind
        one_number = VALUES not in deleted
        await settled(other, nodes, one_number)
        made = sum(node.made for node in nodes)
        assert made > len(nodes) * ENOUGH and collected.result() > 0, (made, collected.result())
        # what nobody uses any more goes, what somebody uses stays
        operator = KvstoreIdentities(other, "operator")
        await operator.collect()
        used = {number for node in nodes for number in node.in_use().values()}
        left = {int(item.key.removeprefix(MASTERS)) for item in (await other.get_prefix(MASTERS)).items}
        assert left == used
        await settled(other, nodes, one_number)


async def test_a_collector_and_an_allocation_at_the_same_moment_never_both_win(etcd: Etcd) -> None:
    """The last user goes, the collector comes, and a new user of the same labels comes as well: again and again."""
    prefix, labels = namespace(), LABELS[0]
    async with cluster(etcd, prefix) as nodes, opened(etcd, prefix=prefix) as other:
        operator, until = KvstoreIdentities(other, "operator"), time.monotonic() + SECONDS / 2
        rounds = 0
        while time.monotonic() < until:
            first = await nodes[0].identities.allocate(labels)
            await nodes[0].identities.release(first.id)
            made, _ = await asyncio.gather(nodes[1].identities.allocate(labels), operator.collect())
            for _ in range(2):
                master = await other.get(f"{MASTERS}{made.id}")
                assert master is not None and master.value.decode() == labels.key
                await operator.collect()  # at most a number from before, that nobody uses any more
            await nodes[1].identities.release(made.id)
            rounds += 1
        assert rounds > 20


async def test_a_hundred_new_identities_a_second(etcd: Etcd) -> None:
    prefix = namespace()
    async with cluster(etcd, prefix) as nodes:
        labels = [LabelSet.parse([f"k8s:app=new-{number}"]) for number in range(200)]
        began = time.monotonic()
        found = await asyncio.gather(*(node.identities.allocate(item) for item in labels for node in nodes[:2]))
        took = time.monotonic() - began
        assert [item.id for item in found[::2]] == [item.id for item in found[1::2]]
        assert len({item.id for item in found}) == 200
        assert 200 / took > 100, f"{200 / took:.0f} identities a second"


@pytest.mark.parametrize("provider", ["etcd", "etcd3"])
async def test_a_key_that_goes_before_its_writer_hears_that_it_is_there_is_written_again(
    etcd: Etcd, provider: str
) -> None:
    async with opened(etcd, provider, prefix=namespace()) as store:
        local = LocalKeys(store, sync_interval=3600)
        await local.start()
        local.guard(VALUES)
        key = f"{VALUES}k8s:app=a;/n0"
        done = await store.transaction([], [Put(key, b"300", await local.lease())])
        await store.delete(key)
        local.adopt(key, b"300", done.revision)
        try:
            async with asyncio.timeout(10):
                while await store.get(key) is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            await local.stop()


async def test_what_went_later_than_it_was_written_stays_to_be_written(etcd: Etcd) -> None:
    async with opened(etcd, prefix=namespace()) as store:
        local = LocalKeys(store)
        local.set("a", b"1")
        local._dirty.clear()
        local._deleted([Event("delete", "a", b"", 7)])
        local._mark("a")
        local.adopt("a", b"1", 5)
        assert "a" in local._dirty
        local.adopt("a", b"1", 8)
        assert "a" not in local._dirty
