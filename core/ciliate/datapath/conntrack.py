"""Conntrack maps from user space: listing, collection of dead entries, flushing. Blocking."""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from ciliate.datapath import layout
from ciliate.datapath.bpf import Map
from ciliate.datapath.layout import (
    CT_END,
    CT_ENTRY,
    CT_FIRST_OUT,
    CT_KEY,
    CT_SHARE,
    Address,
    ConntrackEntry,
    conntrack_entries,
)
from ciliate.measure import CONNTRACK_ENTRIES, CONNTRACK_RUNS, CONNTRACK_TIME, DATAPATH_ERRORS

MAPS = ("ciliate_ct_tcp", "ciliate_ct_any")
TABLES = ("TCP", "non-TCP")
SHARES = "ciliate_ct_share"
PART = 8
"""An endpoint's share is one of so many parts of a table (CT_SHARE in ``conntrack.h``)."""
_FAMILY = "all"
"""Both families are in one map."""
_PROTOCOLS = {"ciliate_ct_tcp": "TCP"}
_END = f"20xH{CT_END.size - 22}x"
_STATE = f"20xHB{CT_END.size - 23}x"
_STATES = struct.Struct(f"=I12x{_STATE}{_STATE}{CT_ENTRY.size - 16 - 2 * CT_END.size}x")
_ENDPOINTS = struct.Struct(f"=16x{_END}{_END}{CT_ENTRY.size - 16 - 2 * CT_END.size}x")


class Sweep(NamedTuple):
    """What one collection saw and removed, and how many seconds it took."""

    seen: int
    removed: int
    seconds: float


LONGEST, SHORTEST = 12 * 3600.0, 60.0
"""Seconds between collections: the maps evict by themselves (LRU), so that an idle node rarely looks (DP-C12)."""
_BUSY = 0.25


def next_interval(sweep: Sweep, capacity: int) -> float:
    """Seconds to wait after a collection: the longest while less than a quarter is in use, less the fuller they are."""
    left = (sweep.seen - sweep.removed) / capacity
    if left <= _BUSY:
        return LONGEST
    return max(SHORTEST, LONGEST * (_BUSY / left) ** 4 * (1 - min(left, 1.0)))


def entries(maps: Collection[Map]) -> Iterator[ConntrackEntry]:
    """Every flow at every endpoint that tracks it. Flows that come or go meanwhile may be missed."""
    for table in maps:
        for key, value in table.items():
            yield from conntrack_entries(key, value)


def collect(maps: Collection[Map], now: int | None = None, shares: Map | None = None) -> Sweep:
    """Remove entries past their lifetime (seconds of the monotonic clock).

    ``shares`` is told what each endpoint has left.
    """
    moment = int(time.monotonic()) if now is None else now
    before = read_shares(shares) if shares is not None else {}
    left: list[Counter[int]] = [Counter() for _ in maps]
    swept = [_collect(table, moment, count) for table, count in zip(maps, left, strict=True)]
    if shares is not None:
        _write_shares(shares, before, left)
    return Sweep(*(sum(part) for part in zip(*swept, strict=True))) if swept else Sweep(0, 0, 0.0)


class Share(NamedTuple):
    """Entries that count as an endpoint's, in the order of `MAPS`, and how many took the place of one of its own."""

    used: tuple[int, int]
    replaced: tuple[int, int]


def read_shares(table: Map) -> dict[int, Share]:
    """By endpoint, of those that have or had any; 0 is everybody together."""
    found = {}
    for keys, values, count in table.batches():
        numbers = struct.unpack_from(f"={count}I", keys)
        content = CT_SHARE.iter_unpack(memoryview(values)[: count * CT_SHARE.size])
        for number, value in zip(numbers, content, strict=True):
            if any(value):
                found[number] = Share(value[:2], value[2:])
    return found


def share_of(table: Map, endpoint: int) -> Share:
    """Of one endpoint; 0 is everybody together."""
    value = CT_SHARE.unpack(table.lookup(endpoint.to_bytes(4, "little")) or bytes(CT_SHARE.size))
    return Share(value[:2], value[2:])


def forget_share(table: Map, endpoint: int) -> None:
    """An endpoint is gone, with all that it had."""
    table.update(endpoint.to_bytes(4, "little"), bytes(CT_SHARE.size))


def _write_shares(table: Map, before: Mapping[int, Share], left: Sequence[Counter[int]]) -> None:
    """What was counted, and what programs added meanwhile. What they add at this very moment is lost."""
    after, fresh = read_shares(table), []
    everybody = [sum(count.values()) for count in left]
    for number in {0, *after, *(owner for count in left for owner in count if owner)}:
        now, then = after.get(number, _NOTHING), before.get(number, _NOTHING)
        counted = everybody if number == 0 else [count[number] for count in left]
        used = [have + max(0, more - had) for have, more, had in zip(counted, now.used, then.used, strict=True)]
        if tuple(used) != now.used:
            fresh.append((number.to_bytes(4, "little"), CT_SHARE.pack(*used, *now.replaced)))
    table.update_many(fresh)


