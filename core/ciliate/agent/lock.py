"""One agent per state directory, and one per network namespace."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from ciliate.directories import DirectoryError, make_directory

NAMESPACES = Path("/run/ciliate/netns")
"""Where the locks of network namespaces are, whatever directories an agent was given: only root may write there. A name
that belongs to the namespace itself (an abstract socket, a port) could be taken by anybody on the node."""
GOING = 1.0
"""Seconds that the threads of a killed agent may take to let go."""
POLL = 0.02


class AgentRunningError(Exception):
    """Another agent holds the state directory or the network namespace; the text names it."""


class AgentLock:
    """Held for as long as the process lives; a killed agent frees it."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "agent.lock"
        self._descriptor = -1
        self._namespace = -1
        self._namespace_path: Path | None = None

    def acquire(self) -> None:
        """Take the locks; an agent that is just going has a second for it.

        AgentRunningError has the holder's process id, DirectoryError what cannot be written.
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
            raise DirectoryError(text) from error
        except BaseException:
            self.release()
            raise

    def _directory_is_held(self) -> Callable[[], str] | None:
        """Take the directory, or say who has it."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _taken(self._descriptor):
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            text = f"state-dir {self._path.parent}: agent {holder} is using it; stop it, or choose another directory"
            return lambda: text
        # the old content is overwritten, not cut off: that needs no space on a full disk
        os.pwrite(self._descriptor, f"{os.getpid():<10}\n".encode(), 0)
        return None

    def _namespace_is_held(self) -> Callable[[], str] | None:
        """Take the network namespace, or say who has it."""
        make_directory(NAMESPACES, "directory of locks", 0o700)
        own = Path("/proc/thread-self/ns/net").stat()
        path = NAMESPACES / f"{own.st_dev}-{own.st_ino}.lock"
        for other in NAMESPACES.glob("*.lock"):
            if other != path:
                _remove_unheld(other)
        try:
            self._namespace = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DirectoryError(f"lock {path}: cannot be written: {error.strerror}") from error
        if not _taken(self._namespace):
            holder = os.pread(self._namespace, 32, 0).decode(errors="replace").strip() or "?"
            return lambda: f"another agent (process {holder}) serves this network namespace; stop it: one is enough"
        if not _is_at(self._namespace, path):
            return lambda: f"another agent has just left this network namespace ({path}); start again"
        os.pwrite(self._namespace, f"{os.getpid():<10}\n".encode(), 0)
        self._namespace_path = path
        return None

    def lost(self) -> bool:
        """Whether the file is gone, or another one stands there: then another agent could take the directory."""
        return not _is_at(self._descriptor, self._path)

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
        if self._namespace >= 0:
            if self._namespace_path is not None:
                self._namespace_path.unlink(missing_ok=True)
            os.close(self._namespace)
            self._namespace, self._namespace_path = -1, None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _taken(descriptor: int) -> bool:
    """Whether the lock of an open file is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_unheld(path: Path) -> None:
    """Remove a lock whose holder was killed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if _taken(descriptor) and _is_at(descriptor, path):
            path.unlink()
    finally:
        os.close(descriptor)
