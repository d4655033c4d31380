"""What an endpoint may say to its neighbours on a link of another plugin, packet by packet. Tier bpf."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import IPv6Address

import pytest
from bpf_harness import OK, PEER4, PEER6, PEER_MAC, POD, POD4, POD6, POD_MAC, SHOT, Programs
from scapy.layers.inet6 import (
    ICMPv6MLQuery,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    PadN,
    RouterAlert,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from ciliate.datapath import layout

LOCAL6, ROUTER_LOCAL6 = "fe80::aaff:feaa:a", "fe80::1"
BURST, A_SECOND = 256, 64
"""Messages at once, and further ones in each second."""
MAC, RATE, SOURCE_IP, INVALID, HOUSEKEEPING = 130, 198, 132, 134, 190


@pytest.fixture
def linked(programs: Programs) -> Iterator[Programs]:
    """The programs, with POD on a link of somebody else."""
    key = POD.to_bytes(4, "little")
    programs.maps["ciliate_link"].update(key, layout.LINK_ENTRY.pack(0, IPv6Address(LOCAL6).packed[8:]))
    yield programs
    programs.maps["ciliate_link"].delete(key)


def solicit(source: str = POD6, target: str = PEER6, mac: str = POD_MAC, hops: int = 255) -> Packet:
    """A question of POD to PEER."""
    ip = Ether(src=POD_MAC, dst=PEER_MAC) / IPv6(src=source, dst=PEER6, hlim=hops)
    return ip / ICMPv6ND_NS(tgt=target) / ICMPv6NDOptSrcLLAddr(lladdr=mac)


def advert(source: str, target: str, mac: str, router: int = 0, to: str = POD_MAC, sender: str = PEER_MAC) -> Packet:
    """An answer."""
    ip = Ether(src=sender, dst=to) / IPv6(src=source, dst=POD6, hlim=255)
    return ip / ICMPv6ND_NA(tgt=target, R=router, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=mac)


def listeners(source: str, message: Packet, *options: Packet) -> Packet:
    """A message about listeners of multicast."""
    header = IPv6ExtHdrHopByHop(options=list(options) or [RouterAlert(), PadN()])
    return Ether(src=POD_MAC, dst="33:33:00:00:00:16") / IPv6(src=source, dst="ff02::16", hlim=1) / header / message


def arp(kind: int, sender: str, mac: str, target: str = PEER4) -> Packet:
    """A question (1) or answer (2)."""
    return Ether(src=POD_MAC, dst=PEER_MAC) / ARP(op=kind, psrc=sender, hwsrc=mac, pdst=target)


SENT = {
    "own question": (solicit(), 0),
    "own question from the link-local address": (solicit(LOCAL6), 0),
    "question of another link-local address": (solicit(ROUTER_LOCAL6), SOURCE_IP),
    "question of another": (solicit(PEER6), SOURCE_IP),
    "question with another's MAC": (solicit(mac=PEER_MAC), MAC),
    "question from afar": (solicit(hops=254), INVALID),
    "question in a fragment": (
        Ether(src=POD_MAC, dst=PEER_MAC) / IPv6(src=POD6, dst=PEER6, hlim=255) / IPv6ExtHdrFragment() / ICMPv6ND_NS(),
        INVALID,
    ),
    "own answer": (advert(POD6, POD6, POD_MAC, sender=POD_MAC), 0),
    "answer of another": (advert(POD6, PEER6, POD_MAC, sender=POD_MAC), SOURCE_IP),
    "answer of a router": (advert(POD6, POD6, POD_MAC, router=1, sender=POD_MAC), HOUSEKEEPING),
    "a router": (
        Ether(src=POD_MAC, dst=PEER_MAC) / IPv6(src=LOCAL6, dst="ff02::1", hlim=255) / ICMPv6ND_RA(),
        HOUSEKEEPING,
    ),
    "report": (listeners(LOCAL6, ICMPv6MLReport(mladdr="ff02::5")), 0),
    "report without records": (listeners("::", ICMPv6MLReport2()), 0),
    "report with payload": (listeners(LOCAL6, ICMPv6MLReport2() / Raw(b"payload")), INVALID),
    "report behind other options": (listeners(LOCAL6, ICMPv6MLReport2(), PadN(optdata=b"text")), INVALID),
    "report of another": (listeners(ROUTER_LOCAL6, ICMPv6MLReport2()), SOURCE_IP),
    "asking for listeners": (listeners(LOCAL6, ICMPv6MLQuery()), HOUSEKEEPING),
    "own ARP question": (arp(1, POD4, POD_MAC), 0),
    "own ARP answer": (arp(2, POD4, POD_MAC), 0),
    "own ARP probe": (arp(1, "0.0.0.0", POD_MAC, POD4), 0),
    "ARP answer without a sender": (arp(2, "0.0.0.0", POD_MAC, POD4), SOURCE_IP),
    "ARP of another": (arp(2, PEER4, POD_MAC), SOURCE_IP),
    "ARP with another's MAC": (arp(2, POD4, PEER_MAC), MAC),
    "ARP of another kind": (arp(3, POD4, POD_MAC), HOUSEKEEPING),
    "ARP that is cut off": (bytes(arp(1, POD4, POD_MAC))[:40], INVALID),
}


@pytest.mark.parametrize("name", SENT)
def test_what_an_endpoint_says_to_its_neighbours(linked: Programs, name: str) -> None:
    frame, reason = SENT[name]
    assert linked.why(frame) == reason


RECEIVED = {
    "question": (Ether(src=PEER_MAC, dst=POD_MAC) / IPv6(src=PEER6, dst=POD6, hlim=255) / ICMPv6ND_NS(tgt=POD6), 0),
    "answer of a router": (advert(PEER6, PEER6, PEER_MAC, router=1), 0),
    "answer about its own address": (advert(PEER6, POD6, PEER_MAC), SOURCE_IP),
    "question in its own name": (
        Ether(src=PEER_MAC, dst=POD_MAC) / IPv6(src=POD6, dst=POD6, hlim=255) / ICMPv6ND_NS(tgt=PEER6),
        SOURCE_IP,
    ),
    "a router": (
        Ether(src=PEER_MAC, dst=POD_MAC) / IPv6(src="fe80::1", dst="ff02::1", hlim=255) / ICMPv6ND_RA(),
        HOUSEKEEPING,
    ),
    "report of another": (listeners("fe80::1", ICMPv6MLReport2()), HOUSEKEEPING),
    "asking for listeners": (listeners("fe80::1", ICMPv6MLQuery()), 0),
    "ARP of another": (arp(2, PEER4, PEER_MAC, POD4), 0),
    "ARP in its own name": (arp(2, POD4, PEER_MAC, POD4), SOURCE_IP),
}


@pytest.mark.parametrize("name", RECEIVED)
def test_what_an_endpoint_hears_of_its_neighbours(linked: Programs, name: str) -> None:
    frame, reason = RECEIVED[name]
    assert linked.why(frame, receive=True) == reason


def test_a_trailer_is_cut_off(linked: Programs) -> None:
    for frame in (solicit(), arp(1, POD4, POD_MAC)):
        whole = bytes(frame)
        assert linked.send(whole + b"a trailer") == (OK, whole)
        assert linked.receive(bytes(arp(2, PEER4, PEER_MAC)) + bytes(18)) == (OK, bytes(arp(2, PEER4, PEER_MAC)))


def test_an_endpoint_that_floods_its_link_is_slowed_down(linked: Programs) -> None:
    frames = [bytes(solicit()), bytes(arp(1, POD4, POD_MAC))]
    began = time.monotonic()
    outcomes = [linked.send(frames[number % 2])[0] for number in range(4 * BURST)]
    passed, spent = outcomes.count(OK), time.monotonic() - began
    assert outcomes[:BURST] == [OK] * BURST and set(outcomes) == {OK, SHOT}
    assert passed <= BURST + spent * A_SECOND + 2
    assert linked.why(frames[0]) in (0, RATE)
    # others' messages to it do not count
    assert linked.why(RECEIVED["question"][0], receive=True) == 0