_NOTHING = Share((0, 0), (0, 0))


def _collect(table: Map, moment: int, left: Counter[int]) -> Sweep:
    labels = (_FAMILY, _PROTOCOLS.get(table.name, "non-TCP"))
    try:
        found = _sweep([table], lambda keys, values: _expired(values, moment, left))
    except OSError:
        CONNTRACK_RUNS.add(*labels, "uncompleted")
        DATAPATH_ERRORS.add("conntrack", "collect", _FAMILY)
        raise
    CONNTRACK_RUNS.add(*labels, "completed")
    CONNTRACK_TIME.observe(*labels, "completed", seconds=found.seconds)
    CONNTRACK_ENTRIES.set(*labels, "alive", value=found.seen - found.removed)
    CONNTRACK_ENTRIES.set(*labels, "deleted", value=found.removed)
    return found


def purge(maps: Collection[Map], endpoints: Collection[int], addresses: Collection[Address]) -> Sweep:
    """Remove every flow that one of these endpoints has, or that names one of these addresses."""
    names = {layout.to_mapped(address) for address in addresses}

    def picked(keys: memoryview, values: memoryview) -> list[int]:
        found = set(_of_endpoints(values, endpoints)) if endpoints else set()
        if names:
            found.update(_naming(keys, CT_KEY.size, names))
        return sorted(found)

    return _sweep(maps, picked)


def purge_table(table: Map, addresses: Collection[Address], in_value: bool = False) -> int:
    """Remove entries of another table that name one of these addresses; how many went.

    The key begins with one or two addresses as in conntrack keys. ``in_value``: so does the value.
    """
    names, size, removed = {layout.to_mapped(address) for address in addresses}, table.key_size, 0
    for keys, values, count in table.batches():
        found = set(_naming(memoryview(keys)[: count * size], size, names))
        if in_value:
            found.update(_naming(memoryview(values)[: count * table.value_size], table.value_size, names, 1))
        if found:
            removed += table.delete_many(bytes(keys[index * size : (index + 1) * size]) for index in sorted(found))
    return removed


def _naming(data: memoryview, size: int, names: Collection[bytes], most: int = 2) -> list[int]:
    """Which structs of this size begin with one of these addresses, or have one as their second part."""
    parts = min(most, size // 16)
    reader = struct.Struct("=" + "16s" * parts + f"{size - 16 * parts}x")
    return [index for index, found in enumerate(reader.iter_unpack(data)) if any(name in names for name in found)]


def flush(maps: Collection[Map], select: Callable[[ConntrackEntry], bool] = lambda entry: True) -> Sweep:
    """Remove the flows that ``select`` picks at either end; all of them without it."""

    def picked(keys: memoryview, values: memoryview) -> list[int]:
        chosen = []
        for index in range(len(keys) // CT_KEY.size):
            key = bytes(keys[index * CT_KEY.size : (index + 1) * CT_KEY.size])
            value = bytes(values[index * CT_ENTRY.size : (index + 1) * CT_ENTRY.size])
            if any(map(select, conntrack_entries(key, value))):
                chosen.append(index)
        return chosen

    return _sweep(maps, picked)


def _expired(values: memoryview, moment: int, left: Counter[int]) -> list[int]:
    """Which are over; the others count as of whose pod began them here, or got the first packet."""
    dead, owners = [], []
    for index, (lifetime, one, first_one, two, first_two) in enumerate(_STATES.iter_unpack(values)):
        if lifetime < moment:
            dead.append(index)
        elif first_one and (first_one == CT_FIRST_OUT or first_two != CT_FIRST_OUT):
            owners.append(one)
        else:
            owners.append(two)
    left.update(owners)
    return dead


def _of_endpoints(values: memoryview, gone: Collection[int]) -> list[int]:
    return [index for index, ends in enumerate(_ENDPOINTS.iter_unpack(values)) if any(end in gone for end in ends)]


def _sweep(maps: Collection[Map], pick: Callable[[memoryview, memoryview], list[int]]) -> Sweep:
    begin, seen, removed = time.perf_counter(), 0, 0
    for table in maps:
        for keys, values, count in table.batches():
            seen += count
            key_view = memoryview(keys)[: count * CT_KEY.size]
            dead = pick(key_view, memoryview(values)[: count * CT_ENTRY.size])
            if dead:
                size = CT_KEY.size
                removed += table.delete_many(bytes(key_view[index * size : (index + 1) * size]) for index in dead)
    return Sweep(seen, removed, time.perf_counter() - begin)
