"""Large maps from Python: an ipcache written, a conntrack table swept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_network
from statistics import median

from report import Figure, seconds

from ciliate.datapath import conntrack, layout
from ciliate.datapath.bpf import LPM_TRIE, LRU_HASH, Map

_NO_PREALLOC = 1
PREFIXES, FLOWS, DEAD = 100_000, 500_000, 10
TARGET = 0.5


def write_ipcache(rounds: int) -> float:
    """Seconds to encode and write the prefixes into an empty map."""
    prefixes = {ip_network(int(IPv4Address("10.0.0.0")) + number): 1000 + number for number in range(PREFIXES)}
    took = []
    for _ in range(rounds):
        table = Map.create(LPM_TRIE, layout.IPCACHE_KEY.size, layout.IPCACHE_ENTRY.size, 512000, _NO_PREALLOC)
        begin = time.perf_counter()
        table.update_many((layout.ipcache_key(key), layout.ipcache_entry(number)) for key, number in prefixes.items())
        took.append(time.perf_counter() - begin)
        table.close()
    return median(took)


def sweep(rounds: int) -> tuple[float, int]:
    """Seconds to go through a full table and remove what is dead, one entry in DEAD; and how many those were."""
    table = Map.create(LRU_HASH, layout.CT_KEY.size, layout.CT_ENTRY.size, 786432, 0, "benchmark_ct")
    took, removed = [], 0
    try:
        for _ in range(rounds):
            table.update_many(flows())
            result = conntrack.collect([table], 1000)
            took.append(result.seconds)
            removed = result.removed
            if not (result.seen == FLOWS and removed == FLOWS // DEAD):
                raise RuntimeError(f"saw {result.seen} flows and removed {removed}, expected {FLOWS} and one in {DEAD}")
    finally:
        table.close()
    return median(took), removed


def flows() -> Iterator[tuple[bytes, bytes]]:
    """The flows of a busy node."""
    target = layout.to_mapped(IPv4Address("10.1.0.1"))
    values = [
        layout.CT_ENTRY.pack(5000 * bool(index % DEAD), 0, 0, b"\2\2", 4, 9, 1, 0, 0, 7, 1, *bytes(6), 5, 4, 500, 400)
        for index in range(DEAD)
    ]
    for number in range(FLOWS):
        source = layout.to_mapped(IPv4Address(0x0A000000 + number // 50))
        yield (
            layout.CT_KEY.pack(source, target, (number % 50).to_bytes(2, "big"), b"\0P", 6, 0),
            values[number % DEAD],
        )


def measure(quick: bool) -> list[Figure]:
    """Both figures."""
    written = write_ipcache(1 if quick else 3)
    swept, removed = sweep(1 if quick else 3)
    return [
        Figure("100,000 ipcache entries written", seconds(written), "< 0.5 s", written / TARGET),
        Figure(f"{FLOWS:,} flows swept", seconds(swept), "< 0.5 s", swept / TARGET, f"{removed:,} of them removed"),
    ]
