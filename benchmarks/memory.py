"""Kernel memory of endpoints, by what it is for: objects in the kernel's slabs (/proc/slabinfo), and per-CPU memory.

Objects in use are counted, not pages: with a thousand endpoints what others do at the same time is a few bytes of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SETTLE = 0.5
"""Seconds until what was freed with RCU's delay is gone."""


class Weight(NamedTuple):
    """Bytes per endpoint. ``clsact``: what the kernel keeps of a device that may have filters."""

    device: float
    clsact: float
    filters: float
    maps: float

    @property
    def all(self) -> float:
        """Without the device, which every kind of network has."""
        return self.clsact + self.filters + self.maps


def used() -> int:
    """Bytes of objects in use, all of the machine."""
    total = 0
    for line in Path("/proc/slabinfo").read_text().splitlines()[2:]:
        _, active, _, size = line.split()[:4]
        total += int(active) * int(size)
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return total + int(lines["Percpu"].split()[0]) * 1024


def weigh(steps: list[Callable[[], object]], count: int) -> list[float]:
    """Bytes per endpoint that each step, done for ``count`` of them, leaves in the kernel."""
    found, before = [], used()
    for step in steps:
        step()
        time.sleep(SETTLE)
        after = used()
        found.append((after - before) / count)
        before = after
    return found
