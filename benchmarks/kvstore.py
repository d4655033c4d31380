"""What a key-value store does on this disk: acknowledged writes, reads, and how soon another process hears of a change.

Usage: python benchmarks/kvstore.py [--path DIR]    (needs no root; DIR: where the store's file is, default a new one)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from report import Figure, seconds, table

from ciliate.kvstore import Put
from ciliate_kvstore.sqlite import SqliteStore

KEYS = 20_000
BATCH = 100
WRITERS = 64
WAKES = 50


async def batched_writes(store: SqliteStore) -> float:
    """Acknowledged keys a second, in transactions of BATCH, one after another."""
    start = time.perf_counter()
    for first in range(0, KEYS, BATCH):
        await store.put_many([Put(f"batch/{number}", b"x" * 64) for number in range(first, first + BATCH)])
    return KEYS / (time.perf_counter() - start)


async def concurrent_writes(store: SqliteStore) -> float:
    """Acknowledged single puts a second from WRITERS writers, which share commits."""

    async def writer(number: int) -> None:
        for item in range(KEYS // WRITERS):
            await store.put(f"single/{number}/{item}", b"x" * 64)

    start = time.perf_counter()
    await asyncio.gather(*(writer(number) for number in range(WRITERS)))
    return KEYS // WRITERS * WRITERS / (time.perf_counter() - start)


async def reads(store: SqliteStore) -> float:
    """Single gets a second, one after another."""
    start = time.perf_counter()
    for number in range(KEYS):
        await store.get(f"batch/{number}")
    return KEYS / (time.perf_counter() - start)


def raw_writes(directory: Path) -> float:
    """Appends with fdatasync a second: what the disk can do, as a baseline."""
    file = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    start = time.perf_counter()
    for _ in range(200):
        os.write(file, b"x" * 4096)
        os.fdatasync(file)
    os.close(file)
    return 200 / (time.perf_counter() - start)


WATCHER = """
import asyncio, sys, time
from pathlib import Path
from ciliate_kvstore.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.start()
    revision = (await store.status()).revision
    print("ready", flush=True)
    async for events in store.watch_prefix("wake/", revision + 1):
        moment = time.clock_gettime(time.CLOCK_MONOTONIC)
        for event in events:
            print(moment - float(event.value), flush=True)
            if event.key == "wake/last":
                return

asyncio.run(main())
"""


async def wake_ups(store: SqliteStore, path: Path) -> list[float]:
    """Seconds from before a put to its arrival in another process."""
    watcher = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", WATCHER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert watcher.stdout is not None
        await asyncio.to_thread(watcher.stdout.readline)
        for number in range(WAKES):
            key = "wake/last" if number == WAKES - 1 else f"wake/{number}"
            await store.put(key, str(time.clock_gettime(time.CLOCK_MONOTONIC)).encode())
            await asyncio.sleep(0.02)
        output = await asyncio.to_thread(watcher.stdout.read)
        return [float(line) for line in output.split()]
    finally:
        watcher.kill()
        watcher.wait()


async def measure(directory: Path) -> list[Figure]:
    """Every figure."""
    path = directory / "kvstore.db"
    store = SqliteStore(path)
    await store.start()
    batched, single, read = await batched_writes(store), await concurrent_writes(store), await reads(store)
    raw = raw_writes(directory)
    wakes = await wake_ups(store, path)
    await store.stop()
    beside = f"the disk alone: {raw:,.0f} synced appends/s"
    worst = f"worst of {len(wakes)}: {seconds(max(wakes))}"
    return [
        Figure("acknowledged writes in batches of 100", f"{batched:,.0f}/s", "> 5,000/s", 5_000 / batched, beside),
        Figure("single puts of 64 writers at once", f"{single:,.0f}/s", "> 5,000/s", 5_000 / single, beside),
        Figure("reads", f"{read:,.0f}/s", "> 20,000/s", 20_000 / read),
        Figure("wake-up in another process", seconds(median(wakes)), "< 20 ms", median(wakes) / 0.02, worst),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--path", type=Path, help="where to put the store")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ciliate-bench-", dir=arguments.path) as text:
        print(table(asyncio.run(measure(Path(text)))))


if __name__ == "__main__":
    main()
