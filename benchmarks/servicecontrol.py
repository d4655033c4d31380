"""The control plane of services: loading many, changing one, coming back, memory. By a real agent and its API."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from report import Figure, seconds

from ciliate.lab.lab import Lab

SERVICES, BACKENDS = 20000, 5
TARGETS = {"load": 3.0, "p50": 0.001, "p99": 0.005, "restart": 2.0, "resident": 180.0}
SEED = {"load": "seed: 16,000 x 3 in 6.0 s", "p50": "seed: 0.35 ms", "p99": "seed: 0.65 ms"}


def spec(number: int, backends: int = BACKENDS, shift: int = 0) -> dict[str, Any]:
    """One service with backends of its own."""
    places = range(number * BACKENDS, number * BACKENDS + backends)
    return {
        "frontend-address": {"ip": f"10.96.{number >> 8}.{number & 255}", "port": 80},
        "backend-addresses": [
            {"ip": f"172.{16 + (place >> 16)}.{place >> 8 & 255}.{place & 255}", "port": 8080 + shift}
            for place in places
        ],
    }


def resident(pid: int) -> float:
    """Megabytes that a process has in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def figures(count: int, changes: int) -> Iterator[Figure]:
    """Load ``count`` services, change one ``changes`` times, kill the agent and let it come back."""
    root = Path("/run") / f"ciliate-bench-{os.getpid()}"
    lab = Lab.create(f"b{uuid.uuid4().hex[:6]}", root)
    try:
        yield from _figures(lab, count, changes)
    finally:
        lab.destroy()
        root.rmdir()


def _figures(lab: Lab, count: int, changes: int) -> Iterator[Figure]:
    client = lab.client()
    client.timeout = 120
    before = resident(lab.agent_process().pid)
    body = {"services": [spec(number) for number in range(count)]}
    begin = time.perf_counter()
    client.request("PUT", "/v1/service", body)
    spent = time.perf_counter() - begin
    name = f"{count:,} services x {BACKENDS}"
    yield Figure(f"load {name}", seconds(spent), "< 3 s", spent / TARGETS["load"], SEED["load"])
    times = []
    for number in range(changes):
        item = {"services": [spec(number * 7 % count, BACKENDS - number % 2, number % 3)]}
        begin = time.perf_counter()
        client.request("PUT", "/v1/service", item)
        times.append(time.perf_counter() - begin)
    times.sort()
    p50, p99 = median(times), times[int(len(times) * 0.99)]
    yield Figure("one change, request to answer, p50", seconds(p50), "< 1 ms", p50 / TARGETS["p50"], SEED["p50"])
    yield Figure("one change, p99", seconds(p99), "< 5 ms", p99 / TARGETS["p99"], SEED["p99"])
    memory = resident(lab.agent_process().pid)
    yield Figure(
        "resident", f"{memory:.0f} MB", "< 180 MB", memory / TARGETS["resident"], f"{before:.0f} MB without services"
    )
    lab.stop_agent()
    begin = time.perf_counter()
    client = lab.start_agent()
    spent = time.perf_counter() - begin
    client.timeout = 60
    back = len(client.request("GET", "/v1/service")["services"])
    text = f"{back:,} services; seed: 3.4 s at 10,000"
    yield Figure("restart until ready with all of them", seconds(spent), "< 2 s", spent / TARGETS["restart"], text)
    memory = resident(lab.agent_process().pid)
    yield Figure("resident after the restart", f"{memory:.0f} MB", "< 180 MB", memory / TARGETS["resident"])
