"""Measurements and their form for Prometheus; addresses are counted as they come and go. Tier unit."""

from __future__ import annotations

import threading
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ciliate.controller import Triggered
from ciliate.exposition import MeasuredCollector
from ciliate.ipam import reserve
from ciliate.ipam.counting import CountingIpam
from ciliate.measure import IPAM_EVENTS, MEASURED, Count, Level, Times
from ciliate_ipam.allocator import HostScope


def samples(*items: Count | Level | Times) -> dict[tuple[str, ...], float]:
    """What a reader of the exposition format gets, by name and label values."""
    registry = CollectorRegistry()
    registry.register(MeasuredCollector(items))
    found = text_string_to_metric_families(generate_latest(registry).decode())
    return {(sample.name, *sample.labels.values()): sample.value for item in found for sample in item.samples}


def test_what_is_measured_is_what_is_read() -> None:
    count, level = Count("things", "t", ("kind",)), Level("height", "h", ())
    times = Times("took_seconds", "t", ("what", "outcome"), (0.1, 1.0))
    count.add("a")
    count.add("a", amount=2)
    level.set(value=2.5)
    for seconds in (0.05, 0.1, 0.5, 7.0):
        times.observe("x", "success", seconds=seconds)
    assert samples(count, level, times) == {
        ("ciliate_things_total", "a"): 3,
        ("ciliate_height",): 2.5,
        ("ciliate_took_seconds_bucket", "0.1", "success", "x"): 2,
        ("ciliate_took_seconds_bucket", "1.0", "success", "x"): 3,
        ("ciliate_took_seconds_bucket", "+Inf", "success", "x"): 4,
        ("ciliate_took_seconds_count", "success", "x"): 4,
        ("ciliate_took_seconds_sum", "success", "x"): pytest.approx(7.65),
    }


def test_a_block_that_raises_is_a_failure() -> None:
    times = Times("took_seconds", "t", ("outcome",), (1.0,))
    with times.measured():
        pass
    with pytest.raises(ValueError, match="no"), times.measured():
        raise ValueError("no")
    assert {labels: found.cumulative[-1] for labels, found in times.values().items()} == {
        ("success",): 1,
        ("failure",): 1,
    }


def test_threads_lose_nothing() -> None:
    count, times = Count("n", "t", ()), Times("s", "t", (), (1.0,))

    def work() -> None:
        for _ in range(2000):
            count.add()
            times.observe(seconds=0.5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.values() == {(): 8000}
    assert times.values()[()].cumulative == [8000, 8000]


def test_names_are_there_once() -> None:
    assert len({item.name for item in MEASURED}) == len(MEASURED)


def test_wishes_that_come_together_are_one_run() -> None:
    asked = Triggered()
    assert asked.began() == 0.0
    asked.asked(waits=False)
    asked.asked(waits=True)
    asked.ended(asked.began())
    asked.ended(asked.began())
    assert (asked.total, asked.folds) == (2, 1)
    assert {labels: found.cumulative[-1] for labels, found in asked.times.values().items()} == {
        ("latency",): 1,
        ("duration",): 1,
    }


async def test_addresses_are_counted_as_they_come_and_go(tmp_path: Path) -> None:
    provider = HostScope([ip_network("10.9.0.0/24"), ip_network("fd00::/120")], tmp_path / "ipam.json")
    await provider.start()
    ipam = CountingIpam(provider)
    before = IPAM_EVENTS.values()

    def counted() -> dict[tuple[str, ...], int]:
        return {labels: number - before.get(labels, 0) for labels, number in IPAM_EVENTS.values().items()}

    try:
        await ipam.allocate("one")
        await (await reserve(ipam, "two", ipv6=False)).durable
        await ipam.claim("three", [ip_address("10.9.0.77")])
        await ipam.claim("three", [ip_address("10.9.0.78")])
        assert await ipam.release("one")
        assert not await ipam.release("nobody")
        assert ipam.capacity() == provider.capacity()
        given, taken = {"ipv4": 4, "ipv6": 1}, {"ipv4": 2, "ipv6": 1}
        assert counted() == {
            **{("allocate", family): number for family, number in given.items()},
            **{("release", family): number for family, number in taken.items()},
        }
    finally:
        await provider.stop()
