"""What one packet costs in the programs, by feature set and by what happens to it, in test runs."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path
from statistics import median
from typing import NamedTuple

from harness import bpf_harness as h
from report import Figure
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from ciliate.datapath import bpf, layout
from ciliate.policy.mapstate import INGRESS, PolicyEntry, PolicyKey, Verdict

BUILD = "shared"
FEATURES = {"IPv4": (True, False), "IPv6": (False, True), "both": (True, True)}
HOPS = 200  # a test run repeats over the same packet, whose hop limit of 255 falls each time
PORT, ENTRIES = 80, 100


class Cell(NamedTuple):
    """One row of the table: nanoseconds of a packet from pod to pod, both sides of it."""

    features: str
    family: int
    single: float
    new: float
    established: float
    reply: float
    denied: float


class Walked(NamedTuple):
    """A program's instructions, and how many of them the verifier walked."""

    features: str
    program: str
    instructions: int
    verified: int


class Bench:
    """The programs of one feature set, with a policy at the receiver that enforces."""

    def __init__(self, cache: Path, features: str) -> None:
        self.features = features
        self.programs = h.Programs(cache, BUILD, *FEATURES[features])
        allow = PolicyEntry(Verdict.ALLOW, 0, 1)
        state = {PolicyKey(INGRESS, 1000 + number, 6, 1024 + number, 16): allow for number in range(ENTRIES - 3)}
        state |= {PolicyKey(INGRESS, h.POD_ID, 6, PORT, 16): allow, PolicyKey(INGRESS, 999, 6, 8192, 4): allow}
        self.programs.enforce(h.PEER, {**state, PolicyKey(INGRESS, h.HOST_ID): allow}, ingress=True)
        self._keep_sender()
        self._program = self.programs.object.program_fd("from_container")

    def _keep_sender(self) -> None:
        """Let a delivered packet have its own sender's MAC again, so that a repeat finds it as it was."""
        for text in (h.PEER4, h.PEER6):
            macs = h.mac(h.NODE_MAC), h.mac(h.POD_MAC)
            info = layout.ENDPOINT_INFO.pack(1, h.PEER_ID, h.PEER, 0, *macs)
            self.programs.maps["ciliate_lxc"].update(layout.endpoint_key(ip_address(text)), info)

    def run(self, frame: bytes, repeat: int, expected: int) -> int:
        """Nanoseconds per packet; RuntimeError where the verdict is another."""
        result, _, took = bpf.test_run(self._program, frame, h.context(), repeat)
        if result != expected:
            raise RuntimeError(f"{self.features}: verdict {result}, expected {expected}")
        return took

    def cost(self, make: Callable[[int], bytes], repeat: int, calls: int, expected: int) -> float:
        """Median over calls, each with a packet of its own."""
        frames = [make(number) for number in range(calls)]
        return median(self.run(frame, repeat, expected) for frame in frames)

    def row(self, family: int, calls: int) -> Cell:
        """Every case of one family."""
        first, denied = frame(family, 1000), frame(family, 1000, PORT + 1)
        for _ in range(2):
            self.run(first, 1, h.REDIRECT)
        established = self.cost(lambda _: first, HOPS, calls, h.REDIRECT)
        single = self.cost(lambda _: first, 1, calls, h.REDIRECT)
        new = self.cost(lambda number: frame(family, 2000 + number), 1, calls, h.REDIRECT)
        back = frame(family, PORT, 5000, "SA")
        self.peer_began(family, 5000, PORT)
        reply = self.cost(lambda _: back, HOPS, calls, h.REDIRECT)
        refused = self.cost(lambda _: denied, HOPS, min(calls, 30), h.SHOT)  # events of both families fit the buffer
        return Cell(self.features, family, single, new, established, reply, refused)

    def peer_began(self, family: int, sport: int, dport: int) -> None:
        """A flow that PEER began, as both ends track it."""
        pod, peer = (ip_address(text) for text in ((h.POD4, h.PEER4), (h.POD6, h.PEER6))[family == 6])
        ports = dport.to_bytes(2, "big"), sport.to_bytes(2, "big")
        key = layout.CT_KEY.pack(layout.to_mapped(pod), layout.to_mapped(peer), *ports, 6, 0)
        ends = (h.PEER_ID, 0, 0, 0, h.POD, layout.CT_FIRST_IN), (h.PEER_ID, 0, 0, 0, h.PEER, layout.CT_FIRST_OUT)
        value = layout.CT_ENTRY.pack(0x7FFFFFF, 0, 0, b"\0\2", 0, *ends[0], *ends[1], 0, 1, 0, 60)
        self.programs.maps["ciliate_ct_tcp"].update(key, value)

    def walked(self) -> Iterator[Walked]:
        """What the verifier had to do."""
        for name in ("from_container", "to_container"):
            info = bpf.ProgramInfo(self.programs.object.program_fd(name))
            yield Walked(self.features, name, info.instructions, info.verified)


def frame(family: int, sport: int, dport: int = PORT, flags: str = "S") -> bytes:
    """A TCP segment from POD to PEER."""
    network: Packet = IP(src=h.POD4, dst=h.PEER4, ttl=255) if family == 4 else IPv6(src=h.POD6, dst=h.PEER6, hlim=255)
    return bytes(Ether(src=h.POD_MAC, dst=h.NODE_MAC) / network / TCP(sport=sport, dport=dport, flags=flags))


def measure(calls: int) -> tuple[list[Cell], list[Walked]]:
    """Every feature set."""
    cells: list[Cell] = []
    walked: list[Walked] = []
    with tempfile.TemporaryDirectory(prefix="ciliate-benchmark-") as directory:
        for features, families in FEATURES.items():
            bench = Bench(Path(directory), features)
            with closing(bench.programs):
                cells += [bench.row(family, calls) for family in itertools.compress((4, 6), families)]
                walked += bench.walked()
    return cells, walked


def figures(cells: list[Cell], walked: list[Walked]) -> list[Figure]:
    """As rows of the one table: no targets, but what a later change is held against."""
    rows = []
    for cell in cells:
        beside = f"new flow {cell.new:,.0f} (established, alone as well: {cell.single:,.0f}), reply {cell.reply:,.0f}"
        title = f"packet, features {cell.features}, IPv{cell.family}: established"
        rows.append(Figure(title, f"{cell.established:,.0f} ns", "", 0.0, f"{beside}, denied {cell.denied:,.0f} ns"))
    for item in walked:
        title = f"verifier, features {item.features}: {item.program}"
        rows.append(Figure(title, f"{item.verified:,}", "", 0.0, f"walked, of {item.instructions:,} instructions"))
    return rows
