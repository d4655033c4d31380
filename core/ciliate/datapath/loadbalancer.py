"""Writes services into the datapath's maps so that no packet meets half of one, and adopts what is there. Blocking.

Order of a change: new backends; the slots of each service's next generation, its members, table, ranges and reverse
entry; then the services' own entries, each of which is one step from the old to the new; then what nothing names any
more, backends last. A service that goes loses its own entry first.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ciliate.datapath import lblayout as lay
from ciliate.datapath.bpf import Map
from ciliate.datapath.layout import Address, Network, mapped

MOST = 5
"""Of how many clients it is told how many ports they have."""
_PROTO_AT = 36
TABLES = tuple(name for name in lay.MAP_STRUCTS if name != "ciliate_lb_sock")


class Entry(NamedTuple):
    """What the kernel is to have of one service. ``frontend`` is address, port and protocol as in its key;
    ``table`` its Maglev table, or None where it is picked at random; ``flags`` without those that follow from others.
    The last ``behind`` backends are for the policy Local alone, which has none among the others then.
    """

    id: int
    frontend: bytes
    backends: tuple[int, ...]
    local: int = 0
    affinity: int = 0
    flags: int = 0
    ranges: tuple[Network, ...] = ()
    table: Sequence[int] | None = None
    behind: int = 0

    @property
    def serving(self) -> int:
        """How many backends serve everybody."""
        return len(self.backends) - self.behind


class Counts(NamedTuple):
    """How many entries a comparison wrote and removed."""

    written: int
    removed: int


class LoadBalancer:
    """The maps of one node's services."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        self._maps = dict(maps)
        self._services, self._slots = maps["ciliate_lb_services"], maps["ciliate_lb_slots"]
        self._backends, self._reverse = maps["ciliate_lb_backends"], maps["ciliate_lb_reverse"]
        self._members, self._tables = maps["ciliate_lb_members"], maps["ciliate_lb_maglev"]
        self._ranges = maps["ciliate_lb_ranges"]
        self._generations: dict[int, int] = {}

    @classmethod
    def open(cls, pins: Path) -> LoadBalancer:
        """The pinned maps; DatapathError where they are not there."""
        return cls({name: Map.open(pins / name) for name in TABLES})

    def close(self) -> None:
        """Close the descriptors."""
        for table in self._maps.values():
            table.close()

    def room(self) -> dict[str, int]:
        """How many services, slots and backends there can be."""
        found = {"services": self._services, "slots": self._slots, "backends": self._backends}
        return {name: table.max_entries for name, table in found.items()}

    def collect(self, now: int) -> Shares:
        """Forget flows that are over (``now``: seconds of the monotonic clock); returns how ports are shared out."""
        collect_flows(self._maps["ciliate_lb_flow"], self._backends, now)
        return collect_clients(self._maps["ciliate_lb_client"], self._maps["ciliate_lb_share"], now)

    def write(
        self,
        backends: Mapping[int, bytes],
        upserts: Sequence[tuple[Entry, Entry | None]],
        deletes: Sequence[Entry],
        gone: Iterable[int],
    ) -> None:
        """Follow a change: services with what they were before, services and backends that go."""
        self._services.delete_many(_front(entry) for entry in deletes)
        self._backends.update_many((_number(number), _backend(number, key)) for number, key in backends.items())
        old = [(item, self._generations.get(item.id, 0)) for _, item in upserts if item is not None]
        stale = [_front(before) for entry, before in upserts if before and before.frontend != entry.frontend]
        for entry, _ in upserts:
            self._generations[entry.id] = self._generations.get(entry.id, 0) + 1 & 0xFFFF
        self._write_parts([entry for entry, _ in upserts])
        self._services.update_many((_front(entry), self._value(entry)) for entry, _ in upserts)
        self._services.delete_many(stale)
        kept = {entry.id: entry for entry, _ in upserts}
        self._remove_parts([*old, *((entry, self._generations.pop(entry.id, 0)) for entry in deletes)], kept)
        self._reverse.delete_many(_number(entry.id) for entry in deletes)
        self._backends.delete_many(map(_number, gone))

    def _value(self, entry: Entry) -> bytes:
        flags = entry.flags | (lay.MAGLEV if entry.table else 0) | (lay.RANGES if entry.ranges else 0)
        flags |= lay.LOCAL_BEHIND if entry.behind else 0
        generation, local = self._generations[entry.id], entry.behind or entry.local
        return lay.SERVICE.pack(entry.id, entry.serving, local, generation, flags, entry.affinity)

    def _write_parts(self, entries: Sequence[Entry]) -> None:
        self._slots.update_many(
            item for entry in entries for item in self._slots_of(entry, self._generations[entry.id])
        )
        self._members.update_many((key, _number(1)) for entry in entries for key in _members(entry))
        self._tables.update_many((_number(item.id), _table(item.table)) for item in entries if item.table)
        self._ranges.update_many((key, _number(1)) for entry in entries for key in _ranges(entry))
        self._reverse.update_many((_number(entry.id), entry.frontend + b"\0") for entry in entries)

    @staticmethod
    def _slots_of(entry: Entry, generation: int) -> list[tuple[bytes, bytes]]:
        pack, number = lay.SLOT.pack, lay.NUMBER.pack
        return [(pack(entry.id, generation, slot), number(item)) for slot, item in enumerate(entry.backends)]

    def _remove_parts(self, entries: Sequence[tuple[Entry, int]], kept: Mapping[int, Entry]) -> None:
        """Slots of old generations, and what of the rest the service has no more."""
        pack = lay.SLOT.pack
        self._slots.delete_many(
            pack(entry.id, generation, slot) for entry, generation in entries for slot in range(len(entry.backends))
        )
        pairs = [(entry, kept.get(entry.id)) for entry, _ in entries]
        self._members.delete_many(
            key for old, new in pairs for key in _members(old) - (_members(new) if new else frozenset())
        )
        self._ranges.delete_many(
            key for old, new in pairs for key in _ranges(old) - (_ranges(new) if new else frozenset())
        )
        self._tables.delete_many(_number(old.id) for old, new in pairs if old.table and not (new and new.table))

    def adopt(self, entries: Sequence[Entry], backends: Mapping[int, bytes]) -> Counts:
        """Make the maps so, whatever an earlier run left in them; what is right already is not touched."""
        pack, number = lay.BACKEND.pack, lay.NUMBER.pack
        wanted = {number(item): pack(key[:16], item, key[16:18], key[18]) for item, key in backends.items()}
        stale_backends, written = _difference(self._backends, wanted)
        del wanted
        services, slots = _snapshot(self._services), _numbers(self._slots)
        changed, fresh, extra_slots = self._adopt_generations(entries, services, slots)
        del slots
        self._slots.update_many(fresh)
        stale = [
            *self._compare(self._members, {key: _number(1) for entry in entries for key in _members(entry)}),
            *self._compare(self._ranges, {key: _number(1) for entry in entries for key in _ranges(entry)}),
            *self._compare(self._reverse, {_number(entry.id): entry.frontend + b"\0" for entry in entries}),
            *self._compare(self._tables, {_number(item.id): _table(item.table) for item in entries if item.table}),
        ]
        self._services.update_many(changed.items())
        fronts = {_front(entry) for entry in entries}
        removed = self._services.delete_many(key for key in services if key not in fronts)
        removed += self._slots.delete_many(extra_slots)
        for table, keys in stale:
            removed += table.delete_many(keys)
        removed += self._backends.delete_many(stale_backends)
        return Counts(written + len(changed) + len(fresh), removed)

    def _adopt_generations(
        self, entries: Sequence[Entry], services: Mapping[bytes, bytes], slots: dict[int, int]
    ) -> tuple[dict[bytes, bytes], list[tuple[bytes, bytes]], list[bytes]]:
        """Keep the generation of each service that is as it should be; the others get the slots of a new one.

        Returns the services' entries that have to be written, the slots, and those that nobody wants. Empties ``slots``
        of what is right.
        """
        changed: dict[bytes, bytes] = {}
        fresh: list[tuple[bytes, bytes]] = []
        self._generations = {}
        for entry in entries:
            front = _front(entry)
            present = services.get(front)
            generation = lay.service_of(present).generation if present else 0
            self._generations[entry.id] = generation
            first, count = _slot_number(entry.id, generation, 0), len(entry.backends)
            keys = range(first, first + count * _SLOT_STEP, _SLOT_STEP) if count else ()
            if present == self._value(entry) and tuple(map(slots.get, keys)) == entry.backends:
                for key in keys:
                    del slots[key]
                continue
            self._generations[entry.id] = generation + 1 & 0xFFFF
            fresh += self._slots_of(entry, self._generations[entry.id])
            changed[front] = self._value(entry)
        extra = [key.to_bytes(lay.SLOT.size, sys.byteorder) for key in slots]
        return changed, fresh, list(set(extra) - {key for key, _ in fresh})

    def _compare(self, table: Map, wanted: Mapping[bytes, bytes]) -> list[tuple[Map, list[bytes]]]:
        stale, _ = _difference(table, wanted)
        return [(table, stale)]


