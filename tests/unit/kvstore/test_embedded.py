"""The embedded store where the kit cannot look: kill -9, other processes, history, leases of dead holders."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ciliate.kvstore import CompactedError, KvstoreError, Put
from ciliate.kvstore.local_keys import LocalKeys
from ciliate_kvstore.sqlite import SqliteStore

WRITER = """
import asyncio, sys
from pathlib import Path
from ciliate_kvstore.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.start()
    number = int(sys.argv[2])
    async def write(lane):
        count = 0
        while True:
            await store.put(f"w/{lane}/{count}", b"x" * 100)
            print(f"w/{lane}/{count}", flush=True)
            count += 1
    await asyncio.gather(*(write(f"{number}-{lane}") for lane in range(4)))

asyncio.run(main())
"""

HOLDER = """
import asyncio, sys
from pathlib import Path
from ciliate_kvstore.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.start()
    lease = await store.lease(0.5)
    await store.put("held", b"", lease.id)
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def opened(path: Path, **options: int):
    store = SqliteStore(path, **options)
    await store.start()
    try:
        yield store
    finally:
        await store.stop()


@pytest.mark.parametrize("round_number", range(6))
def test_kill_9_loses_no_acknowledged_write(tmp_path: Path, round_number: int) -> None:
    """Two processes write at once and are killed at a random moment; every acknowledged key is there."""
    path, chance = tmp_path / "kv.db", random.Random(round_number)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(number)], stdout=subprocess.PIPE)
        for number in range(2)
    ]
    acknowledged: list[bytes] = []
    try:
        for writer in writers:
            assert writer.stdout is not None
            for _ in range(chance.randrange(20, 200)):
                acknowledged.append(writer.stdout.readline())
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            rest, _ = writer.communicate()
            # the last line may be cut by the kill: only whole ones were acknowledged
            acknowledged.extend(line for line in rest.splitlines(keepends=True) if line.endswith(b"\n"))
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    present = {row[0] for row in database.execute("SELECT key FROM kv")}
    revisions = [row[0] for row in database.execute("SELECT DISTINCT revision FROM history ORDER BY revision")]
    database.close()
    lost = {line.decode().strip() for line in acknowledged} - present
    assert not lost
    assert revisions == list(range(1, len(revisions) + 1))


async def test_a_dead_holders_keys_go(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(path), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"ready\n"
    holder.kill()
    await holder.wait()
    async with opened(path) as store:
        revision = (await store.get_prefix("")).revision
        if await store.get("held") is not None:
            async with asyncio.timeout(10):
                async for events in store.watch_prefix("held", revision + 1):
                    assert [event.kind for event in events] in ([], ["delete"])
                    if events:
                        break
        assert await store.get("held") is None


async def test_history_is_bounded_and_a_watch_that_lags_is_told(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv.db", history=50) as store:
        for number in range(20):
            await store.put_many([Put(f"k/{number}/{item}", b"") for item in range(20)])
        with pytest.raises(CompactedError):
            async for _ in store.watch_prefix("k/", 1):
                pass
        count = await store.write(lambda db: db._db.execute("SELECT count(*) FROM history").fetchone()[0])
        assert count <= 121


async def test_a_transaction_is_never_cut_between_two_batches_of_a_watch(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv.db") as store:
        for size in (3000, 3000, 5000):
            await store.put_many([Put(f"k/{size}/{item}", b"") for item in range(size)])
        seen: dict[int, int] = {}
        async with asyncio.timeout(10):
            async for events in store.watch_prefix("k/", 1):
                for event in events:
                    seen[event.mod_revision] = seen.get(event.mod_revision, 0) + 1
                if len(seen) == 3:
                    break
        assert list(seen.values()) == [3000, 3000, 5000]


async def test_a_write_that_fails_leaves_the_others_of_its_commit(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv.db") as store:
        results = await asyncio.gather(
            store.put("a", b""), store.put("b", b"", lease=99), store.put("c", b""), return_exceptions=True
        )
        assert isinstance(results[1], KvstoreError)
        assert [item.key for item in (await store.get_prefix("")).items] == ["a", "c"]


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as one" * 20])
async def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kv.db"
    path.write_bytes(content)
    with pytest.raises(KvstoreError, match=str(path)):
        await SqliteStore(path).start()


async def test_a_key_whose_end_is_told_before_its_writer_hears_of_it_is_written_again(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "kvstore.db")
    await store.start()
    local = LocalKeys(store, sync_interval=3600)
    await local.start()
    local.guard("g/")
    try:
        async with asyncio.timeout(20):
            local.set("g/marker", b"1")
            await local.flush()
            done = await store.transaction([], [Put("g/key", b"1", await local.lease())])
            await store.delete("g/key")
            # what was told before is told by the time that a later loss has been made up for
            last = await store.delete("g/marker")
            while not last or (await store.get("g/marker")) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            local.adopt("g/key", b"1", done.revision)
            while await store.get("g/key") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await local.stop()
        await store.stop()
