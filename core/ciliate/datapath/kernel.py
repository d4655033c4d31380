"""What the kernel has of what the datapath needs or can use, and which build of the programs follows from it."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ciliate.datapath import bpf, probe
from ciliate.datapath.errors import DatapathError

COMPAT = ("CILIATE_COMPAT",)
"""Defines of the build in which everything is inlined."""
BUILDS = ("auto", "global", "inline")
KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")
_KTIME_GET_COARSE_NS, _REDIRECT_PEER, _LOOP = 160, 155, 181
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Feature(NamedTuple):
    """Something that a kernel has or has not. ``since``: the first Linux with it; ``needed``: nothing works without."""

    name: str
    since: str
    needed: bool
    purpose: str
    probe: Callable[[], bool]


FEATURES = (
    Feature("tc programs", "4.1", True, "every program", probe.has_classifier),
    Feature("clsact with bpf filters", "4.5", True, "attaching to both sides of a device", probe.has_clsact),
    Feature("veth devices", "2.6.24", True, "devices of pods", probe.has_veth),
    Feature("LRU hash maps", "4.10", True, "conntrack", lambda: probe.has_map(bpf.LRU_HASH, 4, 4, 8)),
    Feature("LPM tries", "4.11", True, "ipcache", lambda: probe.has_map(bpf.LPM_TRIE, 8, 4, 8, bpf.NO_PREALLOC)),
    Feature("ring buffers", "5.8", True, "events", lambda: probe.has_map(bpf.RINGBUF, 0, 0, _PAGE)),
    Feature("bpf_redirect_peer", "5.10", True, "delivery to a pod", lambda: probe.has_helper(_REDIRECT_PEER)),
    Feature("bpf_ktime_get_coarse_ns", "5.11", True, "conntrack", lambda: probe.has_helper(_KTIME_GET_COARSE_NS)),
    Feature("batch operations", "5.13", True, "many map entries in one call", probe.has_batches),
    Feature("global functions", "5.12", False, "build global", probe.has_global_functions),
    Feature("bpf_loop", "5.17", False, "build global", lambda: probe.has_helper(_LOOP)),
    Feature("JIT", "3.18", False, "build global; speed", probe.has_jit),
    Feature("kernel BTF", "5.4", False, "what kernels check global functions by", KERNEL_BTF.exists),
    Feature("tcx links", "6.6", False, "nothing: clsact is used", probe.has_tcx),
)


class Build(NamedTuple):
    """A build of the programs: its name, the defines that make it, why it was chosen."""

    name: str
    defines: tuple[str, ...]
    reason: str


@functools.cache
def probed() -> dict[str, bool]:
    """Name -> whether the running kernel has it; probed once per process.

    DatapathError where the kernel cannot be asked (not root, no bpf(2)).
    """
    found: dict[str, bool] = {}
    for feature in FEATURES:
        # without programs there is nothing that the other questions could be asked with
        found[feature.name] = feature.probe() if found.get("tc programs", True) else False
    return found


def missing(found: dict[str, bool]) -> list[str]:
    """Needed features that the kernel lacks, each with the first Linux that has it."""
    return [f"{item.name} (Linux {item.since})" for item in FEATURES if item.needed and not found[item.name]]


def minimum() -> str:
    """The first Linux that has everything that is needed."""
    return max((item.since for item in FEATURES if item.needed), key=lambda text: [*map(int, text.split("."))])


def select(wanted: str = "auto") -> Build:
    """The build for this kernel. DatapathError (ENOSYS) names what the kernel lacks and the first Linux that has it."""
    if wanted not in BUILDS:
        raise DatapathError(errno.EINVAL, f"datapath-build {wanted}: expected one of {', '.join(BUILDS)}")
    found = probed()
    lacking = missing(found)
    if lacking:
        text = f"kernel {os.uname().release} lacks {', '.join(lacking)}; the datapath needs Linux {minimum()} or newer"
        raise DatapathError(errno.ENOSYS, text)
    return choose(wanted, found)


def choose(wanted: str, found: dict[str, bool]) -> Build:
    """The build that was asked for, or the best that a kernel with these features takes."""
    if wanted == "inline":
        return Build("inline", COMPAT, "asked for")
    lacks = [name for name in ("global functions", "bpf_loop", "JIT") if not found[name]]
    if not lacks:
        return Build(
            "global", (), "the kernel has global functions, bpf_loop and a JIT" if wanted == "auto" else "asked for"
        )
    if wanted == "auto":
        return Build("inline", COMPAT, f"the kernel has no {' and no '.join(lacks)}")
    text = f"datapath-build global: kernel {os.uname().release} has no {' and no '.join(lacks)}; auto or inline will do"
    raise DatapathError(errno.ENOSYS, text)
