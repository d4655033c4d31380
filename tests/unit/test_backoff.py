"""The formulas of inventory 4.12, exactly and by statistics; waits that end early. Tier unit."""

from __future__ import annotations

import ast
import asyncio
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, pvariance

import pytest

from ciliate.backoff import Backoff, ClusterSize, cluster_size, exponential, jitter, linear, pause, spread

ROOT = Path(__file__).parents[2]
SAMPLES = 10_000


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (0, 60.0),
        (1, 41.588830833),
        (2, 65.916737320),
        (4, 96.566274746),
        (10, 143.873716367),
        (100, 276.907231032),
        (1000, 414.525286784),
        (5000, 511.043586),
    ],
)
def test_interval_by_cluster_size(nodes: int, expected: float) -> None:
    assert cluster_size(60.0, nodes) == pytest.approx(expected, rel=1e-8)
    assert ClusterSize(nodes).interval(60.0) == cluster_size(60.0, nodes)


def test_load_on_what_is_shared_grows_slower_than_the_cluster() -> None:
    loads = [nodes / cluster_size(60.0, nodes) for nodes in (1, 10, 100, 1000, 5000)]
    assert loads == sorted(loads)
    assert loads[-1] / loads[0] < 5000 / 12


@pytest.mark.parametrize(
    ("attempt", "limits", "expected"),
    [
        (1, (1.0, 2.0), 2.0),
        (2, (1.0, 2.0), 4.0),
        (5, (1.0, 2.0), 32.0),
        (5, (1.0, 2.0, 20.0), 20.0),
        (3, (0.2, 3.0), 5.4),
        (100_000, (1.0, 2.0, 60.0), 60.0),
        (100_000, (1.0, 2.0), math.inf),
    ],
)
def test_exponential(attempt: int, limits: tuple[float, ...], expected: float) -> None:
    assert exponential(attempt, *limits) == pytest.approx(expected)


def test_attempts_count_from_one() -> None:
    with pytest.raises(ValueError, match="attempt 0"):
        exponential(0)


@pytest.mark.parametrize(("failures", "expected"), [(0, 0.0), (1, 1.0), (7, 7.0), (90, 60.0)])
def test_linear(failures: int, expected: float) -> None:
    assert linear(failures, 1.0, 60.0) == expected


def uniform(values: list[float], low: float, high: float) -> bool:
    """Mean, variance and every tenth agree with an even distribution over [low, high]: five deviations at most."""
    width, count = high - low, len(values)
    error = width / math.sqrt(12 * count)
    tenths = [0] * 10
    for value in values:
        tenths[min(int((value - low) / width * 10), 9)] += 1
    slack = 5 * math.sqrt(count * 0.1 * 0.9)
    return (
        low <= min(values)
        and max(values) <= high
        and abs(fmean(values) - (low + high) / 2) < 5 * error
        and abs(pvariance(values) / (width**2 / 12) - 1) < 5 * math.sqrt(0.8 / count)
        and all(abs(share - count / 10) < slack for share in tenths)
    )


def test_the_test_of_evenness_sees_what_is_not() -> None:
    chance = random.Random(4)
    assert not uniform([chance.random() ** 1.2 for _ in range(SAMPLES)], 0, 1)
    assert not uniform([chance.uniform(0.03, 1) for _ in range(SAMPLES)], 0, 1)
    assert uniform([chance.random() for _ in range(SAMPLES)], 0, 1)


@pytest.mark.parametrize(("duration", "minimum"), [(2.0, 1.0), (60.0, 1.0), (0.4, 0.2)])
def test_jitter_spans_minimum_to_duration(duration: float, minimum: float) -> None:
    chance = random.Random(f"{duration}")
    assert uniform([jitter(duration, minimum, chance.random) for _ in range(SAMPLES)], minimum, duration)


def test_spread_is_even_around_the_interval() -> None:
    chance = random.Random(5)
    assert uniform([spread(30.0, 0.1, chance.random) for _ in range(SAMPLES)], 27.0, 33.0)


