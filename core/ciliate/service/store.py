"""Services on disk: one row each, so that a change of one writes one. Blocking; one thread owns the connection."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ciliate.atomicfile import DamagedError, SchemaError
from ciliate.service.table import Change, Key, Record

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS service (id INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS backend (id INTEGER PRIMARY KEY, key BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS object (name TEXT PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
"""


class ServiceStore:
    """The file. A transaction is all or nothing, also when the process is killed; it waits for no disk, as all of it
    is in the kernel's maps too and a machine that lost its power has lost those as well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encode = msgspec.msgpack.Encoder().encode
        try:
            self._db = _connect(path)
            self._db.executescript(f"BEGIN IMMEDIATE;{_TABLES}COMMIT;")
            known = self._meta("schema", 0)
        except sqlite3.DatabaseError as error:
            hint = "remove it, and give the services again: until then there are none, and new numbers afterwards"
            raise DamagedError(f"{path}: cannot be read: {error}; {hint}") from error
        if known not in (0, SCHEMA):
            raise SchemaError(f"{path}: is of schema {known}, expected {SCHEMA}; use the version that wrote it")
        # only once: an agent starts on a full disk, too, with what is there
        if not known:
            self._db.execute("INSERT INTO meta VALUES ('schema', ?)", (SCHEMA,))

    def _meta(self, name: str, default: int) -> int:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else default

    def load(self) -> tuple[list[Record], dict[int, Key], tuple[int, int]]:
        """Every service, every backend, and the next number of each. DamagedError names the row."""
        decode = msgspec.msgpack.Decoder(Record).decode
        records = []
        for number, data in self._db.execute("SELECT id, record FROM service"):
            try:
                records.append(decode(data))
            except msgspec.DecodeError as error:
                raise DamagedError(f"{self._path}: service {number}: {error}; remove the file") from error
        backends: dict[int, Key] = dict(self._db.execute("SELECT id, key FROM backend"))
        missing = {number for record in records for number in record.backends} - backends.keys()
        if missing:
            raise DamagedError(f"{self._path}: backends {sorted(missing)[:5]} are missing; remove the file")
        return records, backends, (self._meta("next-service", 1), self._meta("next-backend", 1))

    def commit(self, change: Change, next_ids: tuple[int, int]) -> None:
        """Follow a change, in one transaction."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany("INSERT OR REPLACE INTO backend VALUES (?, ?)", change.backends.items())
            rows = ((record.id, self._encode(record)) for record, _ in change.upserts)
            db.executemany("DELETE FROM service WHERE id = ?", [(record.id,) for record in change.deletes])
            db.executemany("INSERT OR REPLACE INTO service VALUES (?, ?)", rows)
            db.executemany("DELETE FROM backend WHERE id = ?", [(number,) for number in change.gone])
            numbers = zip(("next-service", "next-backend"), next_ids, strict=True)
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", numbers)
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    def objects(self) -> list[Any]:
        """Every manifest that was kept."""
        rows = self._db.execute("SELECT data FROM object ORDER BY name")
        return [msgspec.msgpack.decode(data) for (data,) in rows]

    def keep_objects(self, objects: Mapping[str, Any], removed: Collection[str]) -> None:
        """Keep manifests by name and forget others, in one transaction."""
        rows = [(name, self._encode(item)) for name, item in objects.items()]
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM object WHERE name = ?", [(name,) for name in removed])
            self._db.executemany("INSERT OR REPLACE INTO object VALUES (?, ?)", rows)

    def save(self) -> None:
        """Copy everything to a new file at the path, whose old one somebody removed, and go on with that."""
        for rest in ("-wal", "-shm"):
            self._path.with_name(self._path.name + rest).unlink(missing_ok=True)
        fresh = _connect(self._path)
        self._db.backup(fresh)
        self._db.close()
        self._db = fresh

    def checkpoint(self) -> None:
        """Move what is in the log into the file."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    # a checkpoint waits for the disk: that is done beside the changes (``checkpoint``)
    database.execute("PRAGMA wal_autocheckpoint = 16384")
    return database
