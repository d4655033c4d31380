"""The SQLite file: schema and statements. Blocking; one thread owns the connection."""

from __future__ import annotations

import fcntl
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ciliate.directories import strangers
from ciliate.kvstore import (
    CompactedError,
    Compare,
    Delete,
    Event,
    KeyValue,
    KvstoreError,
    LeaseExpiredError,
    Op,
    Put,
    Snapshot,
    TxnResult,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS kv (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, mod INTEGER NOT NULL, made INTEGER NOT NULL,
    version INTEGER NOT NULL, lease INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS kv_lease ON kv (lease) WHERE lease != 0;
CREATE TABLE IF NOT EXISTS history (
    seq INTEGER PRIMARY KEY, revision INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS history_revision ON history (revision);
CREATE TABLE IF NOT EXISTS lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl REAL NOT NULL, expires REAL NOT NULL);
INSERT OR IGNORE INTO meta VALUES ('revision', 0), ('compacted', 0), ('boot', ''), ('schema', 1);
"""
_COLUMNS = "key, value, mod, made, version, lease"
_TARGETS = {"version": 4, "mod_revision": 2, "create_revision": 3, "lease": 5, "value": 1}
BUSY_TIMEOUT = 30.0
MAX_KEY = 0x10FFFF


def now() -> float:
    """Seconds since the machine started, suspension included: the same for every process of the host."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def prefix_end(prefix: str) -> str:
    """The first string that is greater than all that begin with ``prefix``."""
    return prefix + chr(MAX_KEY)


class Database:
    """One connection. Write methods run inside ``with database.transaction()``."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if problem := strangers(path.parent):
                text = f"{problem}; expected a directory that only its owner can change"
                raise KvstoreError(f"store {path}: cannot be opened: {text}")
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
            with path.with_name(path.name + ".open").open("w") as lock:
                # the change to WAL does not wait for others who open the same new file: let them in one by one
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._prepare()
        except (sqlite3.Error, OSError) as error:
            damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            hint = "; restore it from a backup, or remove it: identities get new numbers then" if damaged else ""
            raise KvstoreError(f"store {path}: cannot be opened: {error}{hint}") from error

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        # FULL: a commit is on the disk before it is acknowledged
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
        self._after_boot()

    def _after_boot(self) -> None:
        """Expiry times of another boot mean nothing: those leases begin anew."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        with self.transaction():
            if self._meta("boot") != boot:
                self._db.execute("UPDATE lease SET expires = ttl + ?", (now(),))
                self._db.execute("UPDATE meta SET value = ? WHERE name = 'boot'", (boot,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def transaction(self) -> _Transaction:
        """All or nothing, and no other writer meanwhile."""
        return _Transaction(self._db)

    def savepoint(self) -> _Savepoint:
        """A part of a transaction that can fail on its own."""
        return _Savepoint(self._db)

    def _meta(self, name: str) -> int | str:
        value: int | str = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0]
        return value

    def revision(self) -> int:
        """The revision of the last write."""
        return int(self._meta("revision"))

    def get_prefix(self, prefix: str) -> Snapshot:
        """Every key with a prefix, with the revision at which they were read."""
        self._db.execute("BEGIN")
        try:
            query = f"SELECT {_COLUMNS} FROM kv WHERE key >= ? AND key < ? ORDER BY key"
            rows = self._db.execute(query, (prefix, prefix_end(prefix))).fetchall()
            return Snapshot([KeyValue(*row) for row in rows], self.revision())
        finally:
            self._db.execute("COMMIT")

    def events(self, prefix: str, start: int, limit: int = 4096) -> tuple[list[Event], int]:
        """Changes from revision ``start`` on, and the revision from which to go on. May raise CompactedError."""
        self._db.execute("BEGIN")
        try:
            compacted, last = int(self._meta("compacted")), self.revision()
            if start <= compacted:
                raise CompactedError(compacted + 1)
            query = "SELECT kind, key, value, revision FROM history WHERE revision >= ? ORDER BY seq LIMIT ?"
            rows = self._db.execute(query, (start, limit)).fetchall()
            if len(rows) == limit:
                # a transaction is never cut: its rest follows with the next call, so leave it out here
                last = rows[-1][3] - 1
                if last < start:
                    query = "SELECT kind, key, value, revision FROM history WHERE revision = ? ORDER BY seq"
                    rows, last = self._db.execute(query, (start,)).fetchall(), start
        finally:
            self._db.execute("COMMIT")
        events = [Event(*row) for row in rows if row[3] <= last and row[1].startswith(prefix)]
        return events, last + 1

    def write(self, ops: Iterable[Op]) -> int:
        """Run operations as one revision; returns it."""
        operations = list(ops)
        revision = self.revision()
        if not operations:
            return revision
        revision += 1
        changed = False
        for op in operations:
            changed |= self._put(op, revision) if isinstance(op, Put) else self._delete(op, revision)
        if not changed:
            return revision - 1
        self._db.execute("UPDATE meta SET value = ? WHERE name = 'revision'", (revision,))
        return revision

    def _put(self, op: Put, revision: int) -> bool:
        if op.lease and not self.lease_alive(op.lease):
            raise LeaseExpiredError(f"key {op.key}: lease {op.lease} is unknown or has run out")
        self._db.execute(
            "INSERT INTO kv VALUES (?, ?, ?, ?, 1, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
            "mod = excluded.mod, version = version + 1, lease = excluded.lease",
            (op.key, op.value, revision, revision, op.lease),
        )
        self._record(revision, "put", op.key, op.value)
        return True

    def _delete(self, op: Delete, revision: int) -> bool:
        if op.prefix:
            bounds = (op.key, prefix_end(op.key))
            keys = [row[0] for row in self._db.execute("SELECT key FROM kv WHERE key >= ? AND key < ?", bounds)]
        else:
            keys = [row[0] for row in self._db.execute("SELECT key FROM kv WHERE key = ?", (op.key,))]
        for key in keys:
            self._db.execute("DELETE FROM kv WHERE key = ?", (key,))
            self._record(revision, "delete", key, b"")
        return bool(keys)

    def _record(self, revision: int, kind: str, key: str, value: bytes) -> None:
        self._db.execute(
            "INSERT INTO history (revision, kind, key, value) VALUES (?, ?, ?, ?)", (revision, kind, key, value)
        )

    def compare(self, conditions: Sequence[Compare]) -> bool:
        """Whether every condition holds."""
        return all(self._holds(condition) for condition in conditions)

    def _holds(self, condition: Compare) -> bool:
        end = prefix_end(condition.key) if condition.prefix else condition.key + "\0"
        query = f"SELECT {_COLUMNS} FROM kv WHERE key >= ? AND key < ?"
        rows = self._db.execute(query, (condition.key, end)).fetchall()
        if not rows:
            return condition.target != "value" and condition.expected == 0
        return all(row[_TARGETS[condition.target]] == condition.expected for row in rows)

    def compare_and_write(self, compare: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op]) -> TxnResult:
        """One transaction with conditions."""
        holds = self.compare(compare)
        return TxnResult(holds, self.write(success if holds else failure))

    def grant(self, ttl: float) -> int:
        """A new lease."""
        cursor = self._db.execute("INSERT INTO lease (ttl, expires) VALUES (?, ?)", (ttl, now() + ttl))
        return int(cursor.lastrowid or 0)

    def keep_alive(self, lease: int) -> None:
        """Begin a lease anew; LeaseExpiredError where it has run out."""
        moment = now()
        query = "UPDATE lease SET expires = ttl + ? WHERE id = ? AND expires > ?"
        if self._db.execute(query, (moment, lease, moment)).rowcount == 0:
            raise LeaseExpiredError(f"lease {lease} is unknown or has run out")

    def lease_alive(self, lease: int) -> bool:
        """Whether a lease still runs."""
        query = "SELECT 1 FROM lease WHERE id = ? AND expires > ?"
        return self._db.execute(query, (lease, now())).fetchone() is not None

    def lease_keys(self, lease: int) -> set[str]:
        """The keys under a lease; LeaseExpiredError where it has run out."""
        if not self.lease_alive(lease):
            raise LeaseExpiredError(f"lease {lease} is unknown or has run out")
        return {row[0] for row in self._db.execute("SELECT key FROM kv WHERE lease = ?", (lease,))}

    def revoke(self, leases: Sequence[int]) -> None:
        """End leases, with their keys."""
        for lease in leases:
            keys = [row[0] for row in self._db.execute("SELECT key FROM kv WHERE lease = ?", (lease,))]
            self.write([Delete(key) for key in keys])
            self._db.execute("DELETE FROM lease WHERE id = ?", (lease,))

    def expired(self) -> tuple[list[int], float | None]:
        """Leases that have run out, and in how many seconds the next one does."""
        moment = now()
        rows = self._db.execute("SELECT id, expires FROM lease ORDER BY expires").fetchall()
        gone = [row[0] for row in rows if row[1] <= moment]
        later = [row[1] for row in rows if row[1] > moment]
        return gone, later[0] - moment if later else None

    def compact(self, revision: int) -> None:
        """Forget history before ``revision``."""
        limit = min(revision, self.revision() + 1)
        self._db.execute("DELETE FROM history WHERE revision < ?", (limit,))
        query = "UPDATE meta SET value = max(value, ?) WHERE name = 'compacted'"
        self._db.execute(query, (limit - 1,))

    def trim(self, keep: int) -> None:
        """Compact where more than twice ``keep`` changes are kept."""
        first, last = self._db.execute("SELECT min(seq), max(seq) FROM history").fetchone()
        if first is None or last - first < 2 * keep:
            return
        row = self._db.execute("SELECT revision FROM history WHERE seq = ?", (last - keep,)).fetchone()
        if row:
            self.compact(row[0])


class Reader:
    """A second connection that reads single keys: some microseconds, so it may be used where waiting is not allowed.

    In WAL mode a reader waits for no writer, and sees what was committed before it began.
    """

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)

    def get(self, key: str) -> KeyValue | None:
        """One key."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM kv WHERE key = ?", (key,)).fetchone()
        return KeyValue(*row) if row else None

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class _Transaction:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            try:
                self._db.execute("COMMIT")
                return
            except sqlite3.Error:
                self._rollback()
                raise
        self._rollback()

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


class _Savepoint:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("SAVEPOINT part")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._db.execute("ROLLBACK TO part")
        self._db.execute("RELEASE part")
