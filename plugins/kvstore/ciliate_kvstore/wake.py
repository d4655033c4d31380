"""Wakes watchers of other processes: a file that is touched after each commit, watched through inotify(7)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_IN_MODIFY = 0x2
_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC


class Wake:
    """One process's end. ``changed`` is set whenever anybody committed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._inotify = -1
        self._waiters: set[asyncio.Event] = set()

    def open(self) -> None:
        """Begin to listen; OSError where the directory cannot be watched."""
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._inotify = _libc.inotify_init1(_NONBLOCK_CLOEXEC)
        if self._inotify < 0 or _libc.inotify_add_watch(self._inotify, os.fsencode(self._path), _IN_MODIFY) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{self._path}: cannot be watched: {os.strerror(code)}")
        asyncio.get_running_loop().add_reader(self._inotify, self._read)

    def close(self) -> None:
        """Stop listening."""
        if self._inotify >= 0:
            asyncio.get_running_loop().remove_reader(self._inotify)
            os.close(self._inotify)
        if self._file >= 0:
            os.close(self._file)
        self._inotify = self._file = -1
        self._set_all()

    def touch(self) -> None:
        """Tell every process that something was committed. Safe in any thread."""
        os.pwrite(self._file, b"\0", 0)

    def subscribe(self) -> asyncio.Event:
        """An event that is set at each change; the caller clears it."""
        event = asyncio.Event()
        self._waiters.add(event)
        return event

    def unsubscribe(self, event: asyncio.Event) -> None:
        """Give an event back."""
        self._waiters.discard(event)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._inotify, 65536)
        self._set_all()

    def _set_all(self) -> None:
        for event in self._waiters:
            event.set()
