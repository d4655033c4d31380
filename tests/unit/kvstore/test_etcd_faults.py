"""What goes wrong between us and etcd: killed, wiped, compacted, stalled, slow, failing, full of strangers. Tier unit.

`docs/operations.md` says what each of these does; here is the proof.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from ciliate.kvstore import CompactedError, KvstoreError, LeaseExpiredError, LockLostError, WatchedKeys, base
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.kvstore.watcher import Watcher
from ciliate.lab.etcdserver import Etcd
from ciliate.labels import LabelSet
from ciliate_kvstore.etcdv3 import connection as connection_module
from ciliate_kvstore.etcdv3 import http2
from ciliate_kvstore.etcdv3.store import EtcdStore
from ciliate_kvstore.identity_backend import MASTERS, VALUES, KvstoreIdentities

from .etcd_harness import Collected, Proxy, namespace, opened, until, write

EACH = pytest.mark.parametrize("provider", ["etcd", "etcd3"])
"""For what the way to the members decides; where both are cheap together a test uses both."""
A, B = LabelSet.parse(["k8s:app=a"]), LabelSet.parse(["k8s:app=b"])


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    with Etcd(tmp_path / "etcd-data") as server:
        yield server


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with Etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@contextlib.asynccontextmanager
async def through_proxy(server: Etcd, **options: Any) -> AsyncIterator[tuple[EtcdStore, Proxy]]:
    async with Proxy(server.members[0].client_port) as proxy, opened(proxy.address, **options) as store:
        yield store, proxy


@EACH
async def test_killed_and_restarted_no_event_is_lost_and_none_told_twice(etcd: Etcd, provider: str) -> None:
    async with opened(etcd, provider) as store, opened(etcd) as other:
        collected = Collected(store, "k/", 1)
        for number in range(100):
            if number in (30, 60):
                await asyncio.to_thread(etcd.kill)
                restart = asyncio.create_task(asyncio.to_thread(etcd.start))
            await write(other, f"k/{number}")
        await restart
        await until(lambda: len(collected.events) >= 100)
        # a put whose answer was lost may have been done twice: two revisions, never one of them twice
        assert [event.key for event in collected.events if event.key == "k/99"] == ["k/99"]
        revisions = [event.mod_revision for event in collected.events]
        assert revisions == sorted(set(revisions))
        assert {event.key for event in collected.events} == {f"k/{number}" for number in range(100)}
        await collected.stop()


async def test_three_members_of_which_each_is_killed_once(tmp_path: Path) -> None:
    with Etcd(tmp_path / "etcd-data", members=3) as cluster:
        async with opened(cluster) as store, opened(cluster, "etcd3") as other:
            lease = await other.lease(10)
            await store.put("lease", b"", lease.id)
            collected, theirs = Collected(store, "k/", 1), Collected(other, "k/", 1)
            count, gaps = 0, []
            for member in cluster.members:
                await asyncio.to_thread(member.kill)
                for _ in range(30):
                    began = time.monotonic()
                    await write(other, f"k/{count}")
                    gaps.append(time.monotonic() - began)
                    count += 1
                await lease.keep_alive()
                await asyncio.to_thread(cluster.start)
            keys = {f"k/{number}" for number in range(count)}
            await until(lambda: {event.key for event in collected.events} == keys)
            await until(lambda: {event.key for event in theirs.events} == keys)
            for each in (store, other):
                async with asyncio.timeout(15):  # a channel that was refused asks again after a second
                    while "3/3 endpoints" not in (await each.status()).message:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            assert max(gaps) < 6
            assert await store.get("lease") is not None
            await collected.stop()
            await theirs.stop()
            # without a majority nothing is written, and that is said
            for member in cluster.members[:2]:
                await asyncio.to_thread(member.kill)
            for each in (store, other):
                status = await each.status()
                assert not status.ok
                assert "quorum" in status.message
                with pytest.raises(KvstoreError):
                    await each.put("k", b"")


@EACH
async def test_a_client_that_is_cut_off_over_a_compaction_lists_again(lasting: Etcd, provider: str) -> None:
    prefix = namespace()
    heard: list[tuple[dict[str, str], dict[str, str]]] = []
    way = through_proxy(lasting, provider=provider, prefix=prefix)
    async with opened(lasting, prefix=prefix) as writer, way as (store, proxy):
        for name in "abc":
            await writer.put(f"w/{name}", b"1")
        watcher = Watcher(
            store, "w/", lambda name, value: value.decode(), lambda *change: heard.append(change), grace=0.3
        )
        await watcher.start()
        try:
            await watcher.synced.wait()
            await proxy.refuse()
            await until(lambda: watcher.problem)
            await writer.delete("w/a")
            await writer.put("w/b", b"2")
            await writer.compact(await writer.put("w/d", b"1"))
            await proxy.listen()
            await until(lambda: watcher.items == {"b": "2", "c": "1", "d": "1"})
        finally:
            await watcher.stop()
    # a delta, and what was deleted comes last, after its grace
    assert heard == [({"a": "1", "b": "1", "c": "1"}, {}), ({"b": "2", "d": "1"}, {}), ({}, {"a": "1"})]


@pytest.mark.parametrize(("provider", "refilled"), [("etcd", False), ("etcd", True), ("etcd3", True)])
async def test_a_store_that_lost_its_data_is_noticed(etcd: Etcd, provider: str, refilled: bool) -> None:
    async with opened(etcd, provider) as store:
        for number in range(20):
            await store.put(f"k/{number}", b"old")
        start = (await store.get_prefix("k/")).revision + 1
        collected = Collected(store, "k/", start)
        await collected.standing.wait()
        await asyncio.to_thread(etcd.wipe)
        await until(lambda: collected.errors)
        await asyncio.to_thread(etcd.start)
        if refilled:
            async with opened(etcd) as other:
                for number in range(40):
                    await other.put(f"k/{number}", b"new")
        await until(lambda: any(isinstance(error, CompactedError) for error in collected.errors))
        await collected.stop()


@EACH
async def test_a_way_that_swallows_everything_is_given_up_and_comes_back(lasting: Etcd, provider: str) -> None:
    prefix = namespace()
    async with (
        opened(lasting, prefix=prefix) as writer,
        through_proxy(lasting, provider=provider, prefix=prefix, timeout=0.5) as (store, proxy),
    ):
        collected = Collected(store, "k/", await store.put("k/0", b""))
        await until(lambda: collected.events)
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(KvstoreError, match="no answer in time"):
            await store.put("k/1", b"")
        assert time.monotonic() - began < 3
        await writer.put("k/2", b"")
        proxy.go_on()
        await until(lambda: any(event.key == "k/2" for event in collected.events))
        await store.put("k/3", b"")
        await collected.stop()


@EACH
async def test_a_watch_of_a_member_that_stands_still_is_given_up(
    etcd: Etcd, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel takes everything that we send: only an unanswered ping tells. Seconds here, 13 of them elsewhere."""
    quick = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 500, "grpc.http2.ping_timeout_ms": 500}
    options = [(name, quick.get(name, value)) for name, value in connection_module.CHANNEL_OPTIONS]
    assert quick.keys() <= dict(options).keys()
    monkeypatch.setattr(connection_module, "CHANNEL_OPTIONS", options)
    monkeypatch.setattr(http2, "KEEPALIVE_TIME", 1.0)
    monkeypatch.setattr(http2, "KEEPALIVE_TIMEOUT", 0.5)
    keys = WatchedKeys("k/")
    keys.add("k/1")
    ended = []

    async def guard(store: EtcdStore) -> None:
        try:
            async for _ in store.watch_keys(keys):
                pass
        except KvstoreError as error:
            ended.append(error)

    async with opened(etcd, provider, timeout=1.0) as store, opened(etcd) as other:
        await other.put("k/1", b"")
        collected, guarding = Collected(store, "k/", 0), asyncio.create_task(guard(store))
        await collected.standing.wait()
        member = etcd.members[0]
        member.signal(signal.SIGSTOP)
        try:
            await until(lambda: collected.errors and ended)
        finally:
            member.signal(signal.SIGCONT)
        await write(other, "k/2")
        await until(lambda: any(event.key == "k/2" for event in collected.events))
        await collected.stop()
        await guarding


