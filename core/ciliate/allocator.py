"""How the C library keeps memory that a daemon has freed.

Loading an object into the kernel makes libbpf read the kernel's types: blocks of many megabytes that live for a moment.
glibc takes the first such block that is freed as a sign of more to come and keeps up to twice its size from then on, in
each thread's arena (mallopt(3), M_MMAP_THRESHOLD: "dynamic"). For a daemon at rest these are 17 MB of nothing, which
malloc_trim(3) does not return either: it leaves the tops of arenas other than the first.
"""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_ARENA_MAX = -1, -8
"""Numbers of glibc's <malloc.h>."""
KEEP = 256 << 10
"""Bytes of free memory at the end of an arena that are kept for the next request."""
ARENAS = 2


def keep_little() -> None:
    """Give freed memory back to the kernel soon. Before threads start; nothing happens where libc has no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # a threshold that is set is fixed: blocks from 128 kB on are mappings of their own then, and go when they are freed
    for option, value in ((M_TRIM_THRESHOLD, KEEP), (M_ARENA_MAX, ARENAS)):
        if not mallopt(ctypes.c_int(option), ctypes.c_int(value)):
            log.debug("mallopt refuses option %d with %d", option, value)
