"""Geneve on the wire, VXLAN inside the node: the exchange of headers, byte by byte, in both builds. Tier bpf."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from bpf_harness import context
from scapy.contrib.geneve import GENEVE
from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw
from tunnel_harness import MARK, NODE, NODE_V6, build_or_skip

from ciliate.datapath import bpf, kernel, layout
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.libbpf import BpfObject, constants, read

PORT, GAIN, UNSPEC = 6081, 0x5D58, 0xFFFFFFFF
HERE, HERE6 = "192.0.2.1", "2001:db8:ff::1"
OVERLAY = 0x400
INNER = Ether(src="02:00:00:00:00:0a", dst="02:00:00:00:00:01") / IP(src="10.5.0.10", dst="10.6.0.10") / TCP(dport=80)
TO_NODE = Ether(src="02:00:00:00:01:01", dst="02:00:00:00:01:02")


class Uplink:
    """The uplink's programs with one known node."""

    def __init__(self, cache: Path, functions: str) -> None:
        defines = (*kernel.select(functions).defines, "CILIATE_GENEVE")
        elf = read(Compiler(cache).compile("netdev", defines))
        self.object = BpfObject(elf, "netdev")
        self.object.set_constants(constants(elf), {"tunnel_port": PORT.to_bytes(2, "big")})
        self.object.load()
        nodes = bpf.Map(self.object.map_fd("ciliate_nodes"), "ciliate_nodes")
        for text in (NODE, NODE_V6):
            nodes.update(layout.node_key(ip_address(text)), layout.node_entry())

    def run(self, program: str, packet: Packet | bytes, mark: int = 0) -> Packet:
        """The packet afterwards; it always goes on."""
        data = bytearray(context())
        data[MARK] = struct.pack("=I", mark)
        result, after, _ = bpf.test_run(self.object.program_fd(program), bytes(packet), data)
        assert result == UNSPEC
        return Ether(after)


@pytest.fixture(scope="module", params=["global", "inline"])
def uplink(request: pytest.FixtureRequest, templates: Path) -> Iterator[Uplink]:
    made = Uplink(templates, build_or_skip(request.param))
    yield made
    made.object.close()


def outer(family: int, arrives: bool) -> Packet:
    here, there = (HERE, NODE) if family == 4 else (HERE6, NODE_V6)
    source, target = (there, here) if arrives else (here, there)
    return TO_NODE / (IP(src=source, dst=target, id=7) if family == 4 else IPv6(src=source, dst=target))


def vxlan(family: int, arrives: bool, sport: int, checksum: bool, vni: int = 0xABCDE) -> Packet:
    udp = UDP(sport=sport, dport=PORT) if checksum else UDP(sport=sport, dport=PORT, chksum=0)
    return outer(family, arrives) / udp / VXLAN(vni=vni, flags=8) / INNER


def geneve(family: int, arrives: bool, sport: int, checksum: bool, vni: int = 0xABCDE) -> Packet:
    udp = UDP(sport=sport, dport=PORT) if checksum else UDP(sport=sport, dport=PORT, chksum=0)
    return outer(family, arrives) / udp / GENEVE(vni=vni, proto=0x6558) / INNER


PORTS = [1, 0x5D57, 0x5D58, 0x5D59, 32768, 60999, 65535]


def moved(port: int, gain: int) -> int:
    """Sum of ones' complement."""
    total = port + gain
    return (total & 0xFFFF) + (total >> 16)


def valid_checksum(packet: Packet) -> bool:
    """Whether the outer UDP checksum is what scapy makes it."""
    given = packet[UDP].chksum
    again = packet.copy()
    del again[UDP].chksum
    return given == 0 or bytes(again) == bytes(packet)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("port", PORTS)
def test_there_and_back(uplink: Uplink, family: int, checksum: bool, port: int) -> None:
    sent = vxlan(family, False, port, checksum)
    wire = uplink.run("to_netdev", sent, OVERLAY)
    expected = geneve(family, False, moved(port, 0xFFFF ^ GAIN), checksum)
    expected[UDP].chksum = Ether(bytes(sent))[UDP].chksum
    assert bytes(wire) == bytes(expected)
    assert valid_checksum(wire)
    assert (wire[GENEVE].vni, wire[GENEVE].proto, wire[GENEVE].optionlen) == (0xABCDE, 0x6558, 0)
    there = geneve(family, True, port, checksum)
    inside = uplink.run("from_netdev", there)
    back = vxlan(family, True, moved(port, GAIN), checksum)
    back[UDP].chksum = Ether(bytes(there))[UDP].chksum
    assert bytes(inside) == bytes(back)
    assert valid_checksum(inside)


