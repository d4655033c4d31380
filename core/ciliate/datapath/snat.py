"""The mappings of BPF masquerading: layouts (twins of ``lib/nattypes.h``), listing, collection, flushing. Blocking."""

from __future__ import annotations

import dataclasses
import errno
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ciliate.datapath import bpf, layout
from ciliate.datapath.bpf import NOEXIST, Map
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.conntrack import MAPS as CONNTRACK
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.layout import CT_ENTRY, Address, Network
from ciliate.datapath.libbpf import read
from ciliate.datapath.loader import LoadPlan, load_object
from ciliate.datapath.pins import PinDirectory
from ciliate.ports import PortRange

SNAT_KEY = struct.Struct("=16s16s2s2sBB2x")
SNAT_ENTRY = struct.Struct("=16s2sHIII")
SNAT_DEVICE = struct.Struct("=4sI16s")
SNAT_POD = struct.Struct("=I4xQ")
MASQ_CLASS = struct.Struct("=I")
STRUCTS = {"snat_key": SNAT_KEY, "snat_entry": SNAT_ENTRY, "snat_device": SNAT_DEVICE, "snat_pod": SNAT_POD}
MAP, DEVICES, CLASSES, PODS = "ciliate_snat", "ciliate_snat_dev", "ciliate_masq", "ciliate_snat_pods"
MAPS = (MAP, DEVICES, CLASSES, PODS)
SHARE, PORT_SHARE = 4, 12 / 32
"""One pod may have one in so many mappings of the table, and that part of the ports towards one remote."""
DEFINES = ("CILIATE_MASQUERADE",)
KNOWN = "snat_known"
"""The pin of the program that other engines may ask whether a flow has a mapping (``known.c``)."""
HOST, ACTIVE = 1, 1
SOURCE, DIRECT = 1, 2
IDLE, SOON = 10, 60
"""Seconds without a packet after which a mapping is compared with conntrack, unless it is over that soon by itself."""
_INGRESS, _EGRESS = 0, 1
_STATE = struct.Struct("=18xH4xII")
_ICMP = frozenset({1, 58})


def constants(services: PortRange | None, most: int = 0) -> dict[str, bytes]:
    """The programs' constants: the ports that services of the node may get, and how many mappings one pod (0: any)."""
    first, last = services or (0, 0)
    ends = {"snat_services_first": struct.pack("=H", first), "snat_services_last": struct.pack("=H", last)}
    return {**ends, "snat_pod_max": struct.pack("=I", most)}


