"""rtnetlink for this process: one socket per thread, and work inside another network namespace.

pyroute2 appears in this file and in ``devices`` alone.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ciliate.datapath.errors import DatapathError

__all__ = ["NetlinkError", "explain", "in_netns", "route"]

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_local = threading.local()


def route() -> Any:
    """This thread's rtnetlink socket, made at first use in the thread's own namespace."""
    socket = getattr(_local, "socket", None)
    if socket is None:
        socket = _local.socket = IPRoute()
    return socket


def close() -> None:
    """Close this thread's socket, if it has one."""
    socket = getattr(_local, "socket", None)
    if socket is not None:
        _local.socket = None
        socket.close()


def in_netns(descriptor: int, function: Callable[[], T]) -> T:
    """Run ``function`` in a network namespace, in a thread of its own, and return what it returns.

    ``descriptor`` is an open namespace. The thread ends afterwards, so that no other code ever runs in there.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            if _libc.setns(descriptor, CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise DatapathError(code, f"network namespace: cannot be entered: {os.strerror(code)}")
            outcome.append((True, function()))
        except BaseException as error:
            outcome.append((False, error))
        finally:
            close()

    thread = threading.Thread(target=run, name="netns", daemon=True)
    thread.start()
    thread.join()
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    result: T = value
    return result


def explain(action: str, error: NetlinkError) -> DatapathError:
    """A DatapathError that says which action the kernel refused and why."""
    return DatapathError(error.code, f"{action}: {os.strerror(error.code)}")
