"""One agent per state directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class AgentRunningError(Exception):
    """Another agent holds the state directory; the text names it."""


class AgentLock:
    """Holds ``agent.lock`` for as long as the process lives; a killed agent frees it."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "agent.lock"
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock. Raises AgentRunningError with the holder's process id."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise AgentRunningError(f"state-dir {self._path.parent}: agent {holder} is using it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