def pod_max(entries: int) -> int:
    """How many mappings one pod may have in a table of so many entries, two of which are a mapping."""
    return max(1, entries // 2 // SHARE)


class Usage(NamedTuple):
    """Mappings of a pod as they are counted, and how many of its new flows were refused so far."""

    source: Address
    mappings: int
    refused: int


def usage(pods: Map) -> list[Usage]:
    """What every pod has, or had lately."""
    return [Usage(layout.mapped(key), *SNAT_POD.unpack(value)) for key, value in pods.items()]


class Tables:
    """The pinned maps of masquerading, open; a context manager. DatapathError (ENOENT) where they are not there."""

    def __init__(self, pins: Path) -> None:
        self._open: list[Map] = []
        try:
            self.mappings, self.devices, self.classes, self.pods = (self._map(pins / name) for name in MAPS)
        except BaseException:
            self.close()
            raise
        self._pins = pins

    def _map(self, path: Path) -> Map:
        self._open.append(Map.open(path))
        return self._open[-1]

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors."""
        while self._open:
            self._open.pop().close()

    def collect(self) -> int:
        """See the function of that name."""
        tcp, others = (self._map(self._pins / name) for name in CONNTRACK)
        return collect(self.mappings, {6: tcp, 0: others}, None, self.pods)


class SnatEntry(NamedTuple):
    """A mapping as its egress half has it. Times: seconds of the monotonic clock; ``host``: a flow of the node itself.

    Of ICMP echoes the identifiers stand for the ports of the pod and of the node.
    """

    proto: int
    source: Address
    source_port: int
    node: Address
    node_port: int
    remote: Address
    remote_port: int
    created: int
    refreshed: int
    lifetime: int
    host: bool


def entry_of(key: bytes, value: bytes) -> SnatEntry | None:
    """Decode an egress half; None for the other ones."""
    source, remote, source_port, remote_port, proto, direction = SNAT_KEY.unpack(key)
    if direction != _EGRESS:
        return None
    node, node_port, flags, created, refreshed, lifetime = SNAT_ENTRY.unpack(value)
    ports = (int.from_bytes(port, "big") for port in (source_port, node_port, remote_port))
    mapped = layout.mapped
    return SnatEntry(
        proto,
        mapped(source),
        next(ports),
        mapped(node),
        next(ports),
        mapped(remote),
        next(ports),
        created,
        refreshed,
        lifetime,
        bool(flags & HOST),
    )


def entries(table: Map) -> Iterator[SnatEntry]:
    """Every mapping once. Those that come or go meanwhile may be missed."""
    for key, value in table.items():
        entry = entry_of(key, value)
        if entry is not None:
            yield entry


def halves(entry: SnatEntry) -> tuple[bytes, bytes]:
    """The keys of both halves of a mapping, egress first."""
    source, node, remote = map(layout.to_mapped, (entry.source, entry.node, entry.remote))
    source_port, node_port, remote_port = (
        layout.port_bytes(port) for port in (entry.source_port, entry.node_port, entry.remote_port)
    )
    return (
        SNAT_KEY.pack(source, remote, source_port, remote_port, entry.proto, _EGRESS),
        SNAT_KEY.pack(remote, node, remote_port, node_port, entry.proto, _INGRESS),
    )


def _values(entry: SnatEntry) -> tuple[bytes, bytes]:
    times = (HOST if entry.host else 0, entry.created, entry.refreshed, entry.lifetime)
    return (
        SNAT_ENTRY.pack(layout.to_mapped(entry.node), layout.port_bytes(entry.node_port), *times),
        SNAT_ENTRY.pack(layout.to_mapped(entry.source), layout.port_bytes(entry.source_port), *times),
    )


def reserve(
    table: Map, proto: int, node: Address, node_port: int, remote: Address, remote_port: int, seconds: int
) -> bool:
    """Keep a tuple of the node from being given to a pod for so long; False where somebody has it."""
    now = int(time.monotonic())
    entry = SnatEntry(proto, node, node_port, node, node_port, remote, remote_port, now, now, now + seconds, True)
    (egress, ingress), (out, back) = halves(entry), _values(entry)
    try:
        table.update(ingress, back, NOEXIST)
        table.update(egress, out)
    except DatapathError as error:
        if error.errno == errno.EEXIST:
            return False
        raise
    return True


def flush(table: Map, select: Callable[[SnatEntry], bool] = lambda entry: True) -> int:
    """Remove the mappings that ``select`` picks, both halves; without it everything, lone halves too. How many went."""
    chosen = [entry for entry in entries(table) if select(entry)]
    return _delete(table, chosen)


def flush_all(table: Map) -> int:
    """Remove every entry; how many mappings that were."""
    count = sum(1 for _ in entries(table))
    table.delete_many([key for key, _ in table.items()])
    return count


def alive(table: Map, now: int) -> int:
    """How many mappings of pods are not over."""
    count = 0
    for key, value in _raw(table):
        if key[37] == _EGRESS:
            flags, _, lifetime = _STATE.unpack(value)
            count += lifetime >= now and not flags & HOST
    return count


def flush_foreign(table: Map, own: Collection[Address]) -> int:
    """Remove the mappings to an address of the node that is none of these; how many went."""
    nodes = {layout.to_mapped(address) for address in own}
    raw = [(key, value) for key, value in _raw(table) if key[37] == _EGRESS and value[:16] not in nodes]
    chosen = [entry for key, value in raw if (entry := entry_of(key, value)) is not None]
    return _delete(table, chosen)


def flush_sources(table: Map, sources: Collection[Address]) -> int:
    """Remove the mappings of pods with these addresses; how many went."""
    pods = {layout.to_mapped(address) for address in sources}
    raw = [(key, value) for key, value in _raw(table) if key[37] == _EGRESS and key[:16] in pods]
    chosen = [entry for key, value in raw if (entry := entry_of(key, value)) is not None and not entry.host]
    return _delete(table, chosen)


def _delete(table: Map, chosen: Collection[SnatEntry]) -> int:
    table.delete_many(key for entry in chosen for key in halves(entry))
    return len(chosen)


def collect(table: Map, conntrack: Mapping[int, Map], now: int | None = None, pods: Map | None = None) -> int:
    """Remove mappings that are over, and those of pods whose conntrack entry is gone; how many went.

    ``conntrack`` maps protocol 6 to the table of TCP and 0 to the other one. Every pod's mappings are counted anew in
    ``pods``.
    """
    moment = int(time.monotonic()) if now is None else now
    before = {item.source: item for item in usage(pods)} if pods is not None else {}
    dead: list[bytes] = []
    counts: Counter[bytes] = Counter()
    mappings = 0
    for key, value in _raw(table):
        flags, refreshed, lifetime = _STATE.unpack(value)
        out = key[37] == _EGRESS
        if lifetime < moment:
            over = True  # of the lone half of a mapping, too
        else:
            idle = out and not flags & HOST and moment - refreshed >= IDLE and lifetime - moment > SOON
            entry = entry_of(key, value) if idle else None
            over = entry is not None and _flow_ended(entry, conntrack, moment)
            if over and entry is not None:
                dead.append(halves(entry)[1])
        if over:
            dead.append(key)
            mappings += out
        elif out and not flags & HOST:
            counts[key[:16]] += 1
    removed = table.delete_many(dead)
    if pods is not None:
        _count_anew(pods, before, counts)
    return max(mappings, removed // 2)


def _raw(table: Map) -> Iterator[tuple[bytes, bytes]]:
    size, width = SNAT_KEY.size, SNAT_ENTRY.size
    for keys, values, count in table.batches():
        packed, content = bytes(keys[: count * size]), bytes(values[: count * width])
        for index in range(count):
            yield packed[index * size : (index + 1) * size], content[index * width : (index + 1) * width]


def _count_anew(pods: Map, before: Mapping[Address, Usage], counts: Mapping[bytes, int]) -> None:
    """Correct each pod's number of mappings. Those that came while they were counted may be counted twice, until the
    next time."""
    for key, value in list(pods.items()):
        present, refused = SNAT_POD.unpack(value)
        known = before.get(layout.mapped(key))
        came = max(0, present - known.mappings) if known else 0
        wanted = counts.get(key, 0) + came
        if not wanted and known and known.refused == refused and not known.mappings:
            pods.delete(key)  # at rest since the last time; it is made again with the next mapping
        elif wanted != present:
            pods.update(key, SNAT_POD.pack(wanted, refused))


def _flow_ended(entry: SnatEntry, conntrack: Mapping[int, Map], now: int) -> bool:
    """Whether the pod's flow is not tracked any more."""
    ends = [(entry.source, entry.source_port), (entry.remote, entry.remote_port)]
    if entry.proto in _ICMP:
        ends = [(entry.source, 0), (entry.remote, entry.source_port)]  # in conntrack the identifier is what is asked
    value = conntrack[6 if entry.proto == 6 else 0].lookup(layout.conntrack_key(entry.proto, *ends))
    return value is None or CT_ENTRY.unpack(value)[0] < now


def write_devices(table: Map, devices: Mapping[int, Collection[Address]], active: bool) -> bool:
    """Say which devices masquerade, by interface index, with which address of each family; whether that was new."""
    wanted = {}
    for index, addresses in devices.items():
        four = next((item.packed for item in addresses if item.version == 4), bytes(4))
        six = next((item.packed for item in addresses if item.version == 6), bytes(16))
        wanted[index.to_bytes(4, "little")] = SNAT_DEVICE.pack(four, ACTIVE if active else 0, six)
    return _replace(table, wanted)


def write_classes(table: Map, sources: Collection[Network], direct: Collection[Network]) -> None:
    """Say whose packets are masqueraded, and where they go without it; a prefix may be both."""
    classes: dict[bytes, int] = {}
    for prefixes, bit in ((sources, SOURCE), (direct, DIRECT)):
        for prefix in prefixes:
            key = layout.ipcache_key(prefix)
            classes[key] = classes.get(key, 0) | bit
    # a prefix within another one of the other class must carry that class too: only the longest match is seen
    everything = [*((item, SOURCE) for item in sources), *((item, DIRECT) for item in direct)]
    for inner, _ in everything:
        for outer, bit in everything:
            if inner.version == outer.version and inner.subnet_of(outer):  # type: ignore[arg-type]
                classes[layout.ipcache_key(inner)] |= bit
    _replace(table, {key: MASQ_CLASS.pack(value) for key, value in classes.items()})


def _replace(table: Map, wanted: Mapping[bytes, bytes]) -> bool:
    """Make a small table exactly this, additions first; whether it was another one before."""
    present = dict(table.items())
    for key, value in wanted.items():
        if present.get(key) != value:
            table.update(key, value)
    for key in present.keys() - wanted.keys():
        table.delete(key)
    return present != wanted


def pressure(table: Map) -> float:
    """How full the table is, 0 to 1."""
    used = sum(count for _, _, count in table.batches())
    return float(used / table.max_entries)


def pin_known(pins: PinDirectory, plan: LoadPlan, size: int) -> None:
    """Load the program that others may ask, over the table of this size, and pin it in place of an earlier one."""
    elf = read(Compiler(plan.cache).compile("known", plan.defines))
    loaded = load_object(elf, "known", dataclasses.replace(plan, sizes={**plan.sizes, MAP: size}))
    try:
        pins.unlink(KNOWN)
        bpf.pin(loaded.program_fd("snat_known"), pins.of(KNOWN))
    finally:
        loaded.close()


def number_of_known(path: Path) -> int:
    """The kernel's number of the program pinned there; 0 where there is none."""
    if not path.exists():
        return 0
    program = bpf.get_pinned(path)
    try:
        return int(bpf.ProgramInfo(program).id)
    finally:
        os.close(program)
