"""Picking is fair after any changes, and few flows move."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from ciliate.service.model import BackendSpec, FrontendSpec, ServiceSpec
from ciliate.service.selection import SIZE, flow_hash, maglev_table, place_of
from ciliate.service.table import ServiceTable

FLOWS = 100_000
CHI_SQUARE = {5: 23.5, 10: 33.7, 20: 50.8}
"""Backends -> value that is passed once in 10 000 times (one degree of freedom less)."""


def hashes(count: int) -> list[int]:
    """Of flows as clients make them: consecutive ports of a few addresses to one service."""
    service = bytes(10) + b"\xff\xff\x0a\x60\x00\x0a"
    return [
        flow_hash(
            bytes(10) + b"\xff\xff\x0a\x05" + (index // 20000).to_bytes(2, "big"), service, 32768 + index % 20000, 80, 6
        )
        for index in range(count)
    ]


def statistic(seen: Counter[int], backends: int) -> float:
    expected = seen.total() / backends
    return sum((seen[number] - expected) ** 2 / expected for number in range(backends))


@pytest.fixture(scope="module")
def flows() -> list[int]:
    return hashes(FLOWS)


@pytest.mark.parametrize("count", CHI_SQUARE)
def test_slots_are_fair_after_random_changes(flows: list[int], count: int) -> None:
    """A hundred random additions and removals leave every backend in exactly one slot, and the picks even."""
    choose, table = random.Random(count), ServiceTable()

    def put(numbers: list[int]) -> tuple[int, ...]:
        backends = [BackendSpec(f"10.0.{number >> 8}.{number & 255}", 80) for number in numbers]
        service = ServiceSpec(frontend_address=FrontendSpec("10.96.0.1", 80), backend_addresses=backends)
        return table.plan([service])[1][0].backends

    for _ in range(100):
        put(choose.sample(range(1, 200), choose.randint(1, 50)))
    slots = put(choose.sample(range(1, 200), count))
    assert len(set(slots)) == len(slots) == count
    seen = Counter(place_of(value, count) for value in flows)
    assert statistic(seen, count) < CHI_SQUARE[count], seen


@pytest.mark.parametrize("count", [1, 2, 5, 10, 100])
def test_a_table_gives_everybody_nearly_the_same(count: int) -> None:
    table = maglev_table([(b"backend %d" % number, number + 1) for number in range(count)])
    seen = Counter(table)
    assert len(table) == SIZE
    assert set(seen) == set(range(1, count + 1))
    assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("count", [5, 10, 50])
def test_few_places_move_when_a_backend_goes(count: int) -> None:
    """The minimum is the places of the one that went; the table moves little beyond it, a plain modulo nearly all."""
    backends = [(b"backend %d" % number, number + 1) for number in range(count)]
    before = maglev_table(backends)
    worst = 0.0
    for gone in range(count):
        after = maglev_table([item for item in backends if item[1] != gone + 1])
        had = sum(1 for number in before if number == gone + 1)
        moved = sum(1 for old, new in zip(before, after, strict=True) if old != new)
        worst = max(worst, (moved - had) / SIZE)
    assert worst < 0.12


def test_the_order_in_which_backends_are_told_does_not_matter() -> None:
    backends = [(b"backend %d" % number, number + 1) for number in range(7)]
    assert maglev_table(backends) == maglev_table(backends[::-1])
    assert maglev_table([]) == []
