"""How often conntrack is collected. Tier unit."""

from __future__ import annotations

import pytest

from ciliate.datapath.conntrack import LONGEST, SHORTEST, Sweep, next_interval


@pytest.mark.parametrize(
    ("seen", "removed", "low", "high"),
    [
        (0, 0, LONGEST, LONGEST),
        (250, 0, LONGEST, LONGEST),
        (900, 700, LONGEST, LONGEST),
        (500, 0, 600, 3600),
        (900, 0, SHORTEST, 120),
        (1000, 0, SHORTEST, SHORTEST),
    ],
)
def test_the_fuller_the_sooner(seen: int, removed: int, low: float, high: float) -> None:
    assert low <= next_interval(Sweep(seen, removed, 0.1), 1000) <= high


def test_it_never_grows_with_fill() -> None:
    found = [next_interval(Sweep(seen, 0, 0.1), 1000) for seen in range(0, 1001, 10)]
    assert found == sorted(found, reverse=True)