def _difference(table: Map, wanted: Mapping[bytes, bytes]) -> tuple[list[bytes], int]:
    """Write what is missing or wrong; returns the keys that should not be there and how many were written."""
    present = _snapshot(table)
    if present == wanted:
        return [], 0
    missing = [(key, value) for key, value in wanted.items() if present.get(key) != value]
    table.update_many(missing)
    return [key for key in present if key not in wanted], len(missing)


def _snapshot(table: Map) -> dict[bytes, bytes]:
    """Everything in a map."""
    found: dict[bytes, bytes] = {}
    key, value = table.key_size, table.value_size
    for keys, values, count in table.batches():
        packed, content = bytes(keys[: count * key]), bytes(values[: count * value])
        parts = (packed[start : start + key] for start in range(0, len(packed), key))
        found.update(
            zip(parts, (content[start : start + value] for start in range(0, len(content), value)), strict=True)
        )
    return found


def _numbers(table: Map) -> dict[int, int]:
    """Everything in a map with keys of 8 bytes and values of 4, as numbers of this machine."""
    found: dict[int, int] = {}
    for keys, values, count in table.batches():
        found.update(
            zip(memoryview(keys)[: count * 8].cast("Q"), memoryview(values)[: count * 4].cast("I"), strict=True)
        )
    return found


