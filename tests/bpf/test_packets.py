"""What the endpoint program does with single packets, as tables. Tier bpf."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from bpf_harness import (
    CIDR4,
    CIDR6,
    CIDR_ID,
    NODE4,
    NODE6,
    NODE_MAC,
    NODE_PLACE,
    OK,
    OTHER_PLACE,
    PEER,
    PEER4,
    PEER6,
    PEER_ID,
    PEER_MAC,
    PEER_PLACE,
    POD,
    POD4,
    POD6,
    POD_ID,
    POD_MAC,
    PODS_PLACE,
    REDIRECT,
    ROUTER4,
    ROUTER6,
    WORLD4,
    WORLD6,
    WORLD_ID,
    Programs,
)
from frames import ALLOW, DENY, FAMILIES, FROM_NODE, PROXY, VALID6, E, echo, ip, pod
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6MLReport,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from ciliate.datapath import layout
from ciliate.policy.mapstate import EGRESS, INGRESS, PolicyEntry, PolicyKey, Verdict

SINGLE = [
    # name, frame, drop reason (0: goes on)
    ("tcp4", E / ip(4) / TCP(flags="S"), 0),
    ("tcp6", E / ip(6) / TCP(flags="S"), 0),
    ("udp4", E / ip(4) / UDP() / b"x", 0),
    ("udp6", E / ip(6) / UDP() / b"x", 0),
    ("sctp4", E / ip(4, proto=132) / SCTP(sport=1, dport=2), 0),
    ("echo4", E / ip(4) / echo(4), 0),
    ("echo6", E / ip(6) / echo(6), 0),
    ("to the world 4", E / ip(4, dst=WORLD4) / UDP(), 0),
    ("to the world 6", E / ip(6, dst=WORLD6) / UDP(), 0),
    ("to the node's loopback 4", E / ip(4, dst="127.0.0.1") / UDP(), 150),
    ("to the node's loopback 6", E / ip(6, dst="::1") / UDP(), 150),
    ("to the node", E / ip(4, dst=NODE4) / UDP(), 0),
    ("source mac", Ether(src=PEER_MAC, dst=NODE_MAC) / ip(4) / UDP(), 130),
    ("source mac, arp", Ether(src=PEER_MAC) / ARP(op=1, pdst=ROUTER4), 130),
    ("source ip 4", E / ip(4, src=PEER4) / UDP(), 132),
    ("source ip 6", E / ip(6, src=PEER6) / UDP(), 132),
    ("source link-local for data", E / ip(6, src="fe80::1") / UDP(), 132),
    ("source unspecified", E / ip(4, src="0.0.0.0") / UDP(), 132),
    ("vlan", E / Dot1Q(vlan=5) / ip(4) / UDP(), 166),
    ("lldp", Ether(src=POD_MAC, type=0x88CC) / (b"x" * 50), 166),
    ("gre", E / ip(4, proto=47) / (b"\0" * 20), 137),
    ("igmp", E / ip(4, proto=2) / (b"\0" * 20), 137),
    ("esp", E / ip(6, nh=50) / (b"\0" * 20), 137),
    ("icmpv6 in ipv4", E / ip(4, proto=58) / (b"\x80" + b"\0" * 20), 137),
    ("icmp in ipv6", E / ip(6, nh=1) / (b"\x08" + b"\0" * 20), 137),
    ("version 5", E / ip(4, version=5) / UDP(), 134),
    ("header length 4", E / ip(4, ihl=4) / UDP(), 134),
    ("header length beyond packet", E / ip(4, ihl=15) / UDP(), 134),
    ("total length beyond packet", E / ip(4, len=900) / UDP(), 134),
    ("total length below header", E / ip(4, len=19) / UDP(), 134),
    ("payload length beyond packet", E / ip(6, plen=900) / UDP(), 134),
    ("tcp header cut", E / ip(4, proto=6) / (b"\0" * 12), 135),
    ("tcp offset 4", E / ip(4) / TCP(dataofs=4), 135),
    ("tcp offset beyond", E / ip(4) / TCP(dataofs=15), 135),
    ("udp header cut", E / ip(4, proto=17) / (b"\0" * 7), 135),
    ("udp header cut 6", E / ip(6, nh=17) / (b"\0" * 7), 135),
    ("icmp error without packet", E / ip(4) / ICMP(type=3), 135),
    ("rs", E / IPv6(src="fe80::1", dst="ff02::2") / ICMPv6ND_RS(), 190),
    ("mld", E / IPv6(src="::", dst="ff02::16") / ICMPv6MLReport(), 190),
    ("na", E / IPv6(src=POD6, dst="ff02::1") / ICMPv6ND_NA(tgt=PEER6), 190),
    ("dad", E / IPv6(src="::", dst="ff02::1:ff00:a") / ICMPv6ND_NS(tgt=POD6), 190),
    ("ns for another", E / IPv6(src=POD6, dst="ff02::1", hlim=255) / ICMPv6ND_NS(tgt=PEER6), 150),
    ("ns from afar", E / IPv6(src=POD6, dst="ff02::1", hlim=64) / ICMPv6ND_NS(tgt=ROUTER6), 134),
    ("arp reply", E / ARP(op=2, pdst=ROUTER4), 190),
    ("arp probe for own address", E / ARP(op=1, psrc="0.0.0.0", pdst=POD4), 190),
    ("arp of another medium", E / ARP(op=1, hwtype=6, pdst=ROUTER4), 134),
    ("destination options", E / VALID6 / IPv6ExtHdrDestOpt() / UDP(), 0),
    ("hop by hop", E / VALID6 / IPv6ExtHdrHopByHop() / UDP(), 0),
    ("hop by hop second", E / VALID6 / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / UDP(), 156),
    ("source routing", E / VALID6 / IPv6ExtHdrRouting(type=0, addresses=["fd05::c"]) / UDP(), 156),
    ("segments left", E / ip(6, nh=43) / Raw(b"\x11\x02\x04\x01" + b"\0" * 20) / UDP(), 156),
    ("segments done", E / ip(6, nh=43) / Raw(b"\x11\x02\x04\x00" + b"\0" * 20) / UDP(), 0),
    ("options beyond packet", E / VALID6 / IPv6ExtHdrDestOpt(len=200) / UDP(), 156),
    ("two fragment headers", E / VALID6 / IPv6ExtHdrFragment(m=1) / IPv6ExtHdrFragment(m=1) / UDP(), 156),
    ("no next header", E / ip(6, nh=59) / b"", 137),
    ("later fragment of nothing 4", E / ip(4, proto=17, frag=10, id=9) / (b"x" * 20), 157),
    ("later fragment of nothing 6", E / VALID6 / IPv6ExtHdrFragment(offset=10, nh=17, id=9) / (b"x" * 20), 157),
    ("fragment over the tcp header", E / ip(4, proto=6, frag=1, id=9) / (b"x" * 20), 157),
]


@pytest.mark.parametrize(("name", "frame", "reason"), SINGLE, ids=[row[0] for row in SINGLE])
def test_single_packet(programs: Programs, name: str, frame: Packet, reason: int) -> None:
    assert programs.why(frame) == reason


def test_nine_option_headers_are_too_many(programs: Programs) -> None:
    header: Packet = E / VALID6
    for _ in range(9):
        header = header / IPv6ExtHdrDestOpt()
    assert programs.why(header / UDP()) == 156


@pytest.mark.parametrize("receive", [False, True])
def test_an_endpoint_that_is_not_valid_drops_everything(programs: Programs, receive: bool) -> None:
    programs.endpoint(POD, valid=False)
    for frame in (E / ip(4) / UDP(), E / ip(6) / UDP(), E / ARP(op=1, pdst=ROUTER4)):
        assert programs.why(frame, receive) == 165


def test_nothing_is_delivered_to_a_pod_that_is_not_valid(programs: Programs) -> None:
    programs.endpoint(PEER, valid=False)
    assert programs.why(E / ip(4) / UDP()) == 165


@pytest.mark.parametrize("target", [ROUTER4, PEER4, "8.8.8.8"])
def test_every_arp_request_is_answered(programs: Programs, target: str) -> None:
    request = Ether(src=POD_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=POD_MAC, psrc=POD4, pdst=target)
    result, data = programs.send(request)
    answer = Ether(data)
    assert result == REDIRECT
    assert (answer.src, answer.dst) == (NODE_MAC, POD_MAC)
    assert (answer[ARP].op, answer[ARP].hwsrc, answer[ARP].psrc) == (2, NODE_MAC, target)
    assert (answer[ARP].hwdst, answer[ARP].pdst) == (POD_MAC, POD4)


@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize("source", [POD6, "fe80::1234"])
def test_the_gateway_is_a_neighbour(programs: Programs, option: bool, source: str) -> None:
    solicit: Packet = ICMPv6ND_NS(tgt=ROUTER6)
    if option:
        solicit = solicit / ICMPv6NDOptSrcLLAddr(lladdr=POD_MAC)
    result, data = programs.send(E / IPv6(src=source, dst="ff02::1:ff00:1", hlim=255) / solicit)
    answer = Ether(data)
    assert result == REDIRECT
    advert = answer[ICMPv6ND_NA]
    assert (answer[IPv6].src, answer[IPv6].dst, answer[IPv6].hlim) == (ROUTER6, source, 255)
    assert (advert.tgt, advert.R, advert.S, advert.O) == (ROUTER6, 1, 1, 1)
    assert answer[ICMPv6NDOptDstLLAddr].lladdr == NODE_MAC
    assert checksums_hold(answer)


def checksums_hold(frame: Packet) -> bool:
    """Whether every checksum is what scapy computes for the same content."""
    fresh = frame.copy()
    for layer, field in ((IP, "chksum"), (TCP, "chksum"), (UDP, "chksum"), (ICMP, "chksum")):
        if layer in fresh:
            delattr(fresh[layer], field)
    for layer in fresh.layers():
        if layer.__name__.startswith("ICMPv6") and hasattr(fresh[layer], "cksum"):
            del fresh[layer].cksum
    return bytes(fresh) == bytes(frame)


@pytest.mark.parametrize("family", FAMILIES)
def test_delivery_rewrites_macs_and_ttl_and_nothing_else(programs: Programs, family: int) -> None:
    frame = E / ip(family, ttl=9) / TCP(sport=1, dport=2, flags="S") / b"payload"
    result, data = programs.send(frame)
    out, original = Ether(data), Ether(bytes(frame))
    assert result == REDIRECT
    assert (out.dst, out.src) == (PEER_MAC, "02:00:00:00:00:02")
    assert (out[IP].ttl if family == 4 else out[IPv6].hlim) == 8
    assert checksums_hold(out)
    assert bytes(out[TCP]) == bytes(original[TCP])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ttl", [0, 1])
def test_an_expired_packet_is_answered_by_the_gateway(programs: Programs, family: int, ttl: int) -> None:
    frame = E / ip(family, ttl=ttl) / UDP(sport=7, dport=8) / (b"x" * 40)
    result, data = programs.send(frame)
    answer = Ether(data)
    assert result == REDIRECT
    assert (answer.src, answer.dst) == (NODE_MAC, POD_MAC)
    assert checksums_hold(answer)
    if family == 4:
        assert (answer[IP].src, answer[IP].dst) == (ROUTER4, POD4)
        assert (answer[ICMP].type, answer[ICMP].code) == (11, 0)
    else:
        assert (answer[IPv6].src, answer[IPv6].dst) == (ROUTER6, POD6)
        assert ICMPv6TimeExceeded in answer
    assert programs.reasons()[192, 1] >= 1
    assert not programs.flows() or all(flow.endpoint == POD for flow in programs.flows())


def test_an_expired_icmp_error_is_not_answered(programs: Programs) -> None:
    asked = ip(4, src=PEER4, dst=POD4) / UDP(sport=1, dport=2)
    assert programs.why(FROM_NODE / asked, receive=True) == 0
    assert programs.why(E / ip(4, dst=PEER4, ttl=1) / ICMP(type=3, code=3) / asked) == 192


INGRESS_CASES = [
    # name, map state of the receiver, packet of POD to PEER (both families), reason
    ("nothing allowed", {}, lambda f: TCP(dport=80, flags="S"), 133),
    ("port", {PolicyKey(INGRESS, POD_ID, 6, 80, 16): ALLOW}, lambda f: TCP(dport=80, flags="S"), 0),
    ("another port", {PolicyKey(INGRESS, POD_ID, 6, 80, 16): ALLOW}, lambda f: TCP(dport=81, flags="S"), 133),
    ("another protocol", {PolicyKey(INGRESS, POD_ID, 6, 80, 16): ALLOW}, lambda f: UDP(dport=80), 133),
    ("another peer", {PolicyKey(INGRESS, 499, 6, 80, 16): ALLOW}, lambda f: TCP(dport=80, flags="S"), 133),
    ("peer", {PolicyKey(INGRESS, POD_ID): ALLOW}, lambda f: UDP(dport=9), 0),
    ("any peer, port", {PolicyKey(INGRESS, 0, 17, 53, 16): ALLOW}, lambda f: UDP(dport=53), 0),
    ("everything", {PolicyKey(INGRESS, 0): ALLOW}, lambda f: UDP(dport=53), 0),
    ("protocol", {PolicyKey(INGRESS, POD_ID, 17): ALLOW}, lambda f: UDP(dport=9), 0),
    ("range", {PolicyKey(INGRESS, POD_ID, 6, 8000, 12): ALLOW}, lambda f: TCP(dport=8015, flags="S"), 0),
    ("outside range", {PolicyKey(INGRESS, POD_ID, 6, 8000, 12): ALLOW}, lambda f: TCP(dport=8016, flags="S"), 133),
    (
        "exact beats peer",
        {PolicyKey(INGRESS, POD_ID, 6, 80, 16): DENY, PolicyKey(INGRESS, POD_ID): ALLOW},
        lambda f: TCP(dport=80, flags="S"),
        133,
    ),
    (
        "peer beats any peer's port",
        {PolicyKey(INGRESS, POD_ID): ALLOW, PolicyKey(INGRESS, 0, 6, 80, 16): PROXY},
        lambda f: TCP(dport=80, flags="S"),
        0,
    ),
    ("proxy", {PolicyKey(INGRESS, 0, 6, 80, 16): PROXY}, lambda f: TCP(dport=80, flags="S"), 191),
    ("egress entries do not count", {PolicyKey(EGRESS, 0): ALLOW}, lambda f: TCP(dport=80, flags="S"), 133),
    ("place", {PolicyKey(INGRESS, 0, place=PODS_PLACE): ALLOW}, lambda f: UDP(dport=9), 0),
    ("place, port", {PolicyKey(INGRESS, 0, 17, 53, 16, PODS_PLACE): ALLOW}, lambda f: UDP(dport=53), 0),
    ("place, another port", {PolicyKey(INGRESS, 0, 17, 53, 16, PODS_PLACE): ALLOW}, lambda f: UDP(dport=54), 133),
    ("another place", {PolicyKey(INGRESS, 0, place=PEER_PLACE): ALLOW}, lambda f: UDP(dport=9), 133),
    ("place, range", {PolicyKey(INGRESS, 0, 6, 8000, 12, PODS_PLACE): ALLOW}, lambda f: TCP(dport=8015, flags="S"), 0),
    ("identity at its place", {PolicyKey(INGRESS, POD_ID, place=PODS_PLACE): ALLOW}, lambda f: UDP(dport=9), 0),
    ("another identity there", {PolicyKey(INGRESS, PEER_ID, place=PODS_PLACE): ALLOW}, lambda f: UDP(dport=9), 133),
    (
        "identity at its place beats identity",
        {PolicyKey(INGRESS, POD_ID, place=PODS_PLACE): ALLOW, PolicyKey(INGRESS, POD_ID, 17, 9, 16): DENY},
        lambda f: UDP(dport=9),
        0,
    ),
    (
        "identity beats place",
        {PolicyKey(INGRESS, 0, place=PODS_PLACE): ALLOW, PolicyKey(INGRESS, POD_ID, 17, 9, 16): DENY},
        lambda f: UDP(dport=9),
        133,
    ),
    (
        "place beats any peer",
        {PolicyKey(INGRESS, 0, place=PODS_PLACE): DENY, PolicyKey(INGRESS, 0, 17, 9, 16): ALLOW},
        lambda f: UDP(dport=9),
        133,
    ),
    ("echo denied", {}, lambda f: echo(f), 133),
    (
        "echo allowed",
        {PolicyKey(INGRESS, POD_ID, 1, 8, 16): ALLOW, PolicyKey(INGRESS, POD_ID, 58, 128, 16): ALLOW},
        lambda f: echo(f),
        0,
    ),
    ("unasked echo reply", {}, lambda f: echo(f, reply=True), 133),
    ("unasked syn-ack", {}, lambda f: TCP(flags="SA"), 133),
    ("unasked ack", {}, lambda f: TCP(flags="A"), 133),
    ("unasked rst", {}, lambda f: TCP(flags="R"), 133),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "state", "payload", "reason"), INGRESS_CASES, ids=[row[0] for row in INGRESS_CASES])
def test_ingress_policy_of_a_local_receiver(
    programs: Programs, name: str, state: Any, payload: Any, reason: int, family: int
) -> None:
    programs.enforce(PEER, state, ingress=True)
    assert programs.why(E / ip(family) / payload(family)) == reason


EGRESS_CASES = [
    ("world denied", {}, WORLD4, WORLD6, 133),
    ("world", {PolicyKey(EGRESS, WORLD_ID): ALLOW}, WORLD4, WORLD6, 0),
    ("prefix is not world", {PolicyKey(EGRESS, WORLD_ID): ALLOW}, CIDR4, CIDR6, 133),
    ("prefix", {PolicyKey(EGRESS, CIDR_ID): ALLOW}, CIDR4, CIDR6, 0),
    ("host", {PolicyKey(EGRESS, 1): ALLOW}, NODE4, NODE6, 0),
    ("host is not world", {PolicyKey(EGRESS, WORLD_ID): ALLOW}, NODE4, NODE6, 133),
    ("pod", {PolicyKey(EGRESS, PEER_ID): ALLOW}, PEER4, PEER6, 0),
    ("pod is not world", {PolicyKey(EGRESS, WORLD_ID): ALLOW}, PEER4, PEER6, 133),
    ("narrowest place", {PolicyKey(EGRESS, 0, place=PEER_PLACE): ALLOW}, PEER4, PEER6, 0),
    ("not the place around it", {PolicyKey(EGRESS, 0, place=PODS_PLACE): ALLOW}, PEER4, PEER6, 133),
    ("place of the node", {PolicyKey(EGRESS, 0, place=NODE_PLACE): ALLOW}, NODE4, NODE6, 0),
    ("the world has no place", {PolicyKey(EGRESS, 0, place=OTHER_PLACE): ALLOW}, WORLD4, WORLD6, 133),
    ("prefixes have no place", {PolicyKey(EGRESS, 0, place=OTHER_PLACE): ALLOW}, CIDR4, CIDR6, 133),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "state", "four", "six", "reason"), EGRESS_CASES, ids=[row[0] for row in EGRESS_CASES])
def test_egress_policy(
    programs: Programs, name: str, state: Any, four: str, six: str, reason: int, family: int
) -> None:
    programs.enforce(POD, state, egress=True)
    assert programs.why(E / ip(family, dst=four if family == 4 else six) / UDP(dport=9)) == reason


STACK_CASES = [
    # name, from the host itself, source 4, source 6, identity that decides
    ("host", True, NODE4, NODE6, 1),
    ("host by any address", True, WORLD4, WORLD6, 1),
    ("node address from elsewhere", False, NODE4, NODE6, WORLD_ID),
    ("world", False, WORLD4, WORLD6, WORLD_ID),
    ("prefix", False, CIDR4, CIDR6, CIDR_ID),
    ("pod of another node", False, PEER4, PEER6, PEER_ID),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "host", "four", "six", "number"), STACK_CASES, ids=[row[0] for row in STACK_CASES])
def test_who_sent_what_comes_through_the_stack(
    programs: Programs, name: str, host: bool, four: str, six: str, number: int, family: int
) -> None:
    frame = FROM_NODE / ip(family, src=four if family == 4 else six, dst=pod(family)) / UDP(dport=9)
    programs.enforce(POD, {PolicyKey(INGRESS, number): ALLOW}, ingress=True)
    assert programs.why(frame, receive=True, from_host=host) == 0
    programs.flush()
    others = {1, WORLD_ID, CIDR_ID, PEER_ID} - {number}
    programs.enforce(POD, {PolicyKey(INGRESS, other): ALLOW for other in others}, ingress=True)
    assert programs.why(frame, receive=True, from_host=host) == 133


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pods_place_counts_only_where_the_pod_may_have_come_from(programs: Programs, family: int) -> None:
    """A pod of another node is at its place; who merely says that it is the node, from elsewhere, is of the world."""
    for four, six, place, host, expected in (
        (PEER4, PEER6, PEER_PLACE, False, 0),
        (NODE4, NODE6, NODE_PLACE, True, 0),
        (NODE4, NODE6, NODE_PLACE, False, 133),
        (WORLD4, WORLD6, OTHER_PLACE, False, 133),
    ):
        programs.flush()
        programs.enforce(POD, {PolicyKey(INGRESS, 0, place=place): ALLOW}, ingress=True)
        frame = FROM_NODE / ip(family, src=four if family == 4 else six, dst=pod(family)) / UDP(dport=9)
        assert programs.why(frame, receive=True, from_host=host) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_place_that_goes_ends_its_flows(programs: Programs, family: int) -> None:
    programs.enforce(PEER, {PolicyKey(INGRESS, 0, 17, 53, 16, PODS_PLACE): ALLOW}, ingress=True)
    frame = E / ip(family) / UDP(sport=1000, dport=53)
    assert [programs.why(frame), programs.why(frame)] == [0, 0]
    prefix = ip_network("10.5.0.8/29" if family == 4 else "fd05::8/125")
    programs.maps["ciliate_place"].delete(layout.ipcache_key(prefix))
    assert programs.why(frame) == 133
    programs.maps["ciliate_place"].update(layout.ipcache_key(prefix), layout.place_entry(OTHER_PLACE))
    assert programs.why(frame) == 133
    programs.maps["ciliate_place"].update(layout.ipcache_key(prefix), layout.place_entry(PODS_PLACE))
    assert programs.why(frame) == 0


def test_counters_of_the_entry_that_decided(programs: Programs) -> None:
    from ciliate.datapath import layout

    key = PolicyKey(INGRESS, POD_ID, 17, 53, 16)
    programs.enforce(PEER, {key: PolicyEntry(Verdict.ALLOW, 0, 99)}, ingress=True)
    frame = E / ip(4) / UDP(dport=53) / b"xyz"
    for _ in range(3):
        assert programs.why(frame) == 0
    value = programs.maps["ciliate_policy"].lookup(layout.policy_key(PEER, key))
    assert value is not None
    counters = layout.policy_entry_of(value)
    assert (counters.packets, counters.bytes, counters.entry.rule) == (3, 3 * len(frame), 99)


def test_families_that_are_off_are_dropped(tmp_path_factory: pytest.TempPathFactory, build: str) -> None:
    only6 = Programs(tmp_path_factory.mktemp("only6"), build, family4=False)
    try:
        assert only6.why(E / ip(4) / UDP()) == 166
        assert only6.why(E / ip(6) / UDP()) == 0
    finally:
        only6.close()


def test_replies_of_the_pod_to_the_host_pass(programs: Programs) -> None:
    programs.enforce(POD, {PolicyKey(INGRESS, 1): ALLOW}, ingress=True, egress=True)
    request = FROM_NODE / IP(src=NODE4, dst=POD4) / TCP(sport=5, dport=80, flags="S")
    assert programs.why(request, receive=True, from_host=True) == 0
    assert programs.why(E / ip(4, dst=NODE4) / TCP(sport=80, dport=5, flags="SA")) == 0
    assert programs.why(E / ip(4, dst=NODE4) / TCP(sport=81, dport=5, flags="S")) == 133


def test_packets_to_the_stack_are_left_as_they_are(programs: Programs) -> None:
    frame = E / ip(4, dst=WORLD4) / UDP(dport=9) / Raw(b"data")
    result, data = programs.send(frame)
    assert (result, data) == (OK, bytes(frame))