@EACH
async def test_of_two_members_the_one_that_swallows_everything_is_left(lasting: Etcd, provider: str) -> None:
    async with Proxy(lasting.members[0].client_port) as proxy:
        proxy.stall()
        both = f"{proxy.address};{lasting.address}"
        async with opened(both, provider, prefix=namespace(), timeout=2.0) as store:
            await store.put("k", b"")
            began = time.monotonic()
            await store.put("k", b"")
            assert time.monotonic() - began < 0.5


async def test_a_store_that_takes_two_seconds_a_call_works_slowly(lasting: Etcd) -> None:
    async with through_proxy(lasting, prefix=namespace(), timeout=10.0) as (store, proxy):
        identities = KvstoreIdentities(store, "n1")
        await identities.start()
        known = await identities.allocate(A)
        await identities.release(known.id)
        proxy.delay = 2.0
        began = time.monotonic()
        assert (await identities.allocate(A)).id == known.id
        assert time.monotonic() - began < 1.9, "what is known does not wait for the store"
        new = await identities.allocate(B)
        assert new.id != known.id
        proxy.delay = 0.0
        await identities.stop()


async def test_one_request_of_a_hundred_fails_and_everything_is_done(
    lasting: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after the server did it: nobody can know. Numbers agree and keys are there all the same."""
    chance, injected = random.Random(1), 0
    real = connection_module.Connection._attempt

    async def attempt(self: Any, endpoint: Any, path: str, request: Any, deadline: float) -> Any:
        nonlocal injected
        before, after = chance.random() < 0.02, chance.random() < 0.02
        answer = None if before else await real(self, endpoint, path, request, deadline)
        if before or after:
            injected += 1
            empty = aio.Metadata()
            raise aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, empty, empty, "Socket closed")
        return answer

    monkeypatch.setattr(connection_module.Connection, "_attempt", attempt)
    labels = [LabelSet.parse([f"k8s:app={number}"]) for number in range(100)]
    prefix = namespace()

    async def insist(backend: KvstoreIdentities, one: LabelSet) -> int:
        while True:
            try:
                return (await backend.allocate(one)).id
            except Exception as error:
                assert "Socket closed" in str(error), error

    async with opened(lasting, prefix=prefix) as first, opened(lasting, prefix=prefix) as second:
        nodes = [KvstoreIdentities(first, "n1"), KvstoreIdentities(second, "n2")]
        for node in nodes:
            await node.start()
        numbers = await asyncio.gather(*(insist(node, one) for one in labels for node in nodes))
        assert all(numbers[index] == numbers[index + 1] for index in range(0, 200, 2))
        assert len(set(numbers)) == 100
        for node in nodes:
            await (await node._keys()).flush()
        monkeypatch.undo()
        assert len((await first.get_prefix(MASTERS)).items) == 100
        assert len((await first.get_prefix(VALUES)).items) == 200
        assert injected > 10
        for node in nodes:
            await node.stop()


async def test_a_lease_that_ran_out_withdraws_nothing_and_everything_is_written_again(lasting: Etcd) -> None:
    """A clock that jumps, or a node cut off for too long: to its owner both are a lease that is gone."""
    prefix = namespace()
    changes: list[Any] = []
    async with opened(lasting, "etcd3", prefix=prefix) as store, opened(lasting, prefix=prefix) as far:
        local = LocalKeys(store, ttl=2, sync_interval=0.2)
        watcher = Watcher(far, "ip/", lambda name, value: value, lambda found, gone: changes.append(gone), grace=30)
        await local.start()
        await watcher.start()
        for number in range(300):
            local.set(f"ip/{number}", b"x")
        await local.flush()
        await until(lambda: len(watcher.items) == 300)
        lease = await store.lease(2, local.lease_id)
        await lease.revoke()
        await until(lambda: watcher.held or local.renewals)
        await until(lambda: local.renewals == 1)
        await local.flush()
        await until(lambda: not watcher.held)
        assert not any(changes)
        assert len((await store.get_prefix("ip/")).items) == 300
        await watcher.stop()
        await local.stop()


async def test_a_lease_lives_as_long_as_somebody_keeps_it(lasting: Etcd) -> None:
    async with through_proxy(lasting, prefix=namespace(), timeout=1.0) as (store, proxy):
        lease = await store.lease(1)
        await store.put("k", b"", lease.id)
        for _ in range(4):
            await asyncio.sleep(lease.ttl / 2)
            await lease.keep_alive()
        assert await store.get("k") is not None
        await proxy.refuse()
        with pytest.raises(KvstoreError) as error:
            await lease.keep_alive()
        assert not isinstance(error.value, LeaseExpiredError)
        await asyncio.sleep(2 * lease.ttl)
        await proxy.listen()
        with contextlib.suppress(KvstoreError):
            await store.status()
        with pytest.raises(LeaseExpiredError):
            while True:
                try:
                    await lease.keep_alive()
                except LeaseExpiredError:
                    raise
                except KvstoreError:
                    await asyncio.sleep(0.05)


async def test_who_holds_a_lock_and_loses_the_store_stops(lasting: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LOCK_TTL", 1.0)
    async with through_proxy(lasting, prefix=namespace(), timeout=0.5) as (store, proxy):
        began = time.monotonic()
        with pytest.raises(LockLostError):
            async with store.lock("leader"):
                proxy.stall()
                await asyncio.Event().wait()
        assert time.monotonic() - began < 4


# identities of a cluster over a real store


async def test_identities_converge_survive_and_are_collected_over_etcd(etcd: Etcd) -> None:
    labels = [LabelSet.parse([f"k8s:app={number}"]) for number in range(20)]
    async with opened(etcd) as first, opened(etcd, "etcd3") as second:
        one, two = KvstoreIdentities(first, "n1"), KvstoreIdentities(second, "n2")
        for node in (one, two):
            await node.start()
        numbers = await asyncio.gather(*(node.allocate(item) for item in labels for node in (one, two)))
        wanted = {item.key: number.id for item, number in zip(labels, numbers[::2], strict=True)}
        assert [number.id for number in numbers[::2]] == [number.id for number in numbers[1::2]]
        gone: list[int] = []
        for node in (one, two):
            node.subscribe(lambda added, removed: gone.extend(removed))
        # somebody deletes them, then the store loses everything
        await first.delete_prefix(MASTERS)
        await masters(first, wanted)
        await asyncio.to_thread(etcd.wipe)
        await asyncio.to_thread(etcd.start)
        await masters(first, wanted)
        assert gone == []
        # one lets go of half, two of nothing: nothing may be collected; then two lets go as well
        for item in labels[:10]:
            await one.release(wanted[item.key])
        for node in (one, two):
            (await node._keys()).sync_soon()
        await until_users(first, 30)
        assert await one.collect() == 0
        for item in labels[:10]:
            await two.release(wanted[item.key])
        await until_users(first, 20)
        assert await one.collect() == 10
        await masters(first, {item.key: wanted[item.key] for item in labels[10:]})
        for node in (one, two):
            await node.stop()


async def masters(store: EtcdStore, wanted: dict[str, int]) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(KvstoreError):
                items = (await store.get_prefix(MASTERS)).items
                found = {item.value.decode(): int(item.key.removeprefix(MASTERS)) for item in items}
                if found == wanted:
                    return
            await asyncio.sleep(0.02)


async def until_users(store: EtcdStore, count: int) -> None:
    async with asyncio.timeout(20):
        while len((await store.get_prefix(VALUES)).items) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