def _slot_number(service: int, generation: int, slot: int) -> int:
    return int.from_bytes(lay.SLOT.pack(service, generation, slot), sys.byteorder)


_SLOT_STEP = _slot_number(0, 0, 1)


def _front(entry: Entry) -> bytes:
    return entry.frontend + b"\0"


def _number(value: int) -> bytes:
    return lay.NUMBER.pack(value)


def _backend(number: int, key: bytes) -> bytes:
    return lay.BACKEND.pack(key[:16], number, key[16:18], key[18])


def _members(entry: Entry) -> frozenset[bytes]:
    if not entry.affinity:
        return frozenset()
    return frozenset(lay.MEMBER.pack(entry.id, number) for number in entry.backends[: entry.serving])


def _ranges(entry: Entry) -> frozenset[bytes]:
    return frozenset(lay.source_range(entry.id, network.network_address, network.prefixlen) for network in entry.ranges)


def _table(table: Sequence[int] | None) -> bytes:
    return b"".join(map(_number, table or ()))


_TCP = 6
LIFETIME_TCP, LIFETIME_SYN, LIFETIME_ANY, LIFETIME_CLOSING = 21600, 60, 60, 10
"""Seconds, as in ``lib/conntrack.h``."""
_CLOSED = lay.TX_CLOSING | lay.RX_CLOSING


