"""The harness itself: what comes out, what stays in, and that nothing is left. Tier uml."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import uml


def processes_of(job: Path) -> list[int]:
    """Processes on whose command line the job stands."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"uml_job={job}".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_status_and_output_come_out_and_changes_stay_in(inside: Callable[..., uml.Outcome]) -> None:
    name = f"/etc/ciliate-{uuid.uuid4().hex}"
    outcome = inside(["sh", "-c", f"touch {name} && uname -r && cat /proc/cpuinfo; exit 3"])
    assert outcome.status == 3, outcome.explain()
    assert outcome.output.startswith("6.1.")
    assert "User Mode Linux" in outcome.output
    assert not Path(name).exists()


def test_a_command_that_takes_too_long_is_ended(inside: Callable[..., uml.Outcome]) -> None:
    outcome = inside(["sleep", "60"], limit=1)
    assert outcome.status == uml.TIMED_OUT, outcome.explain()
    assert outcome.seconds < 1 + uml.GRACE


def test_a_kernel_that_dies_is_told_with_its_last_words(inside: Callable[..., uml.Outcome]) -> None:
    outcome = inside(["sh", "-c", "echo c > /proc/sysrq-trigger"])
    assert outcome.status == uml.DIED
    assert "sysrq triggered crash" in outcome.explain()


def test_a_job_that_would_be_hidden_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden inside"):
        uml.run(["true"], Path("/dev/shm/job"))


def test_nothing_outlives_a_runner_that_is_killed(tmp_path: Path) -> None:
    code = "import sys, uml; from pathlib import Path; uml.run(['sleep', '60'], Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    before = set(Path("/dev/shm").iterdir())
    runner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    try:
        wait(lambda: len(processes_of(tmp_path)) > 2)
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    wait(lambda: not processes_of(tmp_path))
    assert set(Path("/dev/shm").iterdir()) <= before


def wait(condition: Callable[[], bool], limit: float = 15) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)
