"""Watchers and local keys over any store: what is followed, held, withdrawn, and written again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ciliate import atomicfile
from ciliate.kvstore import Batch, CompactedError, Delete, Event, KvstoreError, LockLostError, Put, base, known
from ciliate.kvstore.known import WatchCache
from ciliate.kvstore.local import Contents, LocalStore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.kvstore.shared import SharedStore
from ciliate.kvstore.watcher import Watcher
from ciliate.plugin import Handle

PREFIX = "p/"


def decode(name: str, value: bytes) -> str:
    if value == b"malformed":
        raise ValueError("malformed")
    return value.decode()


class Heard:
    """What a watcher told, and what it says now."""

    def __init__(self) -> None:
        self.batches: list[tuple[dict[str, str], dict[str, str]]] = []

    def __call__(self, found: Any, gone: Any) -> None:
        self.batches.append((dict(found), dict(gone)))


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(*parts: Any) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for part in parts:
            await part.start()
            stack.push_async_callback(part.stop)
        yield


class Shaky(LocalStore):
    """A store that can go away, and that can be told to forget its history."""

    away = False
    forget = False

    def _open(self) -> Contents:
        if self.away:
            raise KvstoreError("the store is away")
        return super()._open()

    async def watch_prefix(self, prefix: str, start_revision: int = 0) -> Any:
        if self.forget:
            self.forget = False
            raise CompactedError(start_revision + 1)
        following = start_revision
        yield Batch()
        while not self._stopped:
            contents = self._open()
            changed, start, following = contents.changed, following, contents.revision + 1
            if self.forget:
                raise KvstoreError("the connection broke")
            events = [event for event in contents.since(start) if event.key.startswith(prefix)]
            if events:
                yield events
            elif following == start:
                await changed.wait()

    def breaks(self, away: bool = True) -> None:
        self.away = away
        self._contents.wake()


def store() -> Shaky:
    return Shaky("memory", Contents())


async def test_a_list_then_every_change_in_batches() -> None:
    kv, heard = store(), Heard()
    await kv.put_many([Put(f"p/{number}", b"x") for number in range(100)])
    await kv.put("other", b"")
    watcher = Watcher(kv, PREFIX, decode, heard)
    async with running(kv, watcher):
        await watcher.synced.wait()
        assert len(heard.batches) == 1
        assert len(watcher.items) == 100
        await kv.put("p/0", b"x")
        await kv.put("p/1", b"malformed")
        await kv.put_many([Put("p/2", b"y"), Put("p/new", b"z")])
        await kv.delete("p/3")
        await until(lambda: "3" not in watcher.items)
    changes = [({"2": "y", "new": "z"}, {}), ({}, {"3": "x"})]
    assert heard.batches[1:] in (changes, [({"2": "y", "new": "z"}, {"3": "x"})])
    assert watcher.items["1"] == "x"


@pytest.mark.parametrize(
    ("told", "found", "gone"),
    [
        ("put a, delete, put b", {"k": "b"}, {}),
        ("put a, delete", {}, {"k": "x"}),
        ("delete, put y", {"k": "y"}, {}),
        ("delete, put x", None, None),  # as it was: nobody needs to know
        ("delete, put y, delete, put z", {"k": "z"}, {}),
        ("put y, delete, put malformed", None, None),
    ],
)
async def test_of_one_key_in_one_batch_the_last_word_counts(told: str, found: Any, gone: Any) -> None:
    class Together(Shaky):
        async def watch_prefix(self, prefix: str, start_revision: int = 0) -> Any:
            yield Batch()
            events = [
                Event("put" if value else "delete", "p/k", value.encode(), start_revision + number)
                for number, (_, _, value) in enumerate(word.partition(" ") for word in told.split(", "))
            ]
            # and another key, whose change says that all of it was taken in
            yield Batch([*events, Event("put", "p/last", b"", start_revision + 9)], start_revision + 9)
            await asyncio.Event().wait()

    kv, heard = Together("memory", Contents()), Heard()
    await kv.put("p/k", b"x")
    watcher = Watcher(kv, PREFIX, decode, heard)
    async with running(kv, watcher):
        await until(lambda: "last" in watcher.items)
        assert heard.batches[1:] == [({"last": "", **(found or {})}, gone or {})]
        assert watcher.items.get("k") == (None if gone else (found or {"k": "x"})["k"])


async def test_after_a_loss_of_history_only_differences_are_told_and_what_lacks_is_held() -> None:
    kv, heard, missing = store(), Heard(), []
    await kv.put_many([Put(f"p/{number}", b"x") for number in range(5)])
    watcher = Watcher(kv, PREFIX, decode, heard, on_missing=missing.extend, grace=0.3)
    async with running(kv, watcher):
        await watcher.synced.wait()
        kv.forget = True
        await kv.delete("p/1")
        await kv.delete("p/2")
        await kv.put("p/5", b"y")
        await until(lambda: watcher.held == 2)
        assert sorted(missing) == ["1", "2"]
        assert heard.batches[1:] == [({"5": "y"}, {})]
        await kv.put("p/2", b"x")
        await until(lambda: "1" not in watcher.items)
        assert heard.batches[2:] == [({}, {"1": "x"})]
        assert watcher.items["2"] == "x"


async def test_what_goes_with_its_lease_is_held_and_what_its_owner_deletes_is_not() -> None:
    kv, heard = store(), Heard()
    dead, alive = await kv.lease(60), await kv.lease(60)
    await kv.put_many([Put("p/dead1", b"x", dead.id), Put("p/dead2", b"x", dead.id), Put("p/alive", b"x", alive.id)])
    watcher = Watcher(kv, PREFIX, decode, heard, grace=60)
    async with running(kv, watcher):
        await watcher.synced.wait()
        await dead.revoke()
        await kv.delete("p/alive")
        await until(lambda: "alive" not in watcher.items)
        assert watcher.held == 2
        assert heard.batches[1:] == [({}, {"alive": "x"})]
        again = await kv.lease(60)
        await kv.put("p/dead1", b"x", again.id)
        await until(lambda: watcher.held == 1)
        assert len(heard.batches) == 2


async def test_the_grace_does_not_run_while_the_store_is_away() -> None:
    kv, heard = store(), Heard()
    lease = await kv.lease(60)
    await kv.put("p/a", b"x", lease.id)
    watcher = Watcher(kv, PREFIX, decode, heard, grace=0.2)
    async with running(kv, watcher):
        await watcher.synced.wait()
        await lease.revoke()
        await until(lambda: watcher.held == 1)
        kv.breaks()
        await until(lambda: watcher.problem)
        await asyncio.sleep(0.5)
        assert watcher.items == {"a": "x"}
        kv.breaks(away=False)
        await until(lambda: not watcher.problem)
        await until(lambda: not watcher.items)


async def test_deletes_that_others_mend_are_not_told(tmp_path: Path) -> None:
    kv, heard = store(), Heard()
    await kv.put("p/a", b"x")
    watcher = Watcher(kv, PREFIX, decode, heard, delete_grace=0.2)
    async with running(kv, watcher):
        await watcher.synced.wait()
        await kv.delete("p/a")
        await until(lambda: watcher.held == 1)
        await kv.put("p/a", b"x")
        await until(lambda: watcher.held == 0)
        await kv.delete("p/a")
        await until(lambda: not watcher.items)
    assert heard.batches == [({"a": "x"}, {}), ({}, {"a": "x"})]


async def test_a_cache_is_what_is_known_before_the_store_answers(tmp_path: Path) -> None:
    kv, path = store(), tmp_path / "cache.json"
    await kv.put_many([Put("p/a", b"x"), Put("p/b", b"y")])
    first = Watcher(kv, PREFIX, decode, Heard(), cache=WatchCache(path, str.encode))
    async with running(first):
        await first.synced.wait()
    kv.breaks()
    heard = Heard()
    second = Watcher(kv, PREFIX, decode, heard, cache=WatchCache(path, str.encode), grace=0.2)
    async with running(second):
        assert second.items == {"a": "x", "b": "y"}
        assert not second.synced.is_set()
        kv.away = False
        await kv.delete("p/a")
        await second.synced.wait()
        assert second.items == {"a": "x", "b": "y"}
        await until(lambda: second.items == {"b": "y"})
    path.write_bytes(b"{")
    third = Watcher(kv, PREFIX, decode, Heard(), cache=WatchCache(path, str.encode))
    async with running(third):
        await third.synced.wait()
        assert third.items == {"b": "y"}


async def test_a_disk_that_is_slow_to_sync_keeps_no_cache_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file lacks is forgotten by an agent that is killed; waiting for a disk takes no processor's time."""
    path = tmp_path / "cache.json"

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.05)  # the disk
        write_json(*arguments, **options)

    write_json = atomicfile.write_json
    monkeypatch.setattr(atomicfile, "write_json", slow)
    monkeypatch.setattr(known, "INTERVAL", 0.01)
    kv = store()
    async with running(Watcher(kv, PREFIX, decode, Heard(), cache=WatchCache(path, str.encode))):
        for name in ("a", "b"):
            await kv.put(f"p/{name}", b"x")
            await until(lambda name=name: name in (atomicfile.read_json(path) or {}))  # type: ignore[misc]


