"""What parts count and time while they work (inventory 4.4); who serves metrics reads `MEASURED`.

Made for code that is called often, from any thread: an event costs about a microsecond, and whoever counts loads no
client library for it. Names are without prefix and, of counters, without ``_total``.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

Labels = tuple[str, ...]
SUCCESS, FAILURE = "success", "failure"


class Count:
    """How often something happened, by labels."""

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        self.name, self.text, self.labels = name, text, labels
        self._lock = threading.Lock()
        self._values: Counter[Labels] = Counter()

    def add(self, *labels: str, amount: int = 1) -> None:
        """Count ``amount`` more, with a value for each label."""
        with self._lock:
            self._values[labels] += amount

    def values(self) -> dict[Labels, int]:
        """What was counted so far."""
        with self._lock:
            return dict(self._values)


class Level:
    """What something was when last looked at, by labels."""

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        self.name, self.text, self.labels = name, text, labels
        self._values: dict[Labels, float] = {}

    def set(self, *labels: str, value: float) -> None:
        """It is this now."""
        self._values[labels] = value

    def values(self) -> dict[Labels, float]:
        """As last set."""
        return dict(self._values)


class Distribution(NamedTuple):
    """How many durations were at most each of ``Times.bounds`` (the last: all), and their sum in seconds."""

    cumulative: list[int]
    total: float


class Times:
    """How long something took, by labels; the last label is the outcome where ``measured`` is used."""

    def __init__(self, name: str, text: str, labels: Labels, bounds: tuple[float, ...]) -> None:
        self.name, self.text, self.labels, self.bounds = name, text, labels, bounds
        self._lock = threading.Lock()
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, *labels: str, seconds: float) -> None:
        """One more that took so long."""
        place = bisect_left(self.bounds, seconds)
        with self._lock:
            counts = self._counts.get(labels)
            if counts is None:
                counts = self._counts[labels] = [0] * (len(self.bounds) + 1)
                self._sums[labels] = 0.0
            counts[place] += 1
            self._sums[labels] += seconds

    @contextmanager
    def measured(self, *labels: str) -> Iterator[None]:
        """Time the block; its outcome is failure where it raises."""
        began, outcome = time.perf_counter(), FAILURE
        try:
            yield
            outcome = SUCCESS
        finally:
            self.observe(*labels, outcome, seconds=time.perf_counter() - began)

    def values(self) -> dict[Labels, Distribution]:
        """What was observed so far."""
        with self._lock:
            found = {labels: (list(counts), self._sums[labels]) for labels, counts in self._counts.items()}
        return {labels: Distribution(_summed(counts), total) for labels, (counts, total) in found.items()}


def _summed(counts: list[int]) -> list[int]:
    total, found = 0, []
    for count in counts:
        total += count
        found.append(total)
    return found


_FAST = tuple(1e-6 * factor for factor in (1, 2, 5, 10, 20, 50, 100, 1000, 10000, 100000))
_MAPS = (1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1)
"""Few, as there are many maps."""
_USUAL = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0)

SYSCALLS = Times("bpf_syscall_duration_seconds", "Calls of bpf(2)", ("operation", "outcome"), _FAST)
MAP_TIMES = Times(
    "bpf_map_ops_duration_seconds",
    "Operations on BPF maps, a batch being one",
    ("mapName", "operation", "outcome"),
    _MAPS,
)
MAP_OPS = Count("bpf_map_ops", "Operations on BPF maps, a batch being one", ("mapName", "operation", "outcome"))
DATAPATH_ERRORS = Count("datapath_errors", "Failed looks at the datapath", ("area", "name", "family"))
CONNTRACK_RUNS = Count(
    "datapath_conntrack_gc_runs", "Collections of dead conntrack entries", ("family", "protocol", "status")
)
CONNTRACK_ENTRIES = Level(
    "datapath_conntrack_gc_entries", "Conntrack entries at the last collection", ("family", "protocol", "status")
)
CONNTRACK_TIME = Times(
    "datapath_conntrack_gc_duration_seconds",
    "Duration of collections of conntrack entries",
    ("family", "protocol", "status"),
    _USUAL,
)
SUBPROCESSES = Count("subprocess_start", "Processes that were started", ("subsystem",))
CONTROLLER_TIME = Times("controllers_runs_duration_seconds", "Duration of duties' runs", ("status",), _USUAL)
REGENERATION = Times(
    "endpoint_regeneration_time_stats_seconds",
    "What it takes to write an endpoint, by step",
    ("scope", "status"),
    _USUAL,
)
POLICY_TIME = Times(
    "policy_regeneration_time_stats_seconds", "Working out what changed for endpoints", ("scope", "status"), _USUAL
)
POLICY_DELAY = Times("policy_implementation_delay", "Seconds from an import to its being in force", ("source",), _USUAL)
EVENT_TIME = Level("event_ts", "Time of the last change by source, in seconds since the epoch", ("source",))
IPAM_EVENTS = Count("ipam_events", "Addresses given and taken back", ("action", "family"))
NODE_EVENTS = Count("nodes_all_events_received", "Changes of nodes that were heard of", ("eventType", "source"))
NODE_VALIDATIONS = Count("nodes_all_datapath_validations", "Comparisons of nodes with the kernel", ())

BOOTSTRAP = Level("agent_bootstrap_seconds", "Time that parts of the start took", ("scope", "outcome"))


@contextmanager
def bootstrap(scope: str) -> Iterator[None]:
    """Time one part of the start."""
    began, outcome = time.perf_counter(), FAILURE
    try:
        yield
        outcome = SUCCESS
    finally:
        BOOTSTRAP.set(scope, outcome, value=time.perf_counter() - began)


MEASURED: tuple[Count | Level | Times, ...] = (
    *(SYSCALLS, MAP_TIMES, MAP_OPS, DATAPATH_ERRORS, CONNTRACK_RUNS, CONNTRACK_ENTRIES, CONNTRACK_TIME),
    *(SUBPROCESSES, CONTROLLER_TIME, REGENERATION, POLICY_TIME, POLICY_DELAY, EVENT_TIME),
    *(IPAM_EVENTS, NODE_EVENTS, NODE_VALIDATIONS, BOOTSTRAP),
)
"""Everything that an agent measures of itself in this way."""
