"""What the datapath costs: new endpoints, packets, memory, large maps. Run as root: python benchmarks/datapath.py

Pod to pod is measured in interleaved rounds with the kernel's routing, both ends on one processor; ratios hold better
than times. --quick takes some 20 seconds and is good to a few hundredths.
"""

from __future__ import annotations

import asyncio

import endpoints
import packets
import sweeps
import transactions
from report import Figure, run_parts

PARTS = ("endpoints", "pods", "packets", "maps")


def measure(part: str, quick: bool) -> list[Figure]:
    """The figures of one part."""
    if part == "endpoints":
        return asyncio.run(endpoints.measure(endpoints.QUICK if quick else endpoints.FULL))
    if part == "pods":
        return asyncio.run(transactions.measure(transactions.QUICK if quick else transactions.FULL))
    if part == "packets":
        return packets.figures(*packets.measure(200 if quick else 1000))
    return sweeps.measure(quick)


def main() -> None:
    """Measure and print."""
    run_parts(__doc__ or "", PARTS, measure)


if __name__ == "__main__":
    main()
