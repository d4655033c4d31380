"""Controllers: retry, trigger, status."""

import asyncio
import math

import pytest

from ciliate.backoff import ClusterSize
from ciliate.controller import Controllers


async def test_a_failing_duty_is_retried_and_shows_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciliate.controller.RETRY_BASE", 0.001)
    controllers, runs, done = Controllers(), [], asyncio.Event()

    async def duty() -> None:
        runs.append(1)
        if len(runs) < 4:
            raise OSError("disk is full")
        done.set()

    controllers.run("save", duty, 3600)
    await asyncio.wait_for(done.wait(), 10)
    await asyncio.sleep(0)
    status = controllers.statuses["save"]
    await controllers.stop()
    assert (status.failure_count, status.success_count, status.consecutive_failures) == (3, 1, 0)
    assert status.last_error == "OSError: disk is full"
    assert controllers.failing() == []


async def test_duties_toward_shared_things_wait_by_the_size_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def pause(duration: float, wake: asyncio.Event) -> bool:
        waits.append(duration)
        return await wake.wait()

    monkeypatch.setattr("ciliate.controller.pause", pause)
    cluster, runs, fails = ClusterSize(1000), asyncio.Queue[int](), [False]
    controllers = Controllers(cluster)

    async def duty() -> None:
        runs.put_nowait(1)
        if fails[0]:
            raise OSError("no answer")

    async def run_once() -> float:
        await asyncio.wait_for(runs.get(), 10)
        await asyncio.sleep(0)
        return waits[-1]

    controllers.run("ask", duty, 10.0, shared=True)
    assert 9.0 * math.log(1001) <= await run_once() <= 11.0 * math.log(1001)
    cluster.nodes, fails[0] = 1, True
    for attempt in range(1, 4):
        controllers.trigger("ask")
        assert math.log(2) <= await run_once() <= 2**attempt * math.log(2)
    await controllers.stop()


async def test_trigger_runs_a_duty_before_its_interval_is_over() -> None:
    controllers, runs = Controllers(), asyncio.Queue[int]()

    async def duty() -> None:
        runs.put_nowait(1)

    controllers.run("sync", duty, 3600)
    await asyncio.wait_for(runs.get(), 10)
    controllers.trigger("sync")
    await asyncio.wait_for(runs.get(), 10)
    await controllers.stop()


async def test_a_duty_that_has_not_begun_may_be_triggered() -> None:
    Controllers().trigger("later")


async def test_a_name_is_taken_once() -> None:
    controllers = Controllers()

    async def duty() -> None:
        return

    controllers.run("one", duty, 3600)
    with pytest.raises(ValueError, match="one"):
        controllers.run("one", duty, 3600)
    await controllers.stop()
