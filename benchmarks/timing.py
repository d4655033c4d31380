"""What a piece of work costs: wall time and processor time in seconds, resident memory in bytes."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median


class Rounds:
    """Costs of several rounds of the same work, in seconds. Processor time is that of every thread."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        """Measure the body as one round; earlier rounds' garbage is collected before, not within."""
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    @property
    def median(self) -> float:
        """Median wall time."""
        return median(self.wall)

    @property
    def worst(self) -> float:
        """Longest wall time."""
        return max(self.wall)

    @property
    def median_cpu(self) -> float:
        """Median processor time."""
        return median(self.cpu)


def memory(fields: Iterable[str] = ("VmRSS", "VmHWM")) -> list[int]:
    """Resident memory of this process now and at its peak, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[field].split()[0]) * 1024 for field in fields]
