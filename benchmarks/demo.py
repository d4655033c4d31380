"""How often `make demo` goes as told, also on a disk whose flushes take seconds: `python benchmarks/demo.py --help`.

Run as root. A library preloaded into everything that the demo starts delays fsync, fdatasync and syncfs; nothing else
is different. Exits 1 where one of the runs does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from ciliate.datapath.compiler import find_clang

SOURCE = Path(__file__).resolve().parents[1] / "tests" / "node" / "slowdisk.c"
TIMEOUT = 600.0
"""Seconds that one run may take."""


def slow_disk(directory: Path, seconds: float) -> dict[str, str]:
    """The environment of a process whose flushes take so long; empty for 0."""
    if not seconds:
        return {}
    library, delay = directory / "slowdisk.so", directory / "milliseconds"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [find_clang()[0], "-O2", *warnings, "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    delay.write_text(str(int(seconds * 1000)))
    return {"LD_PRELOAD": str(library), "SLOW_DISK": str(delay)}


def run(environment: Mapping[str, str]) -> tuple[bool, float, str]:
    """One demo: whether it went as told, the seconds it took, and what it printed."""
    began = time.monotonic()
    command = [sys.executable, "-m", "ciliate.lab.demo"]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    return done.returncode == 0, time.monotonic() - began, done.stdout + done.stderr


def main() -> int:
    """Run it, print a line for each run, and what those printed that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="runs, one after the other (20)")
    parser.add_argument("--fsync", type=float, default=0.0, help="seconds that every flush takes longer (0)")
    options = parser.parse_args()
    good = 0
    with tempfile.TemporaryDirectory() as directory:
        environment = slow_disk(Path(directory), options.fsync)
        for number in range(1, options.times + 1):
            went_well, seconds, text = run(environment)
            good += went_well
            print(f"run {number:2}: {'as told' if went_well else 'FAILED'} in {seconds:.1f} s", flush=True)
            if not went_well:
                print(text, flush=True)
    print(f"{good} of {options.times} as told, with flushes of {options.fsync:g} s more")
    return 0 if good == options.times else 1


if __name__ == "__main__":
    sys.exit(main())
