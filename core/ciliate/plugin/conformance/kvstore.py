"""What every key-value store must do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from ciliate.kvstore import (
    CompactedError,
    Compare,
    Delete,
    Event,
    KvstoreError,
    LeaseExpiredError,
    LockTimeoutError,
    Put,
    WatchedKeys,
)
from ciliate.plugin.conformance import Case, Stage

SOON = 5.0


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


async def _take(watch: AsyncIterator[list[Event]], count: int) -> list[Event]:
    """The next ``count`` events."""
    events: list[Event] = []
    async with asyncio.timeout(SOON):
        async for batch in watch:
            events.extend(batch)
            if len(events) >= count:
                return events
    raise AssertionError(f"the watch ended after {len(events)} events, expected {count}")


async def put_then_get(stage: Stage) -> None:
    """What was put is read back, with revisions that grow."""
    store = await stage.make()
    first = await store.put("a", b"1")
    second = await store.put("a", b"2")
    item = await store.get("a")
    _expect(second > first, f"revisions {first} and {second}, expected the second to be greater")
    _expect(item is not None and item.value == b"2", f"get gave {item}, expected value b'2'")
    _expect(item.mod_revision == second, f"mod_revision {item.mod_revision}, expected {second}")
    _expect(item.create_revision == first, f"create_revision {item.create_revision}, expected {first}")
    _expect(item.version == 2, f"version {item.version}, expected 2")
    _expect(await store.get("b") is None, "get of a missing key gave something, expected None")


async def delete_tells_whether_there_was_a_key(stage: Stage) -> None:
    """Deleting gives True once and False afterwards."""
    store = await stage.make()
    await store.put("a", b"")
    answers = (await store.delete("a"), await store.delete("a"))
    _expect(answers == (True, False), f"delete gave {answers}, expected (True, False)")


async def prefix_lists_are_sorted_and_exact(stage: Stage) -> None:
    """A prefix list has exactly the keys with the prefix, sorted, at one revision."""
    store = await stage.make()
    for key in ("b/2", "a", "b", "b/1", "b/10", "c", "b0", "b/ü"):
        await store.put(key, key.encode())
    snapshot = await store.get_prefix("b/")
    keys = [item.key for item in snapshot.items]
    _expect(keys == ["b/1", "b/10", "b/2", "b/ü"], f"keys {keys}, expected b/1 b/10 b/2 b/ü")
    count = await store.delete_prefix("b/")
    _expect(count == 4, f"delete_prefix gave {count}, expected 4")
    first = await store.first("b"), await store.first("b/")
    _expect([item and item.key for item in first] == ["b", None], f"first gave {first}, expected b and None")
    left = [item.key for item in (await store.get_prefix("")).items]
    _expect(left == ["a", "b", "b0", "c"], f"keys left {left}, expected a b b0 c")


async def transactions_are_all_or_nothing(stage: Stage) -> None:
    """A transaction compares first and then does all of one branch."""
    store = await stage.make()
    missing = [Compare("k", "version", 0)]
    won = await store.transaction(missing, [Put("k", b"1"), Put("l", b"1")], [Put("lost", b"")])
    lost = await store.transaction(missing, [Put("k", b"2")], [Put("other", b"1"), Delete("l")])
    _expect(won.succeeded and not lost.succeeded, f"succeeded {won.succeeded}, {lost.succeeded}, expected True, False")
    keys = [item.key for item in (await store.get_prefix("")).items]
    _expect(keys == ["k", "other"], f"keys {keys}, expected k and other")
    same = await store.transaction([Compare("k", "value", b"1")], [Put("k", b"3")])
    _expect(same.succeeded, "a comparison of values failed that should hold")


async def conditions_hold_for_prefixes(stage: Stage) -> None:
    """A condition on a prefix has to hold for every key there is; version 0 says that there is none."""
    store = await stage.make()
    none = [Compare("p/", "version", 0, prefix=True)]
    first = await store.transaction(none, [Put("p/a", b"")])
    second = await store.transaction(none, [Put("p/b", b"")])
    _expect(first.succeeded and not second.succeeded, f"succeeded {first.succeeded}, {second.succeeded}, expected once")
    ones = [Compare("p/", "version", 1, prefix=True)]
    same = await store.transaction(ones, [Put("p/b", b""), Put("p/b2", b"")])
    await store.put("p/a", b"")
    mixed = await store.transaction(ones, [Put("q", b"")])
    _expect(same.succeeded and not mixed.succeeded, f"succeeded {same.succeeded}, {mixed.succeeded}, expected once")


async def one_of_many_creators_wins(stage: Stage) -> None:
    """Of many that create the same key at once, from two instances, exactly one succeeds."""
    stores = [await stage.make(), await stage.make()]
    attempts = [
        stores[number % 2].transaction([Compare("k", "version", 0)], [Put("k", str(number).encode())])
        for number in range(20)
    ]
    results = await asyncio.gather(*attempts)
    winners = sum(result.succeeded for result in results)
    _expect(winners == 1, f"{winners} creators succeeded, expected 1")


async def a_watch_sees_every_change_in_order(stage: Stage) -> None:
    """A watch from a list's revision + 1 misses nothing and repeats nothing, also across instances."""
    store, other = await stage.make(), await stage.make()
    await store.put("w/before", b"")
    snapshot = await store.get_prefix("w/")
    for number in range(50):
        await store.put(f"w/{number}", b"x")
    await other.put("elsewhere", b"")
    await other.delete("w/before")
    events = await _take(other.watch_prefix("w/", snapshot.revision + 1), 51)
    seen = [(event.kind, event.key) for event in events]
    expected = [("put", f"w/{number}") for number in range(50)] + [("delete", "w/before")]
    _expect(seen == expected, f"{len(seen)} events that begin with {seen[:3]}, expected {len(expected)} in order")
    revisions = [event.mod_revision for event in events]
    _expect(revisions == sorted(revisions), "revisions do not grow")


