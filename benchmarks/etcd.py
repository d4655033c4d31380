"""What the etcd client costs: identities a second, listing 100,000 keys, following 20,000 changes a second.

Usage: python benchmarks/etcd.py [--path DIR]    (needs no root; DIR: where etcd has its data, default a new one)
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Figure, table

from ciliate.kvstore import Put
from ciliate.kvstore.watcher import Watcher
from ciliate.lab.etcdserver import Etcd
from ciliate.labels import LabelSet
from ciliate_kvstore.etcdv3.settings import Options, settings_of
from ciliate_kvstore.etcdv3.store import EtcdStore
from ciliate_kvstore.identity_backend import KvstoreIdentities

KEYS = 100_000
CHANGES = 100_000
RATE = 20_000
BATCH = 100
IDENTITIES = 1000
VALUE = b'{"IP":"10.%d.%d.%d","HostIP":"192.168.0.1","ID":12345,"Key":0,"Metadata":"cilium-global:default:node17:1234"}'
PREFIX = "cilium/state/ip/v1/default/"


async def connect(address: str) -> EtcdStore:
    store = EtcdStore(settings_of(Options(address=address, qps=0)))
    await store.start()
    return store


def items(count: int, generation: int) -> list[list[Put]]:
    """Batches of keys as agents write them for pods."""
    puts = [
        Put(f"{PREFIX}10.{n >> 16}.{n >> 8 & 255}.{n & 255}", VALUE % (n >> 16, n >> 8 & 255, generation))
        for n in range(count)
    ]
    return [puts[first : first + BATCH] for first in range(0, count, BATCH)]


async def fill(address: str, generation: int, rate: float = 0.0) -> float:
    """Write all keys, at ``rate`` a second where one is given; the rate that was reached."""
    store, began = await connect(address), time.perf_counter()
    limit = asyncio.Semaphore(16)
    tasks = []

    async def write(batch: list[Put]) -> None:
        async with limit:
            await store.put_many(batch)

    for number, batch in enumerate(items(CHANGES, generation)):
        if rate:
            await asyncio.sleep(max(0.0, began + number * BATCH / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(write(batch)))
    await asyncio.gather(*tasks)
    spent = time.perf_counter() - began
    await store.stop()
    return CHANGES / spent


async def list_keys(address: str) -> tuple[float, float]:
    """Wall seconds and CPU seconds of reading every key into records."""
    store = await connect(address)
    began, cpu = time.perf_counter(), time.process_time()
    records: dict[str, bytes] = {}
    watcher = Watcher(store, PREFIX, lambda name, value: value, lambda found, gone: records.update(found))
    await watcher.start()
    await watcher.synced.wait()
    result = time.perf_counter() - began, time.process_time() - cpu
    assert len(records) == KEYS
    await watcher.stop()
    await store.stop()
    return result


async def follow(address: str) -> tuple[float, float, float]:
    """Rate of another process that writes, CPU seconds a change, seconds from the last write to its arrival."""
    store, generation = await connect(address), 7
    count = 0

    def change(found: dict[str, bytes], gone: object) -> None:
        nonlocal count
        count += len(found)

    watcher = Watcher(store, PREFIX, lambda name, value: value, change)
    await watcher.start()
    await watcher.synced.wait()
    count, cpu = 0, time.process_time()
    writer = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--write", address, str(generation), stdout=subprocess.PIPE
    )
    output, _ = await writer.communicate()
    ended = time.perf_counter()
    while count < CHANGES:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    lag, spent = time.perf_counter() - ended, time.process_time() - cpu
    await watcher.stop()
    await store.stop()
    return float(output), spent / CHANGES, lag


async def allocate(address: str) -> float:
    """New identities a second of one node, 16 at a time."""
    store = await connect(address)
    backend = KvstoreIdentities(store, "node1")
    await backend.start()
    labels = [LabelSet.parse([f"k8s:app={number}"]) for number in range(IDENTITIES)]
    limit = asyncio.Semaphore(16)

    async def one(item: LabelSet) -> None:
        async with limit:
            await backend.allocate(item)

    began = time.perf_counter()
    await asyncio.gather(*(one(item) for item in labels))
    spent = time.perf_counter() - began
    await backend.stop()
    await store.stop()
    return IDENTITIES / spent


async def measure(address: str) -> list[Figure]:
    """Every figure."""
    identities = await allocate(address)
    await fill(address, 1)
    wall, cpu = await list_keys(address)
    rate, each, lag = await follow(address)
    reached = f"written at {rate:,.0f}/s in transactions of {BATCH}"
    beside = f"{cpu / KEYS * 1e6:.1f} µs CPU a key"
    return [
        Figure("new identities, fsync", f"{identities:,.0f}/s", "> 100/s", 100 / identities, "one node, 16 at a time"),
        Figure("100,000 keys listed and decoded", f"{wall:.2f} s", "< 4 s", wall / 4, beside),
        Figure("changes followed, CPU each", f"{each * 1e6:.1f} µs", "< 40 µs", each / 40e-6, reached),
        Figure("lag after the last change", f"{lag * 1000:.0f} ms", "< 1 s", lag, ""),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--path", type=Path, help="where to put etcd's data")
    parser.add_argument("--write", nargs=2, metavar=("ADDRESS", "GENERATION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        print(asyncio.run(fill(arguments.write[0], int(arguments.write[1]), RATE)))
        return
    with (
        tempfile.TemporaryDirectory(prefix="ciliate-bench-", dir=arguments.path) as text,
        Etcd(Path(text) / "etcd", fsync=True) as server,
    ):
        print(table(asyncio.run(measure(server.address))))


if __name__ == "__main__":
    main()
