"""Identities of a cluster over any store: agreement, the store away, lost or wiped, keys deleted by others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ciliate.identity import Identity
from ciliate.identity.backend import IdentityError
from ciliate.kvstore import KvstoreError
from ciliate.kvstore.local import Contents, LocalStore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.labels import Label, LabelSet
from ciliate_kvstore import identity_backend
from ciliate_kvstore.identity_backend import MASTERS, VALUES, KvstoreIdentities

A, B = LabelSet.parse(["k8s:app=a"]), LabelSet.parse(["k8s:app=b"])


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Store(LocalStore):
    """A store that can be away."""

    away = False

    def _open(self) -> Contents:
        if self.away:
            raise KvstoreError("the store is away")
        return super()._open()

    def goes(self, away: bool) -> None:
        """Go away, or come back; watches hear of it."""
        self.away = away
        self._contents.wake()


@contextlib.asynccontextmanager
async def node(store: Any, directory: Path, name: str = "n1", **options: Any) -> AsyncIterator[KvstoreIdentities]:
    local = LocalKeys(store, state=directory / f"{name}-lease.json", **options)
    backend = KvstoreIdentities(store, name, local=local, cache=directory / f"{name}.json", grace=0.3)
    await local.start()
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()
        await local.stop()


def keys(store: LocalStore, prefix: str) -> dict[str, str]:
    items = store._contents.items
    return {key.removeprefix(prefix): item.value.decode() for key, item in items.items() if key.startswith(prefix)}


async def test_a_number_costs_one_transaction_and_lies_under_the_lease_of_its_node(tmp_path: Path) -> None:
    store = Store("memory", Contents())
    async with node(store, tmp_path) as backend:
        await until(lambda: backend._local.lease_id)
        revision = store._contents.revision
        number = (await backend.allocate(A)).id
        # a look for users, then master and slave at once
        assert store._contents.revision == revision + 1
        assert keys(store, MASTERS) == {str(number): A.key}
        slave = store._contents.items[f"{VALUES}{A.key}/n1"]
        assert (slave.value, slave.lease) == (str(number).encode(), backend._local.lease_id)
        assert store._contents.items[f"{MASTERS}{number}"].lease == 0


async def test_nodes_that_ask_at_once_converge(tmp_path: Path) -> None:
    store = Store("memory", Contents())
    labels = [LabelSet.parse([f"k8s:app={number}"]) for number in range(30)]
    async with contextlib.AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(node(store, tmp_path, f"n{number}")) for number in range(5)]
        answers = await asyncio.gather(*(item.allocate(one) for one in labels for item in nodes))
        numbers = [{answer.id for answer in answers[5 * index : 5 * index + 5]} for index in range(30)]
        assert all(len(found) == 1 for found in numbers)
        assert len(set().union(*numbers)) == 30
        assert len(keys(store, MASTERS)) == 30
        assert len(keys(store, VALUES)) == 150


async def test_without_the_store_known_labels_have_their_number_and_new_ones_an_error(tmp_path: Path) -> None:
    store = Store("memory", Contents())
    async with node(store, tmp_path) as backend, node(store, tmp_path, "n2") as other:
        known = (await other.allocate(B)).id
        await until(lambda: backend.get(known))
        store.goes(away=True)
        await until(lambda: backend._watcher.problem)
        assert (await backend.allocate(B)).id == known
        with pytest.raises(IdentityError, match=r"k8s:app=a=?;: are new here, and the store cannot be asked: .* away"):
            await backend.allocate(A)
        assert f"{B.key}/n1" not in keys(store, VALUES)
        store.goes(away=False)
        await until(lambda: f"{B.key}/n1" in keys(store, VALUES))
        assert (await backend.allocate(A)).id != known


async def test_a_start_without_the_store_knows_what_the_last_run_knew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_backend, "START_PATIENCE", 0.05)
    store = Store("memory", Contents())
    async with node(store, tmp_path) as backend:
        number = (await backend.allocate(A)).id
        await until(lambda: backend._watcher.items)
    store.goes(away=True)
    async with node(store, tmp_path) as backend:
        assert backend.get(number) == Identity(number, A)
        assert (await backend.allocate(A)).id == number
        # labels that the cache lost too: the endpoint's own record has the number
        assert (await backend.allocate(B, 4711)).id == 4711
        store.goes(away=False)
        await until(lambda: keys(store, MASTERS).get("4711") == B.key)
        await until(lambda: f"{B.key}/n1" in keys(store, VALUES))


async def test_a_store_that_lost_its_data_gets_the_same_numbers_again(tmp_path: Path) -> None:
    store = Store("memory", Contents())
    async with node(store, tmp_path) as backend, node(store, tmp_path, "n2") as other:
        mine, theirs = (await backend.allocate(A)).id, (await other.allocate(B)).id
        await until(lambda: backend.get(theirs) and other.get(mine))
        gone: list[int] = []
        backend.subscribe(lambda added, removed: gone.extend(removed))
        contents = store._contents
        store.goes(away=True)
        await until(lambda: backend._watcher.problem and other._watcher.problem)
        contents.items.clear()
        for lease in list(contents._timers):
            contents._timers.pop(lease).cancel()
        contents.revision += 1
        contents.compact(contents.revision + 1)
        store.goes(away=False)
        for item in (backend, other):
            item._local.sync_soon()
        await until(lambda: keys(store, MASTERS) == {str(mine): A.key, str(theirs): B.key})
        await until(lambda: len(keys(store, VALUES)) == 2)
        # a node that uses neither number proposes what it knows to be theirs
        assert (await backend.allocate(B)).id == theirs
        await until(lambda: not backend._watcher.held)
        assert gone == []


async def test_numbers_that_others_took_meanwhile_are_told(tmp_path: Path) -> None:
    store = Store("memory", Contents())
    async with node(store, tmp_path) as backend:
        number = (await backend.allocate(A)).id
        await until(lambda: backend._watcher.items)
        told: list[Identity] = []
        backend.subscribe(lambda added, removed: told.extend(added))
        await store.put(f"{MASTERS}{number}", B.key.encode())
        await store.delete(f"{VALUES}{A.key}/n1")
        await until(lambda: told == [Identity(number, B)])
        other = await backend.allocate(A)
        assert other.id != number
        assert keys(store, MASTERS) == {str(number): B.key, str(other.id): A.key}


async def test_slave_keys_that_an_earlier_run_left_are_given_up(tmp_path: Path) -> None:
    store = Store("memory", Contents())
    async with node(store, tmp_path) as backend:
        await backend.allocate(A)
        await backend.allocate(B)
    async with node(store, tmp_path) as backend:
        await until(lambda: backend._local.lease_id)
        await backend.allocate(A)
        await backend.settle()
        await until(lambda: list(keys(store, VALUES)) == [f"{A.key}/n1"])


async def test_collection_waits_for_its_grace_and_looks_for_users_again(tmp_path: Path) -> None:
    store = Store("memory", Contents())
    async with node(store, tmp_path) as backend, node(store, tmp_path, "n2") as other:
        number = (await backend.allocate(A)).id
        await backend.release(number)
        assert await other.collect(grace=0.2) == 0
        await asyncio.sleep(0.25)
        race = asyncio.gather(other.collect(grace=0.2), backend.allocate(A))
        removed, again = await race
        assert keys(store, MASTERS) == {str(again.id): A.key}
        assert removed in (0, 1)
        await backend.release(again.id)
        assert await other.collect(grace=0.2) == 0
        await asyncio.sleep(0.25)
        assert await other.collect(grace=0.2) == 1
        assert keys(store, MASTERS) == {}


async def test_labels_that_look_like_others_get_a_number_of_their_own(tmp_path: Path) -> None:
    forged = LabelSet([Label("k8s", "user", "admin;k8s:zone=x")])
    store = Store("memory", Contents())
    async with node(store, tmp_path) as one, node(store, tmp_path, "n2") as other:
        admin = await one.allocate(LabelSet.parse(["k8s:user=admin", "k8s:zone=x"]))
        stranger = await other.allocate(forged)
        assert stranger.id != admin.id and stranger.labels == forged
        assert one.get(admin.id) == admin


@pytest.mark.parametrize("number", ["1", "2", "128", "0", "16777217", "70000"])
async def test_a_number_that_no_backend_may_give_is_not_joined(tmp_path: Path, number: str) -> None:
    store = Store("memory", Contents())
    await store.put(f"{VALUES}{A.key}/forger", number.encode())
    async with node(store, tmp_path) as backend:
        with pytest.raises(IdentityError, match="no number could be agreed on"):
            await backend.allocate(A)
        assert keys(store, MASTERS) == {}


@pytest.mark.parametrize(
    "key",
    [
        "reserved:host=;",
        "cidr:10.0.0.0/8=;reserved:world=;",
        "k8s:app=a;reserved:host=;",
        "k8s:app=a b;",
        "",
    ],
)
async def test_identities_of_the_store_have_labels_of_pods(tmp_path: Path, key: str) -> None:
    store = Store("memory", Contents())
    await store.put(f"{MASTERS}300", key.encode())
    await store.put(f"{MASTERS}301", A.key.encode())
    async with node(store, tmp_path) as backend:
        await until(lambda: backend.get(301))
        assert backend.get(300) is None
