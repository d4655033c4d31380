"""Events from the datapath: a reader of the pinned ring buffer, and the decoder of its records.

The ring buffer's layout is the kernel's (Documentation/bpf/ringbuf.rst): a consumer page, a producer page, the data
twice in a row. Their second view is not mapped, it would count as memory of ours once more; a record that goes over the
end is put together of its two parts. Reading it from Python costs half a microsecond a record.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import msgspec

from ciliate.datapath import bpf
from ciliate.datapath.layout import EVENT, mapped
from ciliate.datapath.reasons import CT_STATES, DEBUG_STEPS, DIRECTIONS, OBSERVATIONS, protocol_name, reason_text
from ciliate.policy.mapstate import Verdict

_BUSY, _DISCARD, _HEADER = 1 << 31, 1 << 30, 8
_TYPES = {1: "drop", 2: "debug", 4: "trace", 5: "policy-verdict"}
_STEPS = {2: DEBUG_STEPS, 4: OBSERVATIONS}
_TCP_FLAGS = ((2, "SYN"), (16, "ACK"), (1, "FIN"), (4, "RST"), (8, "PSH"))


class MonitorEvent(msgspec.Struct, frozen=True):
    """One event. ``endpoint`` is the one that decided; addresses and ports are the packet's own."""

    type: str
    endpoint: int
    direction: str
    reason: int
    reason_text: str
    verdict: str
    rule: int
    observation: str
    ct_state: str
    src_identity: int
    dst_identity: int
    src_endpoint: int
    dst_endpoint: int
    proto: str
    source: str
    destination: str
    source_port: int
    destination_port: int
    summary: str
    hash: int
    ifindex: int
    length: int
    packet: bytes


class EventReader:
    """Consumes the ring buffer. Only one consumer at a time makes sense: records go once to whoever reads first."""

    def __init__(self, path: Path) -> None:
        self._map = bpf.Map.open(path)
        size, page = self._map.max_entries, mmap.PAGESIZE
        self._mask = size - 1
        self._end = page + size
        self._consumer = mmap.mmap(self._map.descriptor, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._data = mmap.mmap(self._map.descriptor, self._end, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)

    def fileno(self) -> int:
        """A descriptor that becomes readable when there are records."""
        return self._map.descriptor

    def read(self, limit: int = 4096) -> list[bytes]:
        """Up to ``limit`` records that are complete; frees their place."""
        (position,) = struct.unpack_from("=Q", self._consumer, 0)
        (end,) = struct.unpack_from("=Q", self._data, 0)
        records: list[bytes] = []
        while position < end and len(records) < limit:
            place = mmap.PAGESIZE + (position & self._mask)
            (header,) = struct.unpack_from("=I", self._data, place)
            if header & _BUSY:
                break
            length = header & ~(_BUSY | _DISCARD)
            if not header & _DISCARD:
                start, stop = place + _HEADER, place + _HEADER + length
                record = self._data[start:stop]
                if stop > self._end:  # the rest is at the beginning
                    record += self._data[mmap.PAGESIZE : mmap.PAGESIZE + stop - self._end]
                records.append(record)
            position += (_HEADER + length + 7) & ~7
        struct.pack_into("=Q", self._consumer, 0, position)
        return records

    def close(self) -> None:
        """Let go of the buffer; it stays pinned and fills."""
        self._consumer.close()
        self._data.close()
        self._map.close()


def decode(record: bytes) -> MonitorEvent:
    """Decode one record; ValueError where it is of another size or type."""
    if len(record) != EVENT.size:
        raise ValueError(f"event of {len(record)} bytes, expected {EVENT.size}")
    (
        kind, subtype, endpoint, flow_hash, src_identity, dst_identity, src_endpoint, dst_endpoint, direction, ct_state,
        proto, _, rule, ifindex, length, captured, verdict, tcp_flags, source, destination, sport, dport, packet,
    ) = EVENT.unpack(record)  # fmt: skip
    if kind not in _TYPES:
        raise ValueError(f"event of type {kind}, expected one of {sorted(_TYPES)}")
    drop = kind == 1
    src, dst = mapped(source), mapped(destination)
    ports = int.from_bytes(sport, "big"), int.from_bytes(dport, "big")
    return MonitorEvent(
        type=_TYPES[kind],
        endpoint=endpoint,
        direction=DIRECTIONS[direction & 1],
        reason=subtype if drop else 0,
        reason_text=reason_text(subtype) if drop else "",
        verdict="deny" if drop else Verdict(verdict).name.lower(),
        rule=rule,
        observation=_STEPS[kind].get(subtype, str(subtype)) if kind in _STEPS else "",
        ct_state=CT_STATES[ct_state & 3],
        src_identity=src_identity,
        dst_identity=dst_identity,
        src_endpoint=src_endpoint,
        dst_endpoint=dst_endpoint,
        proto=protocol_name(proto),
        source=str(src),
        destination=str(dst),
        source_port=ports[0],
        destination_port=ports[1],
        summary=_summary(str(src), str(dst), ports, proto, tcp_flags, packet[:captured]),
        hash=flow_hash,
        ifindex=ifindex,
        length=length,
        packet=packet[:captured],
    )


def _summary(src: str, dst: str, ports: tuple[int, int], proto: int, tcp_flags: int, packet: bytes) -> str:
    if not proto:
        return f"frame of type 0x{packet[12:14].hex()}" if len(packet) >= 14 else "frame"
    if proto in (1, 58):
        return f"{src} -> {dst} {protocol_name(proto)}"
    flags = " ".join(name for bit, name in _TCP_FLAGS if tcp_flags & bit) if proto == 6 else ""
    return f"{_end(src, ports[0])} -> {_end(dst, ports[1])} {protocol_name(proto)} {flags}".rstrip()


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
