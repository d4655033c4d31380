"""Node ports in test runs: packets that arrive at the node's device, leave it or are forwarded; flows grow old."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from bpf_harness import context
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from service_harness import Services
from snat_harness import MACS, NODE, PASS, POD, SECOND

from ciliate.datapath import bpf, lblayout
from ciliate.datapath.loadbalancer import Shares

FAMILIES = [4, 6]
PORT, TARGET = 30080, 8080
OUTSIDE = lblayout.EXTERNAL
MARK = slice(8, 12)
INGRESS_IFINDEX = slice(36, 40)


def ip(family: int, src: str, dst: str) -> Packet:
    return IP(src=src, dst=dst) if family == 4 else IPv6(src=src, dst=dst)


def put(services: Services, family: int, protocol: str = "TCP", port: int = PORT, **fields: Any) -> int:
    """A node port, with a backend of this node where nothing else is said."""
    fields.setdefault("flags", OUTSIDE)
    fields.setdefault("local", [POD[family]])
    backends = fields.pop("backends", [(POD[family], TARGET)])
    return services.put((NODE[family], port), backends, protocol, **fields)


def put_elsewhere(services: Services, family: int, protocol: str = "TCP", **fields: Any) -> int:
    """A node port with a backend of another node."""
    return put(services, family, protocol, backends=[(SECOND[family], TARGET)], local=[], **fields)


def arrive(services: Services, packet: Packet) -> tuple[int, bytes]:
    return services.programs.raw("from_netdev", bytes(Ether(**MACS) / packet))


def leave(services: Services, packet: Packet) -> tuple[int, bytes]:
    return services.programs.raw("to_netdev", bytes(Ether(**MACS) / packet))


def leave_own(services: Services, packet: Packet) -> bytes:
    """What the node itself sends: it came by no device."""
    data = bytearray(context(0))
    return run(services, "to_netdev", bytes(Ether(**MACS) / packet), data)[1]


def run(services: Services, program: str, frame: bytes, given: bytearray) -> tuple[int, bytes]:
    """Verdict and packet; ``given`` is its context, before and afterwards."""
    descriptor = services.programs.object.program_fd(program)
    result, after, _ = services.programs.inside(lambda: bpf.test_run(descriptor, frame, given))
    return result, after


def forward(services: Services, packet: Packet) -> tuple[int, bytes]:
    """A packet that arrives and, with what the program told the stack of it, leaves again."""
    given = bytearray(context())
    result, data = run(services, "from_netdev", bytes(Ether(**MACS) / packet), given)
    if result != PASS:
        return result, data
    again = bytearray(context())
    again[MARK] = given[MARK]
    return run(services, "to_netdev", data, again)


def age(services: Services, seconds: int) -> None:
    """As if the last packet of every flow lay further back."""
    for name, kind, place in (
        ("ciliate_lb_flow", lblayout.FLOW, 2),
        ("ciliate_lb_client", lblayout.CLIENT, 4),
    ):
        table = services.programs.maps[name]
        for key, value in table.items():
            fields = list(kind.unpack(value))
            fields[place] = fields[place] - seconds & 0xFFFFFFFF
            table.update(key, kind.pack(*fields))


def collect(services: Services) -> Shares:
    return services.balancer.collect(int(time.monotonic()))


def entries(services: Services, names: Iterable[str] = ("ciliate_lb_flow", "ciliate_lb_client")) -> dict[str, int]:
    """How many flows are remembered, by map."""
    return {name: sum(1 for _ in services.programs.maps[name].items()) for name in names}