async def a_watch_wakes_for_changes_of_others(stage: Stage) -> None:
    """A watch that waits sees what another instance writes."""
    store, other = await stage.make(), await stage.make()
    revision = await store.put("w/0", b"")
    waiting = asyncio.create_task(_take(store.watch_prefix("w/", revision + 1), 1))
    await asyncio.sleep(0)
    await other.put("w/1", b"1")
    events = await waiting
    _expect(events[0].key == "w/1" and events[0].value == b"1", f"the watch saw {events[0]}, expected w/1")


async def deletions_of_single_keys_are_told(stage: Stage) -> None:
    """Whoever watches keys hears of their deletion and of no other, also of a key that is added while it watches."""
    store, other = await stage.make(), await stage.make()
    keys = WatchedKeys("g/")
    for name in ("g/1", "g/2", "g/3"):
        await store.put(name, b"")
    keys.add("g/1")
    async with contextlib.aclosing(store.watch_keys(keys)) as watch, asyncio.timeout(SOON):
        first = await anext(watch)
        _expect(not first, f"the first list was {first}, expected an empty one")
        await other.delete("g/2")
        await other.put("g/1", b"again")
        await other.delete("g/1")
        told = [event.key for event in await anext(watch)]
        _expect(told == ["g/1"], f"told {told}, expected g/1")
        keys.add("g/3")
        writer = asyncio.create_task(_delete_again_and_again(other, "g/3"))
        try:
            told = [event.key for event in await anext(watch)]
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
    _expect(set(told) == {"g/3"}, f"told {told}, expected g/3, which was added")


async def _delete_again_and_again(store: Any, key: str) -> None:
    """A key that is added to a watch may be heard of a little later."""
    while True:
        await store.put(key, b"")
        await store.delete(key)
        await asyncio.sleep(0.01)


async def compaction_is_told(stage: Stage) -> None:
    """A watch that asks for compacted history gets CompactedError, never silence or a gap."""
    store = await stage.make()
    for number in range(10):
        last = await store.put("k", str(number).encode())
    await store.compact(last)
    try:
        await _take(store.watch_prefix("k", 1), 1)
    except CompactedError as error:
        told = error.compact_revision
    else:
        raise AssertionError("the watch went on, expected CompactedError")
    item = await store.get("k")
    _expect(item is not None and item.value == b"9", "compaction lost the current value")
    _expect(told <= last + 1, f"compact_revision {told} is beyond the last revision {last}")


