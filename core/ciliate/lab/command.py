"""Runs the programs of the system that a lab needs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from ciliate.lab.errors import LabError


def run(*command: str, stdin: str | None = None) -> str:
    """Run a program to its end and return its output; LabError with its own words where it fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LabError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def ip_batch(namespace: str, lines: Sequence[str]) -> None:
    """Run many ip(8) commands in one namespace; LabError at the first that fails."""
    run("ip", "-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")
