"""Cgroups of a lab's nodes: the processes of a node and of its pods, whose sockets meet the node's services."""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path

from ciliate.datapath.socketlb import cgroup2_mount

PREFIX = "ciliate-lab."
PATIENCE = 5.0
"""Seconds that a cgroup may take to be empty after its processes were killed."""


def path(lab: str, node: str) -> Path | None:
    """The directory of a node's cgroup; None where cgroup2 is not mounted."""
    mount = cgroup2_mount()
    return mount / f"{PREFIX}{lab}" / node if mount else None


def create(lab: str, node: str) -> Path | None:
    """Make a node's cgroup; None where this machine lets nobody."""
    found = path(lab, node)
    if found is None:
        return None
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return None
    return found


def move(pid: int, cgroup: Path | None) -> None:
    """Put a process into a cgroup, where there is one: sockets that it makes from now on are of it."""
    if cgroup is not None and cgroup.is_dir():
        with contextlib.suppress(ProcessLookupError):
            (cgroup / "cgroup.procs").write_text(str(pid))


def remove(lab: str) -> list[str]:
    """Remove a lab's cgroups, once they are empty; returns what could not be removed."""
    mount = cgroup2_mount()
    top = mount / f"{PREFIX}{lab}" if mount else None
    if top is None or not top.is_dir():
        return []
    problems = []
    deadline = time.monotonic() + PATIENCE
    for directory in [*(item for item in top.iterdir() if item.is_dir()), top]:
        while True:
            try:
                directory.rmdir()
                break
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    problems.append(f"cgroup {directory}: {error.strerror}")
                    break
            time.sleep(0.01)
    return problems
