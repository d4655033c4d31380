"""Services: what a connection costs, what the control plane takes, how fair the picks are.

Run as root: python benchmarks/services.py [--quick] [--only connections|control|fairness]. Writes out/services.svg.
Ratios hold better than times; each figure says what it is beside.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator

import servicecontrol
import servicecost
from report import Figure, run_parts

from ciliate.service.model import BackendSpec, FrontendSpec, ServiceSpec
from ciliate.service.selection import SIZE, flow_hash, maglev_table, place_of
from ciliate.service.table import ServiceTable

PARTS = ("connections", "control", "fairness")
FLOWS, COUNT = 100_000, 10
CHI_SQUARE = 33.7
"""Of ten backends, passed once in 10,000 times."""


def fairness() -> Iterator[Figure]:
    """Shares after random additions and removals; what moves when one backend of ten goes."""
    choose, services = random.Random(1), ServiceTable()
    record = None
    for step in range(101):
        chosen = choose.sample(range(1, 200), COUNT if step == 100 else choose.randint(1, 50))
        backends = [BackendSpec(f"10.0.0.{number}", 80) for number in chosen]
        _, (record,) = services.plan(
            [ServiceSpec(frontend_address=FrontendSpec("10.96.0.1", 80), backend_addresses=backends)]
        )
    assert record is not None
    client, service = bytes(10) + b"\xff\xff\x0a\x05\x00", bytes(10) + b"\xff\xff\x0a\x60\x00\x01"
    hashes = [flow_hash(client + bytes([index % 5]), service, 1024 + index // 5, 80, 6) for index in range(FLOWS)]
    seen = Counter(record.backends[place_of(value, COUNT)] for value in hashes)
    expected = FLOWS / COUNT
    statistic = sum((seen[number] - expected) ** 2 / expected for number in record.backends)
    shares = f"{min(seen.values()):,} to {max(seen.values()):,} of {FLOWS:,} flows"
    yield Figure("chi-square of 10 backends", f"{statistic:.1f}", f"< {CHI_SQUARE}", statistic / CHI_SQUARE, shares)
    yield Figure(
        "flows moved by conntrack when one of 10 goes",
        "1.00 of the minimum",
        "",
        0.0,
        "each flow has its backend by number",
    )
    names = [(b"backend %d" % number, number + 1) for number in range(COUNT)]
    before, after = maglev_table(names), maglev_table(names[1:])
    moved = sum(1 for old, new in zip(before, after, strict=True) if old != new)
    least = sum(1 for number in before if number == 1)
    beside = f"{moved} of {SIZE} places, {least} had to; hash % n moves 90 %"
    yield Figure(
        "places of a Maglev table moved likewise",
        f"{moved / least:.2f} of the minimum",
        "< 2.2",
        moved / least / 2.2,
        beside,
    )


def measure(part: str, quick: bool) -> list[Figure]:
    """The figures of one part."""
    if part == "fairness":
        return list(fairness())
    if part == "control":
        return list(servicecontrol.figures(servicecontrol.SERVICES, 300 if quick else 1000))
    found, costs = asyncio.run(servicecost.measure(servicecost.QUICK if quick else servicecost.FULL))
    print(f"plot: {servicecost.plot(costs)}")
    return found


def main() -> None:
    """Measure and print."""
    run_parts(__doc__ or "", PARTS, measure)


if __name__ == "__main__":
    main()
