"""Waiting for what others use too: intervals that grow with the cluster, retries that spread (inventory 4.12).

The formulas are pure functions, all times in seconds:

=====================  ==================================================================  ===
`cluster_size`         ``base * ln(1 + nodes)``; ``base`` where the size is not known (0)   F1
`exponential`          ``minimum * factor ** attempt``, at most ``maximum``; attempts       F2
                       count from 1, so that the first wait is ``minimum * factor``
`jitter`               evenly drawn from ``[minimum, duration]``                            F2
`linear`               ``base * failures``, at most ``maximum``                             F3
=====================  ==================================================================  ===

Why ``ln``: with ``n`` nodes that all wait the same time, the load on what they share grows as ``n``; with this
interval it grows as ``n / ln(1 + n)``, and no node of a cluster of 5,000 waits more than nine times as long.

`Backoff` puts them together for one series of retries, `ClusterSize` holds the number that all of them scale with, and
`pause` is the one place that sleeps: a test finds every other sleep in code that talks to something shared.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

UNLIMITED = math.inf
SPREAD = 0.1
Chance = Callable[[], float]
"""A number from [0, 1), as `random.random` gives one; tests give their own."""


def cluster_size(base: float, nodes: int) -> float:
    """The interval of a periodic duty on each of ``nodes`` nodes: ``base * ln(1 + nodes)``, and ``base`` for none.

    With a base of 60 s: 1 node 41.6 s, 10 nodes 143.9 s, 1,000 nodes 414.5 s, 5,000 nodes 511.0 s.
    """
    return base * math.log1p(nodes) if nodes > 0 else base


def exponential(attempt: int, minimum: float = 1.0, factor: float = 2.0, maximum: float = UNLIMITED) -> float:
    """The wait after ``attempt`` failures in a row, from 1 on: ``min(minimum * factor ** attempt, maximum)``."""
    if attempt < 1:
        raise ValueError(f"attempt {attempt}: expected 1 or more")
    try:
        return min(minimum * factor**attempt, maximum)
    except OverflowError:
        return maximum


def jitter(duration: float, minimum: float, chance: Chance = random.random) -> float:
    """A wait drawn evenly from ``minimum`` to ``duration``: ``chance() * (duration - minimum) + minimum``."""
    return chance() * (duration - minimum) + minimum


def linear(failures: int, base: float = 1.0, maximum: float = UNLIMITED) -> float:
    """The wait of a controller after ``failures`` failures in a row: ``min(base * failures, maximum)``."""
    return min(base * failures, maximum)


def spread(duration: float, share: float = SPREAD, chance: Chance = random.random) -> float:
    """``duration`` give or take ``share`` of it, so that those who began together do not go on together."""
    return duration * (1 + share * (2 * chance() - 1))


async def pause(duration: float, wake: asyncio.Event | None = None) -> bool:
    """Wait ``duration`` seconds, or until ``wake`` is set; says whether it was set. Clearing it is the caller's."""
    if wake is None:
        await asyncio.sleep(duration)
        return False
    try:
        async with asyncio.timeout(duration):
            await wake.wait()
    except TimeoutError:
        return False
    return True


class ClusterSize:
    """How many nodes the cluster has, this one included; 0 as long as nobody knows.

    A service: the node registry sets ``nodes``, everybody else reads it at each wait, so that intervals follow growth.
    """

    def __init__(self, nodes: int = 0) -> None:
        self.nodes = nodes

    def interval(self, base: float) -> float:
        """`cluster_size` of ``base`` for as many nodes as there are now."""
        return cluster_size(base, self.nodes)


@dataclass
class Backoff:
    """One series of retries toward something shared; one per series, because it counts.

    After the jitter the wait is scaled with the size of the cluster, where ``cluster`` is given, and capped once more.
    """

    minimum: float = 1.0
    factor: float = 2.0
    maximum: float = UNLIMITED
    jittered: bool = True
    cluster: ClusterSize | None = None
    chance: Chance = random.random
    attempt: int = field(default=0, init=False)
    """Failures in a row so far."""

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum or self.factor < 1:
            raise ValueError(f"{self}: expected 0 <= minimum <= maximum and factor >= 1")

    def duration(self, attempt: int) -> float:
        """The wait after ``attempt`` failures in a row, by the formulas."""
        wait = exponential(attempt, self.minimum, self.factor, self.maximum)
        if self.jittered:
            wait = jitter(wait, self.minimum, self.chance)
        if self.cluster is not None:
            wait = self.cluster.interval(wait)
        return min(wait, self.maximum)

    def next(self) -> float:
        """Count one more failure; the wait that it asks for."""
        self.attempt += 1
        return self.duration(self.attempt)

    async def wait(self, wake: asyncio.Event | None = None) -> bool:
        """Count one more failure and wait accordingly, or until ``wake`` is set; says whether it was set."""
        return await pause(self.next(), wake)

    def reset(self) -> None:
        """It went well: the next failure is the first one again."""
        self.attempt = 0
