"""Finding the unified cgroup hierarchy."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciliate.datapath.socketlb import cgroup2_mount

HYBRID = """tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
"""


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        (HYBRID, Path("/sys/fs/cgroup/unified")),
        ("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n", Path("/sys/fs/cgroup")),
        ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", None),
        ("", None),
    ],
)
def test_the_unified_hierarchy_is_found_where_it_is(mounts: str, found: Path | None) -> None:
    assert cgroup2_mount(mounts) == found
