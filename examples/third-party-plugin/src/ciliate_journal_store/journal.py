"""The file, and the store over it."""

import fcntl
import os

import msgspec

from ciliate.kvstore import Event, KvstoreError
from ciliate.kvstore.local import Contents, LocalStore

_OPEN = {}


class Journal:
    """One file, shared by every store of this process over it."""

    def __init__(self, path):
        self.users, self._file = 0, path.open("a+b", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.contents, self._end = Contents(self._append), 0
        self._file.seek(0)
        for line in self._file.readlines():
            if not line.endswith(b"\n"):
                self._file.truncate(
                    self._end
                )  # the process died while it wrote this, so nobody was told that it is there
                break
            self.contents.replay(msgspec.json.decode(line, type=list[Event]))
            self._end += len(line)

    def _append(self, events):
        line = msgspec.json.encode(events) + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError("the disk is full")
            os.fsync(self._file)
        except OSError as error:
            self._file.truncate(self._end)
            raise KvstoreError(f"{self._file.name}: {error}") from error
        self._end += len(line)


class JournalStore(LocalStore):
    def __init__(self, path):
        try:
            self._journal = _OPEN.get(path) or _OPEN.setdefault(path, Journal(path))
        except OSError as error:
            raise KvstoreError(f"{path}: {error}") from error
        self._journal.users += 1
        super().__init__(str(path), self._journal.contents)

    async def stop(self):
        await super().stop()
        self._journal.users -= 1
        if not self._journal.users:
            for path in [path for path, journal in _OPEN.items() if journal is self._journal]:
                _OPEN.pop(path)._file.close()
