"""One agent per state directory, and one per network namespace."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

_NAMESPACE = "\0ciliate-agent"
"""An abstract socket: it belongs to the network namespace and goes with the process that holds it."""
_CREDENTIALS = struct.Struct("3i")
GOING = 1.0
"""Seconds that the threads of a killed agent may take to let go."""
POLL = 0.02


class AgentRunningError(Exception):
    """Another agent holds the state directory or the network namespace; the text names it."""


class StateDirectoryError(Exception):
    """A directory cannot be used; the text names the option, the directory and what is expected."""


def make_directory(path: Path, option: str, mode: int) -> None:
    """Make a directory of the agent; StateDirectoryError where that cannot be."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        text = f"{option} {path}: cannot be made: {error.strerror}; expected a directory that the agent can write"
        raise StateDirectoryError(text) from error


class AgentLock:
    """Held for as long as the process lives; a killed agent frees it."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "agent.lock"
        self._descriptor = -1
        self._namespace: socket.socket | None = None

    def acquire(self) -> None:
        """Take the locks; an agent that is just going has a second for it.

        AgentRunningError has the holder's process id, StateDirectoryError what cannot be written.
        """
        deadline = time.monotonic() + GOING
        try:
            while True:
                held = self._directory_is_held() or self._namespace_is_held()
                if held is None:
                    return
                if time.monotonic() >= deadline:
                    raise AgentRunningError(held())
                self.release()
                time.sleep(POLL)
        except OSError as error:
            self.release()
            hint = "free some space" if error.errno == errno.ENOSPC else "expected a directory that the agent can write"
            text = f"state-dir {self._path.parent}: {self._path.name} cannot be written: {error.strerror}; {hint}"
            raise StateDirectoryError(text) from error
        except BaseException:
            self.release()
            raise

    def _directory_is_held(self) -> Callable[[], str] | None:
        """Take the directory, or say who has it."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            text = f"state-dir {self._path.parent}: agent {holder} is using it; stop it, or choose another directory"
            return lambda: text
        # the old content is overwritten, not cut off: that needs no space on a full disk
        os.pwrite(self._descriptor, f"{os.getpid():<10}\n".encode(), 0)
        return None

    def _namespace_is_held(self) -> Callable[[], str] | None:
        """Take the network namespace, or say who has it."""
        self._namespace = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._namespace.bind(_NAMESPACE)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return lambda: f"another agent (process {_holder()}) serves this network namespace; stop it: one is enough"
        self._namespace.listen(16)
        return None

    def lost(self) -> bool:
        """Whether the file is gone, or another one stands there: then another agent could take the directory."""
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return True

    def renew(self) -> None:
        """Take the directory again; AgentRunningError where another agent has it now."""
        before = self._descriptor
        held = self._directory_is_held()
        if held is not None:
            # what we hold stays in our hand: the next look has to find that the directory is another's
            os.close(self._descriptor)
            self._descriptor = before
            raise AgentRunningError(held())
        os.close(before)

    def release(self) -> None:
        """Give the locks back."""
        if self._namespace is not None:
            self._namespace.close()
            self._namespace = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _holder() -> str:
    """The process that listens on the namespace's socket; ``?`` where it has just gone, or many have asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # nobody accepts: only so many can ask
        try:
            probe.connect(_NAMESPACE)
        except OSError:
            return "?"
        data = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return str(_CREDENTIALS.unpack(data)[0])
