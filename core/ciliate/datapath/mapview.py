"""The pinned maps as people read them: which there are, how full they are, what is in them. Blocking."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ciliate.datapath import bpf, layout, lbview, mapversions
from ciliate.datapath.bpf import Map
from ciliate.datapath.reasons import DIRECTIONS, protocol_name, reason_text

TYPES = {
    bpf.HASH: "hash",
    bpf.ARRAY: "array",
    bpf.PROG_ARRAY: "prog-array",
    bpf.PERCPU_HASH: "percpu-hash",
    bpf.PERCPU_ARRAY: "percpu-array",
    bpf.LRU_HASH: "lru-hash",
    bpf.LPM_TRIE: "lpm-trie",
    bpf.RINGBUF: "ringbuf",
}
COUNTED = frozenset({bpf.HASH, bpf.LRU_HASH, bpf.LPM_TRIE})
"""Kinds that fill up. In arrays every entry is always there; the others cannot be listed."""
READABLE = COUNTED | {bpf.ARRAY, bpf.PERCPU_HASH, bpf.PERCPU_ARRAY}


class MapSummary(msgspec.Struct, frozen=True, rename="kebab"):
    """One map. ``entries`` is None for kinds that do not fill up; sizes in bytes."""

    name: str
    path: str
    type: str
    max_entries: int
    key_size: int
    value_size: int
    entries: int | None = None


class MapEntry(msgspec.Struct, frozen=True):
    """One entry as text."""

    key: str
    value: str


Describe = Callable[[bytes, bytes], tuple[str, str] | None]


def summaries(pins: Path, count: bool = True) -> list[MapSummary]:
    """Every map pinned there, by name; ``count`` goes through all of them (some 10 ms per 100 000 entries)."""
    found = []
    for path in sorted(pins.iterdir()):
        table = _open(path)
        if table is None:
            continue
        try:
            found.append(_summary(path, table, count))
        finally:
            table.close()
    return found


def read(pins: Path, name: str, limit: int) -> tuple[MapSummary, list[MapEntry]] | None:
    """A map with up to ``limit`` of its entries that say something; None where there is no map of that name."""
    path = pins / name
    table = _open(path) if "/" not in name and path.exists() else None
    if table is None:
        return None
    try:
        return _summary(path, table, True), list(itertools.islice(_entries(table), limit))
    finally:
        table.close()


def _open(path: Path) -> Map | None:
    """The map of a pin, or None where a program or a link is pinned."""
    descriptor = bpf.get_pinned(path)
    if not path.name.startswith("ciliate_") or not _is_map(descriptor):
        os.close(descriptor)
        return None
    return Map(descriptor, path.name)


def _is_map(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").readlink().name == "anon_inode:bpf-map"


def _summary(path: Path, table: Map, count: bool) -> MapSummary:
    kind = TYPES.get(table.type, str(table.type))
    entries = _count(table) if count and table.type in COUNTED else None
    return MapSummary(path.name, str(path), kind, table.max_entries, table.key_size, table.width, entries)


def _count(table: Map) -> int:
    return sum(count for _, _, count in table.batches())


def _entries(table: Map) -> Iterator[MapEntry]:
    if table.type not in READABLE:
        return
    # of another version's agent: its entries cannot be read
    describe = DESCRIBE.get(table.name, _hexadecimal) if mapversions.is_current(table) else _hexadecimal
    for key, value in table.items():
        found = describe(key, value)
        if found is not None:
            yield MapEntry(*found)


def _hexadecimal(key: bytes, value: bytes) -> tuple[str, str]:
    return key.hex(), value.hex()


def _endpoint(key: bytes, value: bytes) -> tuple[str, str] | None:
    fields = layout.EP_CONFIG.unpack(value)
    ifindex, identity, flags = fields[0], fields[1], fields[7]
    if not flags & layout.EP_VALID:
        return None
    enforced = [
        name
        for name, bit in (("ingress", layout.EP_ENFORCE_INGRESS), ("egress", layout.EP_ENFORCE_EGRESS))
        if flags & bit
    ]
    text = f"identity {identity} ifindex {ifindex} enforces {' and '.join(enforced) or 'nothing'}"
    return str(int.from_bytes(key, "little")), text


def _address(key: bytes, value: bytes) -> tuple[str, str]:
    ifindex, identity, number, _, mac, node_mac = layout.ENDPOINT_INFO.unpack(value)
    text = f"endpoint {number} identity {identity} ifindex {ifindex} mac {mac.hex(':')} node-mac {node_mac.hex(':')}"
    return str(layout.endpoint_address(key)), text


def ipcache_row(key: bytes, value: bytes) -> tuple[str, str]:
    """An entry of the ipcache as people read it."""
    entry = layout.ipcache_entry_of(value)
    where = f" node {entry.node}" if entry.node else ""
    secret = f" key {entry.key}" if entry.key else ""
    return str(layout.ipcache_prefix(key)), f"identity {entry.identity}{where}{secret}"


def _tunnel(key: bytes, value: bytes) -> tuple[str, str]:
    node, secret = layout.tunnel_entry_of(value)
    return str(layout.ipcache_prefix(key)), f"node {node}" + (f" key {secret}" if secret else "")


def _place(key: bytes, value: bytes) -> tuple[str, str]:
    return str(layout.ipcache_prefix(key)), f"place {layout.place_entry_of(value)}"


def _node(key: bytes, value: bytes) -> tuple[str, str]:
    (secret,) = layout.NODE_ENTRY.unpack(value)
    return str(layout.mapped(key)), f"key {secret}" if secret else ""


def _policy(key: bytes, value: bytes) -> tuple[str, str]:
    endpoint, item = layout.policy_key_of(key)
    entry, packets, size = layout.policy_entry_of(value)
    port = f"{item.port}/{item.prefix}" if item.prefix else "any"
    protocol = protocol_name(item.proto) if item.proto else "any"
    where = f" place {item.place}" if item.place else ""
    who = f"endpoint {endpoint} {DIRECTIONS[item.direction]} identity {item.identity or 'any'}{where}"
    said = f"{entry.verdict.name.lower()} rule {entry.rule} packets {packets} bytes {size}"
    return f"{who} {protocol} port {port}", said


def _flow(key: bytes, value: bytes) -> tuple[str, str] | None:
    ends = layout.conntrack_entries(key, value)
    if not ends:
        return None
    flow = ends[0]
    name = f"{protocol_name(flow.proto)} {flow.source} {flow.source_port} -> {flow.destination} {flow.destination_port}"
    expires = round(flow.lifetime - time.clock_gettime(time.CLOCK_MONOTONIC))
    tracked = " ".join(f"{DIRECTIONS[end.direction]} of endpoint {end.endpoint} by rule {end.rule}" for end in ends)
    return name, f"expires {expires} s sent {flow.tx_packets} answered {flow.rx_packets} {tracked}"


def _record(key: bytes, value: bytes) -> tuple[str, str]:
    name, record = mapversions.decoded(key, value)
    return name, f"layout {record.number} key {record.shape.key.text} value {record.shape.value.text}"


def _metric(key: bytes, value: bytes) -> tuple[str, str] | None:
    index = int.from_bytes(key, "little")
    counters = list(layout.METRICS_VALUE.iter_unpack(value))
    packets, size = sum(item[0] for item in counters), sum(item[1] for item in counters)
    if not packets:
        return None
    return f"{reason_text(index // 2)} {DIRECTIONS[index % 2]}", f"packets {packets} bytes {size}"


DESCRIBE: dict[str, Describe] = {
    **lbview.DESCRIBE,
    "ciliate_ep": _endpoint,
    "ciliate_lxc": _address,
    "ciliate_ipcache": ipcache_row,
    "ciliate_tunnel": _tunnel,
    "ciliate_nodes": _node,
    "ciliate_place": _place,
    "ciliate_policy": _policy,
    "ciliate_ct_tcp": _flow,
    "ciliate_ct_any": _flow,
    "ciliate_metrics": _metric,
    mapversions.RECORDS: _record,
}
"""What is said of a map's entries; None leaves an empty one out, and maps not named here are shown in hexadecimal."""
