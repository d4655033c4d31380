"""Processes of a lab: recognised by pid and start time, so that a recycled pid is never mistaken for ours."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

POLL = 0.01


class Process(msgspec.Struct, frozen=True):
    """One process: ``started`` is its start time in clock ticks since boot."""

    pid: int
    started: int
    role: str


def spawn(command: Sequence[str], role: str, output: int, errors: int, environ: Mapping[str, str]) -> Process:
    """Start a process of its own session that outlives this one; ``output`` and ``errors`` are open files.

    Raises OSError where the program cannot be run.
    """
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, errors, 2),
    ]
    return record(os.posix_spawnp(command[0], list(command), environ, file_actions=actions, setsid=True), role)


def record(pid: int, role: str) -> Process:
    """The record of a process that runs; ProcessLookupError where it does not."""
    started = start_time(pid)
    if started is None:
        raise ProcessLookupError(f"{role}: process {pid} has ended")
    return Process(pid, started, role)


def start_time(pid: int) -> int | None:
    """A process's start time, or None where it is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def alive(process: Process) -> bool:
    """Whether this very process still runs."""
    return start_time(process.pid) == process.started


def end(processes: Iterable[Process], patience: float = 5.0, number: signal.Signals = signal.SIGTERM) -> None:
    """End processes: ask, wait up to ``patience`` seconds for all, then kill those that stay."""
    left = [process for process in processes if alive(process)]
    _signal(left, number)
    left = _wait(left, patience)
    _signal(left, signal.SIGKILL)
    _wait(left, patience)


def _signal(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        if alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _wait(processes: list[Process], patience: float) -> list[Process]:
    deadline = time.monotonic() + patience
    while processes and time.monotonic() < deadline:
        for process in processes:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        processes = [process for process in processes if alive(process)]
        if processes:
            time.sleep(POLL)
    return processes
