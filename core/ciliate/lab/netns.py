"""Network namespaces by name, as `ip netns` knows them, so that everybody's tools can look into a lab."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from ciliate.lab.command import ip_batch, run
from ciliate.lab.errors import LabError

DIRECTORY = Path("/run/netns")


def path(name: str) -> Path:
    """The file that keeps the namespace."""
    return DIRECTORY / name


def inside(name: str) -> list[str]:
    """The beginning of a command line that runs inside; mounts, processes and files stay those of the machine."""
    return ["nsenter", f"--net={path(name)}", "--"]


def create(name: str) -> None:
    """Make a namespace with its loopback device up; LabError where the name is taken."""
    run("ip", "netns", "add", name)
    ip_batch(name, ["link set lo up"])


def remove(name: str) -> bool:
    """Remove a namespace with all devices in it; False where there is none."""
    if not path(name).exists():
        return False
    with contextlib.suppress(LabError):
        run("ip", "netns", "del", name)
        return True
    # what a crash left: a file that is no mount
    path(name).unlink(missing_ok=True)
    return True


def set_sysctls(name: str, values: Mapping[str, str]) -> None:
    """Set kernel parameters (paths below /proc/sys) inside a namespace."""
    script = "".join(f"echo {value} > /proc/sys/{key}\n" for key, value in values.items())
    run(*inside(name), "sh", "-e", stdin=script)


def named(prefix: str) -> list[str]:
    """The namespaces whose names begin with ``prefix``."""
    return sorted(item.name for item in DIRECTORY.glob(f"{prefix}*")) if DIRECTORY.is_dir() else []