@pytest.mark.parametrize("vni", [1, 2, 256, 0x800, 0xFFFFFF])
def test_the_key_stays(uplink: Uplink, vni: int) -> None:
    assert uplink.run("to_netdev", vxlan(4, False, 40000, False, vni), OVERLAY)[GENEVE].vni == vni
    assert bytes(uplink.run("from_netdev", geneve(4, True, 40000, False, vni)))[42:50] == bytes(VXLAN(vni=vni, flags=8))


@pytest.mark.parametrize("family", [4, 6])
def test_the_first_fragment_is_exchanged_and_the_others_are_left(uplink: Uplink, family: int) -> None:
    sent = vxlan(family, False, 40000, True) / Raw(b"z" * 3000)
    if family == 4:
        parts = [TO_NODE / part for part in fragment(sent[IP], 1400)]
    else:
        whole = IPv6(src=HERE6, dst=NODE_V6) / IPv6ExtHdrFragment(id=9) / sent[UDP]
        parts = [TO_NODE / part for part in fragment6(whole, 1400)]
    assert len(parts) > 2
    after = [bytes(uplink.run("to_netdev", part, OVERLAY)) for part in parts]
    assert after[0] != bytes(parts[0])
    assert after[1:] == [bytes(part) for part in parts[1:]]
    offset = 14 + (20 if family == 4 else 48) + 8
    assert after[0][offset : offset + 4] == b"\0\0\x65\x58"


LEFT: list[tuple[str, str, Packet, int]] = [
    ("a pod's own packet to this port", "to_netdev", vxlan(4, False, 40000, False), 0),
    ("a pod's identity", "to_netdev", vxlan(4, False, 40000, False), 0x1900F00),
    ("another port", "to_netdev", outer(4, False) / UDP(dport=8472) / VXLAN(vni=1, flags=8) / INNER, OVERLAY),
    ("no UDP", "to_netdev", outer(4, False) / TCP(dport=PORT), OVERLAY),
    ("not IP", "to_netdev", TO_NODE / ARP(), OVERLAY),
    (
        "VXLAN flags of others",
        "to_netdev",
        outer(4, False) / UDP(dport=PORT) / VXLAN(vni=1, flags=0x88) / INNER,
        OVERLAY,
    ),
    ("an unknown node", "from_netdev", TO_NODE / IP(src="192.0.2.66", dst=HERE) / UDP(dport=PORT) / GENEVE(vni=1), 0),
    ("options", "from_netdev", outer(4, True) / UDP(dport=PORT) / Raw(b"\x01\0\x65\x58" + bytes(8)) / INNER, 0),
    ("a control packet", "from_netdev", outer(4, True) / UDP(dport=PORT) / GENEVE(vni=1, oam=1, proto=0x6558), 0),
    ("critical options", "from_netdev", outer(4, True) / UDP(dport=PORT) / GENEVE(vni=1, critical=1, proto=0x6558), 0),
    ("another version", "from_netdev", outer(4, True) / UDP(dport=PORT) / GENEVE(vni=1, version=1, proto=0x6558), 0),
    ("IP inside", "from_netdev", outer(4, True) / UDP(dport=PORT) / GENEVE(vni=1, proto=0x0800), 0),
    ("another port", "from_netdev", outer(4, True) / UDP(dport=PORT + 1) / GENEVE(vni=1, proto=0x6558), 0),
    ("UDP too short", "from_netdev", outer(4, True) / UDP(dport=PORT) / Raw(b"\0\0"), 0),
    (
        "extension headers",
        "from_netdev",
        TO_NODE / IPv6(src=NODE_V6, dst=HERE6) / IPv6ExtHdrDestOpt() / UDP(dport=PORT) / GENEVE(vni=1, proto=0x6558),
        0,
    ),
]


@pytest.mark.parametrize("case", LEFT, ids=lambda case: f"{case[1]} {case[0]}")
def test_everything_else_is_left_as_it_is(uplink: Uplink, case: tuple[str, str, Packet, int]) -> None:
    _, program, packet, mark = case
    assert bytes(uplink.run(program, packet, mark)) == bytes(packet)


def test_options_of_the_outer_header_do_not_hide_it(uplink: Uplink) -> None:
    packet = TO_NODE / IP(src=NODE, dst=HERE, options=[("NOP"), ("NOP"), ("NOP"), ("EOL")])
    packet = packet / UDP(sport=9, dport=PORT, chksum=0) / GENEVE(vni=5, proto=0x6558) / INNER
    start = 14 + Ether(bytes(packet))[IP].ihl * 4 + 8
    assert start > 42
    assert bytes(uplink.run("from_netdev", packet))[start : start + 8] == bytes(VXLAN(vni=5, flags=8))