def is_over(proto: int, used: int, state: int, now: int) -> bool:
    """Whether a flow is over by its last packet and its state: the twin of ``lb_alive``."""
    life = LIFETIME_ANY
    if proto == _TCP:
        life = LIFETIME_SYN if state & (lay.UNANSWERED | lay.OPENING) else LIFETIME_TCP
        life = LIFETIME_CLOSING if state & lay.RESET or state & _CLOSED == _CLOSED else life
    # seconds of 32 bits, which may have begun anew
    return life < (now - used & 0xFFFFFFFF) < 1 << 31


def collect_flows(table: Map, backends: Map, now: int) -> int:
    """Forget flows that are over; returns how many.

    What a client outside asked of which backend is kept as long as its answers are expected; those see both directions.
    """
    flows = _snapshot(table)
    dead, expected = [], set()
    fields, value_of = lay.FLOW_KEY.unpack, lay.FLOW.unpack
    outside = []
    for key, value in flows.items():
        _, _, _, _, proto, way, _ = fields(key)
        _, _, used, _, state = value_of(value)
        if way == lay.FLOW_OUTSIDE:
            outside.append((key, value))
        elif is_over(proto, used, state, now):
            dead.append(key)
        elif way == lay.FLOW_ANSWER:
            expected.add(key)
    known = _snapshot(backends) if outside else {}
    for key, value in outside:
        source, _, source_port, _, proto, _, _ = fields(key)
        number, _, used, _, _ = value_of(value)
        backend = known.get(_number(number))
        answer = b""
        if backend is not None:
            target, _, port, _ = lay.BACKEND.unpack(backend)
            answer = lay.FLOW_KEY.pack(source, target, source_port, port, proto, lay.FLOW_ANSWER, 0)
        if answer not in expected and LIFETIME_ANY < (now - used & 0xFFFFFFFF) < 1 << 31:
            dead.append(key)
    return table.delete_many(dead)


class Shares(NamedTuple):
    """How the ports that this node lends to clients outside are shared out: how many there are, and who has most."""

    held: int = 0
    most: tuple[tuple[Address, int, int], ...] = ()
    """Client (of IPv6 from outside the first address of its /64), its ports, and how many flows it was refused."""


def collect_clients(table: Map, shares: Map, now: int) -> Shares:
    """Forget clients whose flows are over, and put right how many ports each has."""
    before = {key: lay.SHARE.unpack(value) for key, value in _snapshot(shares).items()}
    counts: Counter[bytes] = Counter()
    dead = []
    for key, value in _snapshot(table).items():
        address, _, _, state, used = lay.CLIENT.unpack(value)
        if is_over(key[_PROTO_AT], used, state, now):
            dead.append(key)
        else:
            counts[address[:8] + bytes(8) if state & lay.WIDE else address] += 1
    table.delete_many(dead)
    for key in before.keys() | counts.keys():
        if counts[key] != before.get(key, (0, 0))[0]:
            _correct(shares, key, counts[key], before.get(key, (0, 0))[0])
    most = sorted(counts, key=lambda key: counts[key], reverse=True)[:MOST]
    found = [(mapped(key), counts[key], before.get(key, (0, 0))[1]) for key in most]
    return Shares(sum(counts.values()), tuple(found))


def _correct(shares: Map, key: bytes, counted: int, before: int) -> None:
    present = shares.lookup(key)
    current, refused = lay.SHARE.unpack(present) if present is not None else (before, 0)
    # what came while we counted is in the count or not: at worst it counts twice until the next time
    right = counted + max(0, current - before)
    if right:
        shares.update(key, lay.SHARE.pack(right, refused))
    else:
        shares.delete(key)
