"""Python twins of the structs in ``bpf/ciliate_bpf/lib/lb_types.h``. A test compares both through BTF."""

from __future__ import annotations

import struct
from typing import NamedTuple

from ciliate.datapath.layout import Address, mapped, port_bytes, to_mapped

MAGLEV, LOCAL_ONLY, RANGES, EXTERNAL, LOCAL_BEHIND = 1, 2, 4, 8, 16
"""Bits of a service's flags."""
FLOW_CLIENT, FLOW_SELF, FLOW_OUTSIDE, FLOW_ANSWER = 1, 2, 3, 4
"""The ways of keys of the flow map."""
UNANSWERED, OPENING, TX_CLOSING, RX_CLOSING, RESET, WIDE = 1, 2, 4, 8, 16, 32
"""Bits of a flow's state."""
TABLE = 1021
"""Places of a Maglev table: a prime, so that every backend's permutation visits all of them."""
RANGE_STATIC_BITS = 32

FRONTEND = struct.Struct("=16s2sBx")
SERVICE = struct.Struct("=IHHHHI")
SLOT = struct.Struct("=IHH")
BACKEND = struct.Struct("=16sI2sBx")
ADDRESS = struct.Struct("=16s2s2x")
FLOW_KEY = struct.Struct("=16s16s2s2sBBH")
FLOW = struct.Struct("=III2sH")
CLIENT = struct.Struct("=16sI2sHI")
SHARE = struct.Struct("=II")
SHARE_KEY = struct.Struct("=16s")
AFFINITY_KEY = struct.Struct("=16sI")
AFFINITY = struct.Struct("=II")
MEMBER = struct.Struct("=II")
MAGLEV_TABLE = struct.Struct(f"={TABLE}I")
RANGE = struct.Struct("=II16s")
SOCK_KEY = struct.Struct("=Q16s2sBB4x")
SOCK = struct.Struct("=16sII2s2x")
NUMBER = struct.Struct("=I")

STRUCTS = {
    "lb_frontend": FRONTEND,
    "lb_service": SERVICE,
    "lb_slot": SLOT,
    "lb_backend": BACKEND,
    "lb_address": ADDRESS,
    "lb_flow_key": FLOW_KEY,
    "lb_flow": FLOW,
    "lb_client": CLIENT,
    "lb_share": SHARE,
    "lb_affinity_key": AFFINITY_KEY,
    "lb_affinity": AFFINITY,
    "lb_member": MEMBER,
    "lb_table": MAGLEV_TABLE,
    "lb_range": RANGE,
    "lb_sock_key": SOCK_KEY,
    "lb_sock": SOCK,
}
MAP_STRUCTS = {
    "ciliate_lb_services": (FRONTEND, SERVICE),
    "ciliate_lb_slots": (SLOT, NUMBER),
    "ciliate_lb_backends": (NUMBER, BACKEND),
    "ciliate_lb_reverse": (NUMBER, FRONTEND),
    "ciliate_lb_members": (MEMBER, NUMBER),
    "ciliate_lb_maglev": (NUMBER, MAGLEV_TABLE),
    "ciliate_lb_ranges": (RANGE, NUMBER),
    "ciliate_lb_affinity": (AFFINITY_KEY, AFFINITY),
    "ciliate_lb_flow": (FLOW_KEY, FLOW),
    "ciliate_lb_client": (FLOW_KEY, CLIENT),
    "ciliate_lb_share": (SHARE_KEY, SHARE),
    "ciliate_lb_sock": (SOCK_KEY, SOCK),
}
"""Key and value of each map."""


class ServiceValue(NamedTuple):
    """A service's entry: ``backends`` many, the first ``local`` of them on this node; ``affinity`` in seconds."""

    id: int
    backends: int
    local: int
    generation: int
    flags: int
    affinity: int


def frontend(address: Address, port: int, proto: int) -> bytes:
    """Key of the services map, value of the reverse map."""
    return FRONTEND.pack(to_mapped(address), port_bytes(port), proto)


def frontend_of(data: bytes) -> tuple[Address, int, int]:
    """Address, port and protocol of such a key."""
    address, port, proto = FRONTEND.unpack(data)
    return mapped(address), int.from_bytes(port, "big"), proto


def backend(number: int, address: Address, port: int, proto: int) -> bytes:
    """Value of the backends map."""
    return BACKEND.pack(to_mapped(address), number, port_bytes(port), proto)


def backend_of(data: bytes) -> tuple[Address, int, int]:
    """Address, port and protocol of such a value."""
    address, _, port, proto = BACKEND.unpack(data)
    return mapped(address), int.from_bytes(port, "big"), proto


def service_of(data: bytes) -> ServiceValue:
    """Decode a service's entry."""
    return ServiceValue(*SERVICE.unpack(data))


def source_range(service: int, address: Address, prefix: int) -> bytes:
    """Key of the source ranges; ``prefix`` counts the address's own bits."""
    bits = prefix + (96 if address.version == 4 else 0)
    return RANGE.pack(RANGE_STATIC_BITS + bits, service, to_mapped(address))
