"""Memory that a daemon has freed goes back to the kernel. Tier unit."""

from __future__ import annotations

import subprocess
import sys

import pytest

WORK = """
import ctypes, threading
from pathlib import Path
from ciliate.allocator import keep_little

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def use(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

def work():
    use(16 << 20)  # from now on glibc takes blocks of this size for usual ones, unless it is told otherwise
    use(15 << 20)

if {told}:
    keep_little()
before = resident()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resident() - before)
"""


def kept(told: bool) -> int:
    code = WORK.replace("{told}", str(told))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_a_thread_freed_is_not_kept() -> None:
    if kept(False) < 8 << 20:
        pytest.skip("this C library gives memory back by itself")
    assert kept(True) < 2 << 20
