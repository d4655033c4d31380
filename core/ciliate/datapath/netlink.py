"""rtnetlink for this process: one socket per thread, and work inside another network namespace.

pyroute2 appears in this file and in ``devices`` alone.
"""

from __future__ import annotations

import _thread
import asyncio
import ctypes
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from ciliate.datapath.errors import DatapathError

__all__ = ["NetlinkError", "enter", "explain", "in_netns", "in_own_thread", "route"]

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_local = threading.local()


def _parts_of_pyroute2(*names: str) -> list[Any]:
    """Import modules of pyroute2 without the rest: its package imports all of it, which costs 5 MB and 45 ms.

    A bare package stands for it meanwhile; whoever imports pyroute2 later gets the whole one with these modules in it.
    """
    if "pyroute2" in sys.modules:
        return [importlib.import_module(name) for name in names]
    spec = importlib.util.find_spec("pyroute2")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("pyroute2 is not installed", name="pyroute2")
    bare = ModuleType("pyroute2")
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules["pyroute2"] = bare
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        del sys.modules["pyroute2"]


if TYPE_CHECKING:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError
else:
    _linux, _exceptions = _parts_of_pyroute2("pyroute2.iproute.linux", "pyroute2.netlink.exceptions")
    IPRoute, NetlinkError = _linux.IPRoute, _exceptions.NetlinkError


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


def enter(descriptor: int) -> None:
    """Take the calling thread into a network namespace. Only for threads that end with it: there is no way back."""
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise DatapathError(code, f"network namespace: cannot be entered: {os.strerror(code)}")


def new_namespace() -> int:
    """A descriptor of a new network namespace, into which the calling thread goes; it lives as long as that is open."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise DatapathError(code, f"network namespace: cannot be made: {os.strerror(code)}")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def in_own_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Begin a blocking ``function`` in a thread of its own, which ends with it and so may enter a namespace."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if outcome.done():
            return  # who asked was cancelled
        if error is None:
            outcome.set_result(value)
        else:
            outcome.set_exception(error)

    _start(function, lambda value, error: loop.call_soon_threadsafe(settle, value, error))
    return outcome


def _start(function: Callable[[], Any], done: Callable[[Any, BaseException | None], Any]) -> None:
    """A bare thread: `threading.Thread` waits for its beginning, which costs as much as the work."""

    def run() -> None:
        value, failure = None, None
        try:
            value = function()
        except BaseException as error:
            failure = error
        close()
        done(value, failure)

    _thread.start_new_thread(run, ())


def in_netns(descriptor: int, function: Callable[[], T]) -> T:
    """Run ``function`` in a network namespace, in a thread of its own, and return what it returns.

    ``descriptor`` is an open namespace. The thread ends afterwards, so that no other code ever runs in there.
    """
    outcome: list[Any] = []
    ended = _thread.allocate_lock()
    ended.acquire()

    def work() -> T:
        enter(descriptor)
        return function()

    def done(value: Any, error: BaseException | None) -> None:
        outcome.append((value, error))
        ended.release()

    _start(work, done)
    ended.acquire()
    value, error = outcome[0]
    if error is not None:
        raise error
    result: T = value
    return result


def explain(action: str, error: NetlinkError) -> DatapathError:
    """A DatapathError that says which action the kernel refused and why."""
    return DatapathError(error.code, f"{action}: {os.strerror(error.code)}")