async def test_a_callback_that_fails_is_followed_by_a_new_list(caplog: pytest.LogCaptureFixture) -> None:
    kv, calls = store(), []

    def fails_once(found: Any, gone: Any) -> None:
        calls.append(dict(found))
        if len(calls) == 2:
            raise RuntimeError("once")

    await kv.put("p/a", b"x")
    watcher = Watcher(kv, PREFIX, decode, fails_once)
    async with running(kv, watcher):
        await watcher.synced.wait()
        await kv.put("p/b", b"y")
        await until(lambda: len(calls) == 2)
        await kv.put("p/c", b"z")
        await until(lambda: watcher.items.keys() == {"a", "b", "c"})
    assert "could not be taken in" in caplog.text


# local keys


@contextlib.asynccontextmanager
async def keys(kv: Any, **options: Any) -> AsyncIterator[LocalKeys]:
    local = LocalKeys(kv, **options)
    async with running(local):
        yield local


async def values(kv: Any) -> dict[str, tuple[bytes, bool]]:
    return {item.key: (item.value, item.lease != 0) for item in (await kv.get_prefix("")).items}


async def test_wishes_are_carried_out_under_a_lease_and_in_few_transactions() -> None:
    kv = store()
    async with keys(kv) as local:
        for number in range(250):
            local.set(f"p/{number}", b"x")
        local.remove("p/7")
        await local.flush()
        found = await values(kv)
        assert len(found) == 249
        assert set(found.values()) == {(b"x", True)}
        assert (await kv.status()).revision == 3
        local.set("p/1", b"y")
        local.remove("p/2")
        await local.flush()
        found = await values(kv)
        assert found["p/1"] == (b"y", True)
        assert "p/2" not in found


