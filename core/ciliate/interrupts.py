"""Ctrl-C that always arrives.

The interpreter loses it in two cases: it is raised within a finalizer, whose exceptions nobody gets; or it comes
after the last look for signals and before the system call that waits. A thread notices both and sees to it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

_AGAIN = b"\0"
"""In the pipe: an interrupt was raised where nobody gets it."""
_POKE = signal.SIGURG
"""Ends a system call, so that the interpreter looks for signals; means nothing else to us."""
_STEP = 0.02
"""Seconds that the main thread has to notice by itself."""


class _Watch:
    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._seen = False
        self._hook = sys.unraisablehook
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)

    def start(self) -> None:
        signal.signal(signal.SIGINT, self._interrupted)
        signal.signal(_POKE, lambda number, frame: None)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        sys.unraisablehook = self._unraisable
        threading.Thread(target=self._watch, name="interrupts", daemon=True).start()

    def _interrupted(self, number: int, frame: FrameType | None) -> NoReturn:
        self._seen = True
        raise KeyboardInterrupt

    def _unraisable(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            os.write(self._writing, _AGAIN)
        else:
            self._hook(unraisable)

    def _watch(self) -> None:
        while True:
            found = os.read(self._reading, 64)
            if _AGAIN in found:
                time.sleep(_STEP)
                signal.pthread_kill(self._main, signal.SIGINT)
            elif signal.SIGINT in found:
                self._deliver()

    def _deliver(self) -> None:
        """The signal is here: wait until the main thread has seen it."""
        time.sleep(_STEP)
        while not self._seen:
            signal.pthread_kill(self._main, _POKE)
            time.sleep(_STEP)
        self._seen = False


def watch() -> None:
    """From now on an interrupt reaches the main thread, which has to call this. Whoever ignores it goes on doing so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _Watch().start()