async def keys_go_with_their_lease(stage: Stage) -> None:
    """A lease that runs out takes its keys along, and watchers hear of it; a revoked one at once."""
    store = await stage.make()
    lease, kept = await store.lease(0.3), await store.lease(60)
    revision = await store.put("l/short", b"", lease.id)
    await store.put("l/long", b"", kept.id)
    events = await _take(store.watch_prefix("l/short", revision + 1), 1)
    _expect(events[0].kind == "delete", f"the watch saw {events[0]}, expected a delete")
    _expect(await store.get("l/long") is not None, "a key under a living lease is gone")
    _expect(await kept.keys() == {"l/long"}, "the lease does not know its keys")
    again = await store.lease(60, kept.id)
    _expect(again.id == kept.id, "a lease that was asked for again is another one")
    alive = await store.lease_alive(kept.id), await store.lease_alive(lease.id)
    _expect(alive == (True, False), f"lease_alive gave {alive}, expected True and False")
    await kept.revoke()
    _expect(await store.get("l/long") is None, "a key outlived its revoked lease")


async def a_dead_lease_is_an_error(stage: Stage) -> None:
    """Keeping alive or using a lease that is gone raises LeaseExpiredError."""
    store = await stage.make()
    lease = await store.lease(60)
    await lease.keep_alive()
    await lease.revoke()
    attempts = lease.keep_alive(), store.put("k", b"", lease.id), lease.keys(), store.lease(60, lease.id)
    for attempt in attempts:
        try:
            await attempt
        except LeaseExpiredError:
            continue
        raise AssertionError("a revoked lease was accepted, expected LeaseExpiredError")


async def pages_are_the_list(stage: Stage) -> None:
    """The pages of a prefix are its list, in order and of one revision; an empty prefix has one empty page."""
    store = await stage.make()
    for first in range(0, 300, 100):
        await store.put_many([Put(f"k/{number:03}", b"v") for number in range(first, first + 100)])
    pages = [page async for page in store.pages("k/")]
    keys = [item.key for page in pages for item in page.items]
    _expect(keys == [f"k/{number:03}" for number in range(300)], f"{len(keys)} keys, expected 300 in order")
    _expect(len({page.revision for page in pages}) == 1, "pages of several revisions")
    empty = [page async for page in store.pages("none/")]
    _expect(len(empty) == 1 and not empty[0].items, f"{len(empty)} pages of nothing, expected an empty one")


async def locks_exclude(stage: Stage) -> None:
    """One holder at a time, across instances; a waiter gets LockTimeoutError or its turn."""
    store, other = await stage.make(), await stage.make()
    inside = 0
    peak = 0

    async def enter(instance: Any) -> None:
        nonlocal inside, peak
        async with instance.lock("l", 20):
            inside += 1
            peak = max(peak, inside)
            await asyncio.sleep(0.005)
            inside -= 1

    await asyncio.gather(*(enter(instance) for instance in (store, other) * 4))
    _expect(peak == 1, f"{peak} holders at once, expected 1")
    async with store.lock("l", 5):
        try:
            async with other.lock("l", 0.2):
                raise AssertionError("a second holder got the lock")
        except LockTimeoutError:
            pass


async def writes_survive_a_restart(stage: Stage) -> None:
    """What was acknowledged is there in the next instance, with its revisions."""
    store = await stage.make()
    await store.put_many([Put(f"k/{number}", b"v") for number in range(100)])
    before = await store.get_prefix("")
    await stage.end(store)
    after = await (await stage.make()).get_prefix("")
    _expect(after == before, f"{len(after.items)} keys at revision {after.revision}, expected what was there before")


async def use_after_stop_is_an_error(stage: Stage) -> None:
    """A stopped store refuses with KvstoreError and does not hang."""
    store = await stage.make()
    await stage.end(store)
    try:
        async with asyncio.timeout(SOON):
            await store.put("k", b"")
    except KvstoreError:
        return
    raise AssertionError("a stopped store took a write")


async def status_is_a_line(stage: Stage) -> None:
    """A healthy store says so, with its revision."""
    store = await stage.make()
    revision = await store.put("k", b"")
    status = await store.status()
    _expect(status.ok and bool(status.message), f"status {status}, expected ok with a message")
    _expect(status.revision >= revision, f"status has revision {status.revision}, expected {revision} or more")


CASES: list[Case] = [
    put_then_get,
    delete_tells_whether_there_was_a_key,
    prefix_lists_are_sorted_and_exact,
    transactions_are_all_or_nothing,
    conditions_hold_for_prefixes,
    one_of_many_creators_wins,
    a_watch_sees_every_change_in_order,
    a_watch_wakes_for_changes_of_others,
    deletions_of_single_keys_are_told,
    compaction_is_told,
    keys_go_with_their_lease,
    a_dead_lease_is_an_error,
    pages_are_the_list,
    locks_exclude,
    writes_survive_a_restart,
    use_after_stop_is_an_error,
    status_is_a_line,
]
