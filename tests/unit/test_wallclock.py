"""Nothing is decided by the clock on the wall: it jumps, by hours and backwards. Tier unit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = {
    "core/ciliate/agent/counting.py": "the metric of the last event",
    "core/ciliate/agent/stateguard.py": "when a file was removed, for people",
    "core/ciliate/cli": "people read it",
    "core/ciliate/controller.py": "when a duty last ran, for people",
    "core/ciliate/endpoint/model.py": "the lines of an endpoint's log",
    "core/ciliate/health/checks.py": "when a node was asked, for people",
    "plugins/cni/ciliate_cni/shim.py": "the name of a file; deletions may be done in any order",
}
"""Where the time of day is written down for somebody to read. Everything else uses a monotonic clock."""
WALL = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.strftime", "time.ctime"}
WALL |= {f"{owner}.{name}" for owner in ("datetime", "date") for name in ("now", "utcnow", "today")}


def wall_clocks(source: str) -> Iterator[int]:
    """Lines that ask for the time of day, or name its clock."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found = any(f"time.{name.name}" in WALL or name.name == "CLOCK_REALTIME" for name in node.names)
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            found = f"{owner}.{node.attr}" in WALL or node.attr == "CLOCK_REALTIME"
        else:
            continue
        if found:
            yield node.lineno


def test_what_decides_uses_a_clock_that_does_not_jump() -> None:
    found = []
    for path in sorted([*ROOT.glob("core/**/*.py"), *ROOT.glob("plugins/**/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if not any(name.startswith(shown) for shown in SHOWN):
            text = path.read_text()
            if any(word in text for word in ("import time", "from time", "datetime")):
                found += [f"{name}:{line}" for line in wall_clocks(text)]
    assert not found, f"use time.monotonic() or the loop's time: {found}"


def test_the_kernel_side_counts_from_boot() -> None:
    sources = [*ROOT.glob("bpf/**/*.c"), *ROOT.glob("bpf/**/*.h")]
    assert sources
    assert [path.name for path in sources if "ktime_get_tai" in (text := path.read_text()) or "_real" in text] == []


def test_places_that_show_the_time_exist() -> None:
    assert [name for name in SHOWN if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import time\nx = time.time() + 5", [2]),
        ("from time import time", [1]),
        ("import datetime\ndatetime.datetime.now()", [2]),
        ("clock = time.time", [1]),
        ("time.clock_gettime(time.CLOCK_REALTIME)", [1]),
        ("time.monotonic()\nloop.time()\nself.time.time_of_day", []),
    ],
)
def test_the_search_finds_them(source: str, found: list[int]) -> None:
    assert list(wall_clocks(source)) == found