@pytest.mark.parametrize("loss", ["lease", "keys", "outage"])
async def test_what_the_store_loses_is_written_again(loss: str) -> None:
    kv = store()
    async with keys(kv, ttl=0.3, sync_interval=0.1) as local:
        local.set("p/a", b"x")
        await local.flush()
        if loss == "outage":
            kv.breaks()
            local.set("p/b", b"y")
            await until(lambda: local.problem)
            assert set(local.keys) == {"p/a", "p/b"}
            kv._contents.end_lease(local.lease_id)
            kv.breaks(away=False)
            await until(lambda: "p/b" in kv._contents.items)
        elif loss == "lease":
            kv._contents.end_lease(local.lease_id)
        else:
            await kv.delete("p/a")
        await until(lambda: "p/a" in kv._contents.items)
        assert local.renewals == (loss != "keys")


async def test_a_restart_takes_up_the_lease_and_settles_what_nobody_wants(tmp_path: Path) -> None:
    kv, state = store(), tmp_path / "lease.json"
    async with keys(kv, state=state) as local:
        for name in "abc":
            local.set(f"p/{name}", b"x")
        local.set("q/other", b"x")
        await local.flush()
        lease = local.lease_id
    async with keys(kv, state=state) as local:
        await until(lambda: local.lease_id)
        assert local.lease_id == lease
        local.set("p/a", b"x")
        await local.settle("p/")
        await local.flush()
        assert set(await values(kv)) == {"p/a", "q/other"}


async def test_another_store_in_its_place_gets_everything() -> None:
    first, second = store(), store()
    handle, heard = Handle(first), Heard()
    local = LocalKeys(handle)
    shared = SharedStore(handle, local, PREFIX, decode, heard, grace=60)
    async with running(local, shared):
        shared.set("a", b"x")
        await until(lambda: shared.items == {"a": "x"})
        handle.bind(second)
        local.rebind()
        await first.stop()
        await until(lambda: "p/a" in second._contents.items)
        await until(lambda: not shared.held)
        assert heard.batches == [({"a": "x"}, {})]


async def test_a_deleted_key_of_a_shared_store_comes_back_at_once() -> None:
    kv, heard = store(), Heard()
    local = LocalKeys(kv)
    shared = SharedStore(kv, local, PREFIX, decode, heard, delete_grace=5)
    async with running(local, shared):
        shared.set("a", b"x")
        await until(lambda: shared.items)
        await kv.delete("p/a")
        await until(lambda: "p/a" in kv._contents.items)
        await until(lambda: not shared.held)
        assert heard.batches == [({"a": "x"}, {})]


async def test_a_lock_whose_lease_ends_ends_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LOCK_TTL", 0.3)
    kv = store()
    reached = False
    with pytest.raises(LockLostError, match="lock l was lost"):
        async with kv.lock("l"):
            (item,) = kv._contents.items.values()
            kv._contents.end_lease(item.lease)
            async with asyncio.timeout(10):
                await asyncio.Event().wait()
            reached = True
    assert not reached
    async with kv.lock("l", 1):
        pass


async def test_many_leases_that_lose_their_keys_at_once_delay_nothing_and_are_asked_for_later() -> None:
    kv, heard = store(), Heard()
    leases = [await kv.lease(60.0) for _ in range(30)]
    await kv.put_many([Put(f"p/{number}", b"x", lease.id) for number, lease in enumerate(leases)])
    watcher = Watcher(kv, PREFIX, decode, heard, grace=60.0)
    async with running(kv, watcher):
        await watcher.synced.wait()
        for lease in leases[:3]:
            kv._contents._timers.pop(lease.id).cancel()
        await kv.transaction([], [Delete(f"p/{number}") for number in range(30)])
        await kv.put("p/new", b"y")
        # nobody waited for all thirty answers
        await until(lambda: "new" in watcher.items)
        assert watcher.held >= 20
        # those whose lease runs were let go on purpose; of the other three nobody knows
        await until(lambda: watcher.held == 3, 20.0)
        assert sorted(watcher.items) == ["0", "1", "2", "new"]