@pytest.mark.parametrize("attempt", [1, 3, 6, 12])
@pytest.mark.parametrize("nodes", [None, 0, 1, 40, 5000])
def test_waits_of_retries_follow_the_formulas(attempt: int, nodes: int | None) -> None:
    """Cap, jitter, size of the cluster, cap again."""
    chance = random.Random(f"{attempt} {nodes}")
    cluster = None if nodes is None else ClusterSize(nodes)
    waiting = Backoff(minimum=1.0, maximum=60.0, cluster=cluster, chance=chance.random)
    values = [waiting.duration(attempt) for _ in range(SAMPLES)]
    scale = 1.0 if not nodes else math.log1p(nodes)
    high = min(2.0**attempt, 60.0)
    if high * scale <= 60.0:
        assert uniform(values, scale, high * scale)
        return
    # what would lie above the cap lies at the cap
    below = [value for value in values if value < 60.0]
    share = (60.0 / scale - 1.0) / (high - 1.0)
    assert max(values) == 60.0
    assert abs(len(below) - SAMPLES * share) < 5 * math.sqrt(SAMPLES * share * (1 - share)) + 1
    assert uniform(below, scale, 60.0)


def test_a_series_counts_and_begins_anew() -> None:
    waiting = Backoff(minimum=1.0, maximum=10.0, jittered=False)
    assert [waiting.next() for _ in range(5)] == [2.0, 4.0, 8.0, 10.0, 10.0]
    waiting.reset()
    assert waiting.next() == 2.0


def test_intervals_follow_the_size_of_the_cluster() -> None:
    cluster = ClusterSize()
    waiting = Backoff(minimum=1.0, jittered=False, cluster=cluster)
    assert waiting.duration(1) == 2.0
    cluster.nodes = 100
    assert waiting.duration(1) == pytest.approx(2.0 * math.log(101))


@pytest.mark.parametrize("limits", [{"minimum": -1.0}, {"minimum": 5.0, "maximum": 1.0}, {"factor": 0.5}])
def test_limits_that_make_no_sense_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= minimum <= maximum"):
        Backoff(**limits)


async def test_a_wait_ends_when_it_is_woken() -> None:
    wake = asyncio.Event()
    waiting = asyncio.create_task(Backoff(minimum=3600.0).wait(wake))
    await asyncio.sleep(0)
    wake.set()
    async with asyncio.timeout(10):
        assert await waiting
    assert not await pause(0.001, asyncio.Event())
    assert not await pause(0.001)


# sleeping is backoff's

LOCAL = {
    "core/ciliate/lab": "a lab on this machine waits for its own processes",
    "core/ciliate/scenario": "packets of a lab",
    "core/ciliate/datapath": "the kernel of this node",
    "core/ciliate/cli/status.py": "asks the agent on this machine, for a person who waits",
    "core/ciliate/interrupts.py": "this process's own main thread",
    "core/ciliate/listeners.py": "this process's own listeners, and how long a client may be silent",
    "core/ciliate/agent/lock.py": "a file lock on this machine",
    "core/ciliate/cni/server.py": "its own file descriptors",
    "core/ciliate/endpoint/manager.py": "a grace period that the configuration gives, for this node's endpoints",
    "core/ciliate/kvstore/local.py": "a store in memory",
    "core/ciliate/plugin/conformance": "tests of providers",
    "core/ciliate/agent/membership.py": "the window in which changes of the ipcache go to the kernel together",
    "plugins/kvstore/ciliate_kvstore/etcdv3/http2.py": "when a connection that is there is read, and whether it lives",
    "plugins/cni/ciliate_cni/shim.py": "standard library alone; waits for the agent on this machine",
}
"""Where a sleep reaches nothing that other nodes use, with the reason. Everything else waits by `ciliate.backoff`."""
SLEEPS = {"sleep", "call_later", "call_at"}


def sleeps(source: str) -> Iterator[int]:
    """Lines that sleep or set a timer by themselves: asyncio.sleep(x), time.sleep(x), loop.call_later(x)."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        yields = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
        if name in SLEEPS and not yields:
            yield node.lineno


def test_what_talks_to_something_shared_waits_by_backoff() -> None:
    found = []
    for path in sorted([*ROOT.glob("core/**/*.py"), *ROOT.glob("plugins/**/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if name == "core/ciliate/backoff.py" or any(name.startswith(local) for local in LOCAL):
            continue
        found += [f"{name}:{line}" for line in sleeps(path.read_text())]
    assert not found, f"use ciliate.backoff (Backoff, spread, pause) instead of a bare sleep: {found}"


def test_rooms_that_may_sleep_exist() -> None:
    assert [name for name in LOCAL if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("await asyncio.sleep(5)", [1]),
        ("await asyncio.sleep(0)", []),
        ("time.sleep(delay)", [1]),
        ("from time import sleep\nsleep(3)", [2]),
        ("loop.call_later(RETRY, again)", [1]),
        ("await pause(spread(30))", []),
    ],
)
def test_the_search_for_sleeps_finds_them(source: str, found: list[int]) -> None:
    assert list(sleeps(source)) == found
