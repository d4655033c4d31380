"""One file of the state directory: its only writer, and what somebody did to it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from ciliate import atomicfile


class StateFile:
    """A whole file with one writer at a time. Belongs to one event loop."""

    def __init__(self, path: Path, pretty: bool = True) -> None:
        self.path = path
        self._pretty = pretty
        self._lock = asyncio.Lock()
        self._there = False
        self.owed = False
        """Whether the last write failed: what is on disk is older than what its writer knows."""

    def read(self) -> object | None:
        """The data, or None where there is no file (blocking). StateFileError where it cannot be used."""
        data = atomicfile.read_json(self.path)
        self._there = data is not None
        return data

    async def write(self, content: Callable[[], object]) -> None:
        """Write what ``content`` gives once it is this write's turn; durable when this returns. OSError leaves the old
        file alone."""
        async with self._lock:
            data = content()
            writing = asyncio.ensure_future(
                asyncio.to_thread(atomicfile.write_json, self.path, data, pretty=self._pretty)
            )
            try:
                await asyncio.shield(writing)
            finally:
                # a writer that is cancelled leaves its thread at work: nobody else may begin before that is done
                await asyncio.wait([writing])
                self._wrote(writing)

    def _wrote(self, writing: asyncio.Future[None]) -> None:
        self.owed = writing.exception() is not None
        self._there = self._there or not self.owed

    async def gone(self) -> bool:
        """Whether it was there and somebody removed it; False while it is being written, as it may not be there yet."""
        if self._lock.locked():
            return False
        async with self._lock:
            return self._there and not await asyncio.to_thread(self.path.exists)
