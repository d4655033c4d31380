"""Starts the helper process of a namespace and speaks with it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ciliate.lab import cgroups, netns, processes
from ciliate.lab.errors import LabError

PROGRAM = Path(__file__).with_name("podhelper.py")
START_TIMEOUT = 20.0


def interpreter() -> str:
    """The system's Python, which starts faster than one in a virtual environment; else the one that runs."""
    system = Path("/usr/bin/python3")
    return str(system) if system.exists() else sys.executable


def start(namespace: str, control: Path, name: str, cgroup: Path | None = None) -> processes.Process:
    """Start the helper inside a namespace, of this cgroup; returns once it can be spoken to.

    LabError where it does not come up.
    """
    command = [*netns.inside(namespace), interpreter(), "-IS", str(PROGRAM), str(control), name]
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(reading, "rb") as output:
        try:
            with control.with_suffix(".log").open("wb") as log:
                process = processes.spawn(command, f"helper {name}", writing, log.fileno(), os.environ)
            cgroups.move(process.pid, cgroup)
        finally:
            os.close(writing)
        ready, _, _ = select.select([output], [], [], START_TIMEOUT)
        if not ready or output.readline() != b"ready\n":
            processes.end([process], number=signal.SIGKILL)
            words = control.with_suffix(".log").read_text(errors="replace").strip()
            raise LabError(f"helper of {name}: did not start: {words or 'no message'}")
    return process


class Helper:
    """A connection to one helper."""

    def __init__(self, control: Path, name: str) -> None:
        self.name = name
        self._control = control

    def serve(self, ports: Sequence[tuple[str, int]], addresses: Sequence[str]) -> None:
        """Answer on these ports of these addresses; LabError lists what the helper could not do."""
        answer = self._ask({"op": "serve", "ports": list(ports), "addresses": list(addresses)}, 10.0)
        if answer["problems"]:
            raise LabError(f"{self.name}: " + "; ".join(answer["problems"]))

    def probe(self, probes: Sequence[dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
        """Send probes, all at once as far as the helper's bound allows; returns a result for each, in order."""
        results: list[dict[str, Any]] = self._ask({"op": "probe", "probes": list(probes)}, timeout)["results"]
        return results

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout)
                connection.connect(str(self._control))
                connection.sendall(json.dumps(request).encode() + b"\n")
                with connection.makefile("rb") as answers:
                    line = answers.readline()
        except OSError as error:
            raise LabError(f"helper of {self.name}: {error}") from error
        answer: dict[str, Any] = json.loads(line or b'{"error": "it ended"}')
        if "error" in answer:
            raise LabError(f"helper of {self.name}: {answer['error']}")
        return answer
