"""How backends are picked: the datapath's hash, and tables by which few flows move when backends come or go.

The tables follow Maglev (Eisenbud et al., NSDI 2016, section 3.4): every backend has a permutation of all places, made
from its own name alone, and in turn each takes its next place that is free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

SIZE = 1021
_MASK = 0xFFFFFFFF


def _mix(value: int, word: int) -> int:
    value = (value ^ word) * 0x9E3779B1 & _MASK
    return value ^ value >> 15


def flow_hash(source: bytes, destination: bytes, source_port: int, destination_port: int, proto: int) -> int:
    """The hash of a flow, as ``lb_hash`` makes it on machines that store the lowest byte first.

    Addresses are 16 bytes, IPv4 mapped into IPv6.
    """
    value = 0x2545F491
    for part in (source, destination):
        for index in range(0, 16, 4):
            value = _mix(value, int.from_bytes(part[index : index + 4], "little"))
    ports = [int.from_bytes(port.to_bytes(2, "big"), "little") for port in (source_port, destination_port)]
    value = _mix(_mix(value, ports[0] << 16 | ports[1]), proto)
    value = (value ^ value >> 16) * 0x85EBCA6B & _MASK
    value = (value ^ value >> 13) * 0xC2B2AE35 & _MASK
    return value ^ value >> 16


def place_of(value: int, count: int) -> int:
    """Which of ``count`` places a hash means."""
    return value * count >> 32


def maglev_table(backends: Sequence[tuple[bytes, int]], size: int = SIZE) -> list[int]:
    """The table of backends given as (name, id): ids by place. Empty without backends. ``size`` is a prime."""
    if not backends:
        return []
    steps = []
    for name, number in sorted(backends):
        digest = hashlib.blake2s(name, digest_size=8).digest()
        offset = int.from_bytes(digest[:4], "little") % size
        skip = int.from_bytes(digest[4:], "little") % (size - 1) + 1
        steps.append([offset, skip, number])
    table, filled = [0] * size, 0
    while True:
        for step in steps:
            place = step[0]
            while table[place]:
                place = (place + step[1]) % size
            table[place] = step[2]
            step[0] = (place + step[1]) % size
            filled += 1
            if filled == size:
                return table
