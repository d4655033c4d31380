"""The event queue of an endpoint: order, folding, cancellation. Tier unit."""

from __future__ import annotations

import asyncio

import pytest

from ciliate.endpoint.events import EventQueue


def queue(workers: int = 2) -> EventQueue:
    return EventQueue(asyncio.Semaphore(workers))


async def test_events_run_one_at_a_time_in_order() -> None:
    subject, done, running = queue(), [], 0

    async def work(name: str) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1
        done.append(name)

    await asyncio.gather(*(subject.submit(name, lambda name=name: work(name)) for name in "abcde"))
    assert done == list("abcde")


async def test_equal_events_that_wait_are_one() -> None:
    subject, runs = queue(), 0

    async def work() -> int:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)
        return runs

    async with subject.turn():
        waiting = [asyncio.create_task(subject.submit("relabel", work)) for _ in range(100)]
        await asyncio.sleep(0)
        assert subject.waiting == ["relabel"]
    assert await asyncio.gather(*waiting) == [1] * 100
    assert subject.folded == 99
    assert await subject.submit("relabel", work) == 2


async def test_an_event_that_comes_while_its_like_runs_is_not_lost() -> None:
    subject, seen, state = queue(), [], "old"
    begun, go = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        seen.append(state)
        begun.set()
        await go.wait()

    first = asyncio.create_task(subject.submit("relabel", work))
    await begun.wait()
    state = "new"
    second = asyncio.create_task(subject.submit("relabel", work))
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(first, second)
    assert seen == ["old", "new"]


async def test_a_caller_that_goes_away_does_not_end_the_event() -> None:
    subject, begun, go, ended = queue(), asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await go.wait()
        ended.set()

    caller = asyncio.create_task(subject.submit("delete", work))
    await begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go.set()
    async with asyncio.timeout(10):
        await ended.wait()


async def test_a_failure_reaches_everybody_who_waits_and_the_next_event_runs() -> None:
    subject = queue()

    async def broken() -> None:
        raise OSError("disk is full")

    async def well() -> str:
        return "done"

    results = await asyncio.gather(*(subject.submit("save", broken) for _ in range(3)), return_exceptions=True)
    assert [str(item) for item in results] == ["disk is full"] * 3
    assert await subject.submit("save", well) == "done"


async def test_the_workers_of_a_node_are_shared() -> None:
    workers, running, most = asyncio.Semaphore(3), 0, 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await asyncio.gather(*(EventQueue(workers).submit("relabel", work) for _ in range(20)))
    assert most == 3


async def test_stop_ends_what_runs_and_what_waits() -> None:
    subject, begun = queue(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(subject.submit(name, work)) for name in ("one", "two")]
    await begun.wait()
    await subject.stop()
    assert [type(item) for item in await asyncio.gather(*tasks, return_exceptions=True)] == [
        asyncio.CancelledError,
        asyncio.CancelledError,
    ]
    assert subject.waiting == []
