"""What the datapath costs: new endpoints, packets, memory, large maps. Run as root: python benchmarks/datapath.py

Pod to pod is measured in interleaved rounds with the kernel's routing, both ends on one processor; ratios hold better
than times. --quick takes some 20 seconds and is good to a few hundredths.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

import endpoints
import packets
import sweeps
import transactions
from report import Figure, table

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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and endpoints")
    parser.add_argument("--only", choices=PARTS, action="append", help="leave the other parts out")
    arguments = parser.parse_args()
    if os.geteuid():
        sys.exit("benchmarks/datapath.py: needs root, for namespaces and BPF programs")
    figures = [figure for part in arguments.only or PARTS for figure in measure(part, arguments.quick)]
    print(table(figures))


if __name__ == "__main__":
    main()
