"""What the endpoint program does with single packets and short exchanges, as tables. Tier bpf."""

from __future__ import annotations

from typing import Any

import pytest
from bpf_harness import (
    CIDR4,
    CIDR6,
    CIDR_ID,
    NODE4,
    NODE6,
    NODE_MAC,
    OK,
    PEER,
    PEER4,
    PEER6,
    PEER_ID,
    PEER_MAC,
    POD,
    POD4,
    POD6,
    POD_ID,
    POD_MAC,
    REDIRECT,
    ROUTER4,
    ROUTER6,
    WORLD4,
    WORLD6,
    WORLD_ID,
    Programs,
)
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
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

from ciliate.policy.mapstate import EGRESS, INGRESS, PolicyEntry, PolicyKey, Verdict

ALLOW, DENY, PROXY = PolicyEntry(Verdict.ALLOW), PolicyEntry(Verdict.DENY), PolicyEntry(Verdict.REDIRECT, 10001)
E = Ether(src=POD_MAC, dst=NODE_MAC)
FROM_NODE = Ether(src=NODE_MAC, dst=POD_MAC)  # without both addresses scapy would ask the network for them
FAMILIES = [4, 6]


def ip(family: int, src: str = "", dst: str = "", **fields: Any) -> Packet:
    """An IP header from POD to PEER, or between the given addresses."""
    if family == 4:
        return IP(src=src or POD4, dst=dst or PEER4, **fields)
    if "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    return IPv6(src=src or POD6, dst=dst or PEER6, **fields)


def pod(family: int) -> str:
    return POD4 if family == 4 else POD6


def peer(family: int) -> str:
    return PEER4 if family == 4 else PEER6


def echo(family: int, reply: bool = False, number: int = 77) -> Packet:
    if family == 4:
        return ICMP(type=0 if reply else 8, id=number)
    return (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=number)


VALID6 = IPv6(src=POD6, dst=PEER6)
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
    inner = IP(src=PEER4, dst=POD4) / UDP(sport=1, dport=2)
    assert programs.why(E / ip(4, ttl=1) / ICMP(type=3, code=3) / inner) == 192


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
@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
def test_replies_pass_and_a_rule_that_goes_ends_its_flows(programs: Programs, family: int, kind: str) -> None:
    """Section 8 item 10: reply traffic beats policy; deny ends an established flow."""
    world = WORLD4 if family == 4 else WORLD6
    request = {"tcp": TCP(sport=5, dport=80, flags="S"), "udp": UDP(sport=5, dport=80), "echo": echo(family)}[kind]
    more = {"tcp": TCP(sport=5, dport=80, flags="A"), "udp": UDP(sport=5, dport=80), "echo": echo(family)}[kind]
    reply = {"tcp": TCP(sport=80, dport=5, flags="SA"), "udp": UDP(sport=80, dport=5), "echo": echo(family, True)}[kind]
    inbound = FROM_NODE / ip(family, src=world, dst=pod(family)) / reply
    programs.enforce(POD, {}, ingress=True)
    assert programs.why(inbound, receive=True) == 133
    assert programs.why(E / ip(family, dst=world) / request) == 0
    assert programs.why(inbound, receive=True) == 0
    assert programs.why(E / ip(family, dst=world) / more) == 0
    programs.enforce(POD, {}, ingress=True, egress=True)
    assert programs.why(inbound, receive=True) == 0
    assert programs.why(E / ip(family, dst=world) / more) == 133
    assert programs.why(inbound, receive=True) == 193


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
def test_answers_do_not_bring_an_ended_flow_back(programs: Programs, family: int, kind: str) -> None:
    """The other end may speak to the pod, but what answers an ended flow is no new flow of its own."""
    world = WORLD4 if family == 4 else WORLD6
    request = {"tcp": TCP(sport=5, dport=80, flags="S"), "udp": UDP(sport=5, dport=80), "echo": echo(family)}[kind]
    more = {"tcp": TCP(sport=5, dport=80, flags="A"), "udp": UDP(sport=5, dport=80), "echo": echo(family)}[kind]
    reply = {"tcp": TCP(sport=80, dport=5, flags="PA"), "udp": UDP(sport=80, dport=5), "echo": echo(family, True)}[kind]
    inbound = FROM_NODE / ip(family, src=world, dst=pod(family)) / reply
    assert programs.why(E / ip(family, dst=world) / request) == 0
    programs.enforce(POD, {}, egress=True)
    assert programs.why(inbound, receive=True) == 0, "nothing ended it yet"
    assert programs.why(E / ip(family, dst=world) / more) == 133
    assert programs.why(inbound, receive=True) == 193
    assert programs.why(E / ip(family, dst=world) / more) == 133, "it is still ended"
    programs.enforce(POD, {}, egress=False)
    assert programs.why(E / ip(family, dst=world) / more) == 0, "policy allows it again"
    assert programs.why(inbound, receive=True) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_end_of_an_ended_flow_may_open_its_own(programs: Programs, family: int) -> None:
    world = WORLD4 if family == 4 else WORLD6
    outbound = E / ip(family, dst=world)
    inbound = FROM_NODE / ip(family, src=world, dst=pod(family))
    assert programs.why(outbound / TCP(sport=5, dport=80, flags="S")) == 0
    programs.enforce(POD, {}, egress=True)
    assert programs.why(outbound / TCP(sport=5, dport=80, flags="A")) == 133
    assert programs.why(inbound / TCP(sport=80, dport=5, flags="S"), receive=True) == 0
    assert programs.why(outbound / TCP(sport=5, dport=80, flags="SA")) == 0, "a reply now"
    assert programs.why(inbound / TCP(sport=80, dport=5, flags="A"), receive=True) == 0


def asks(family: int, number: int, kind: str = "echo") -> Packet:
    """An ICMP packet that is a question: an echo request, or one of another type that no answer follows."""
    if kind == "echo":
        return echo(family, number=number)
    return ICMP(type=number) if family == 4 else Raw(bytes([number, *bytes(7)]))


QUESTIONS = [("echo", 0), ("echo", 1), ("echo", 8), ("echo", 128), ("echo", 65535), ("other", 13), ("other", 200)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "number"), QUESTIONS)
def test_an_icmp_request_is_no_answer_of_the_other_ends_request(
    programs: Programs, family: int, kind: str, number: int
) -> None:
    """Identifiers are chosen by each end, so both may use the same one, and 0 is one of them."""
    world = WORLD4 if family == 4 else WORLD6
    inbound = FROM_NODE / ip(family, src=world, dst=pod(family), **icmp_in(family)) / asks(family, number, kind)
    outbound = E / ip(family, dst=world, **icmp_in(family)) / asks(family, number, kind)
    assert programs.why(inbound, receive=True) == 0
    programs.enforce(POD, {}, egress=True)
    assert programs.why(outbound) == 133
    if kind == "echo":
        assert programs.why(E / ip(family, dst=world) / echo(family, reply=True, number=number)) == 0
    programs.flush()
    programs.enforce(POD, {})
    assert programs.why(outbound) == 0
    programs.enforce(POD, {}, ingress=True)
    assert programs.why(inbound, receive=True) == 133
    if kind == "echo":
        answer = FROM_NODE / ip(family, src=world, dst=pod(family)) / echo(family, reply=True, number=number)
        assert programs.why(answer, receive=True) == 0


def icmp_in(family: int) -> dict[str, int]:
    """Fields of a header before raw ICMPv6."""
    return {"proto": 1} if family == 4 else {"nh": 58}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unasked_echo_reply_opens_no_way_for_requests(programs: Programs, family: int) -> None:
    world = WORLD4 if family == 4 else WORLD6
    assert programs.why(E / ip(family, dst=world) / echo(family, reply=True)) == 0
    programs.enforce(POD, {}, ingress=True)
    inbound = FROM_NODE / ip(family, src=world, dst=pod(family))
    assert programs.why(inbound / echo(family), receive=True) == 133
    assert programs.why(inbound / echo(family, reply=True), receive=True) == 133


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("before", "reason"), [("S", 0), ("SA", 133), ("A", 133), ("FA", 133)])
def test_a_connection_from_the_other_end_is_no_answer(
    programs: Programs, family: int, before: str, reason: int
) -> None:
    """Only a SYN that crosses ours on the way (simultaneous open, RFC 9293 section 3.5) belongs to our connection."""
    world = WORLD4 if family == 4 else WORLD6
    outbound = E / ip(family, dst=world)
    inbound = FROM_NODE / ip(family, src=world, dst=pod(family))
    programs.enforce(POD, {}, ingress=True)
    assert programs.why(outbound / TCP(sport=5, dport=80, flags="S")) == 0
    if before != "S":
        assert programs.why(inbound / TCP(sport=80, dport=5, flags="SA"), receive=True) == 0
        assert programs.why(outbound / TCP(sport=5, dport=80, flags=before.replace("S", ""))) == 0
    assert programs.why(inbound / TCP(sport=80, dport=5, flags="S"), receive=True) == reason
    assert programs.why(inbound / TCP(sport=80, dport=5, flags="A"), receive=True) == 0, "ours goes on"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [TCP, UDP])
def test_equal_ports_at_both_ends_have_a_direction(programs: Programs, family: int, layer: Any) -> None:
    world = WORLD4 if family == 4 else WORLD6
    payload = layer(sport=53, dport=53)
    assert programs.why(E / ip(family, dst=world) / payload) == 0
    flow = programs.flows()[0]
    assert (str(flow.source), str(flow.destination), flow.direction) == (pod(family), world, EGRESS)
    programs.enforce(POD, {}, ingress=True, egress=True)
    back = FROM_NODE / ip(family, src=world, dst=pod(family))
    answer = layer(sport=53, dport=53, flags="SA") if layer is TCP else payload
    assert programs.why(back / answer, receive=True) == 0
    assert programs.why(E / ip(family, dst=world) / payload) == 133, "the flow's own direction is asked every time"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_end_of_a_flow_is_judged_for_itself(programs: Programs, family: int) -> None:
    """What the sender's end knows opens nothing at the receiver's, though both share an entry."""
    frame = E / ip(family) / UDP(sport=5, dport=53)
    programs.enforce(PEER, {}, ingress=True)
    assert programs.why(frame) == 133
    assert programs.flows() == []
    programs.enforce(PEER, {})
    assert programs.why(frame) == 0
    ends = {(flow.endpoint, flow.direction): flow for flow in programs.flows()}
    assert set(ends) == {(POD, EGRESS), (PEER, INGRESS)}
    assert all((flow.tx_packets, flow.tx_bytes) == (1, len(frame)) for flow in ends.values())
    programs.enforce(PEER, {}, ingress=True)
    assert programs.why(frame) == 133
    ended = {flow.endpoint: bool(flow.ended) for flow in programs.flows()}
    assert ended == {POD: False, PEER: True}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_of_an_earlier_pod_with_the_same_address_is_no_flow_of_the_new_one(
    programs: Programs, family: int
) -> None:
    world = WORLD4 if family == 4 else WORLD6
    assert programs.why(E / ip(family, dst=world) / UDP(sport=5, dport=53)) == 0
    table = programs.maps["ciliate_ct_any"]
    for key, value in list(table.items()):
        table.update(key, value.replace(POD.to_bytes(2, "little"), (99).to_bytes(2, "little")))
    assert {flow.endpoint for flow in programs.flows()} == {99}
    programs.enforce(POD, {}, ingress=True)
    answer = FROM_NODE / ip(family, src=world, dst=pod(family)) / UDP(sport=53, dport=5)
    assert programs.why(answer, receive=True) == 133


def error4(inner: Packet, src: str = WORLD4, kind: int = 3, code: int = 4) -> Packet:
    return FROM_NODE / IP(src=src, dst=POD4) / ICMP(type=kind, code=code) / inner


@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
@pytest.mark.parametrize("sender", [WORLD4, "203.0.113.77"])
@pytest.mark.parametrize("error", [3, 11, 12])
def test_icmp_errors_belong_to_the_flow_inside(programs: Programs, kind: str, sender: str, error: int) -> None:
    """Section 8 item 12: for every protocol, and also from a router on the way."""
    payload = {"tcp": TCP(sport=5, dport=80, flags="S"), "udp": UDP(sport=5, dport=80), "echo": echo(4)}[kind]
    sent = IP(src=POD4, dst=WORLD4) / payload
    programs.enforce(POD, {}, ingress=True)
    assert programs.why(error4(sent, sender, error, 0), receive=True) == 133
    assert programs.why(E / sent) == 0
    assert programs.why(error4(sent, sender, error, 0), receive=True) == 0
    stranger = IP(src=POD4, dst=WORLD4) / UDP(sport=6, dport=81)
    assert programs.why(error4(stranger, sender, error, 0), receive=True) == 133
    foreign = IP(src=PEER4, dst=WORLD4) / payload
    assert programs.why(error4(foreign, sender, error, 0), receive=True) == 133


def test_icmpv6_packet_too_big_belongs_to_the_flow_inside(programs: Programs) -> None:
    sent = IPv6(src=POD6, dst=WORLD6) / TCP(sport=5, dport=80, flags="S")
    error = FROM_NODE / IPv6(src="2001:db8::fe", dst=POD6) / ICMPv6DestUnreach(type=2) / sent
    programs.enforce(POD, {}, ingress=True)
    assert programs.why(error, receive=True) == 133
    assert programs.why(E / sent) == 0
    assert programs.why(error, receive=True) == 0


def test_an_icmp_error_about_a_reply_passes(programs: Programs) -> None:
    """A pod that served a request hears that its answer did not arrive."""
    assert programs.why(FROM_NODE / IP(src=WORLD4, dst=POD4) / UDP(sport=5, dport=53), receive=True) == 0
    programs.enforce(POD, {}, ingress=True)
    answer = IP(src=POD4, dst=WORLD4) / UDP(sport=53, dport=5)
    assert programs.why(error4(answer), receive=True) == 0


def lifetime(programs: Programs) -> list[int]:
    import time

    return [round(flow.lifetime - time.clock_gettime(time.CLOCK_MONOTONIC)) for flow in programs.flows()]


def near(values: list[int], expected: int) -> bool:
    return bool(values) and all(abs(value - expected) <= 2 for value in values)


def test_tcp_lifetimes_and_closing(programs: Programs) -> None:
    """Section 8 item 11: SYN 60 s, then 21600 s; 10 s only once both sides closed; SYN opens anew."""

    def out(flags: str) -> int:
        return programs.why(E / ip(4, dst=WORLD4) / TCP(sport=5, dport=80, flags=flags))

    def back(flags: str) -> int:
        frame = FROM_NODE / IP(src=WORLD4, dst=POD4) / TCP(sport=80, dport=5, flags=flags)
        return programs.why(frame, receive=True)

    assert out("S") == 0
    assert near(lifetime(programs), 60)
    assert back("SA") == 0
    assert near(lifetime(programs), 60)
    assert out("A") == 0
    assert near(lifetime(programs), 21600)
    assert out("FA") == 0
    assert near(lifetime(programs), 21600)
    assert back("A") == 0
    assert back("FA") == 0
    assert near(lifetime(programs), 10)
    assert out("A") == 0
    assert near(lifetime(programs), 10)
    assert out("S") == 0
    assert near(lifetime(programs), 60)


@pytest.mark.parametrize(("payload", "expected"), [(UDP(dport=9), 60), (echo(4), 60)])
def test_other_lifetimes(programs: Programs, payload: Packet, expected: int) -> None:
    assert programs.why(E / ip(4, dst=WORLD4) / payload) == 0
    assert near(lifetime(programs), expected)


def test_a_dead_entry_is_no_entry(programs: Programs) -> None:
    """An entry past its lifetime must not let a packet in, collected or not."""
    assert programs.why(E / ip(4, dst=WORLD4) / UDP(sport=5, dport=53)) == 0
    table = programs.maps["ciliate_ct_any"]
    for key, value in list(table.items()):
        table.update(key, (1).to_bytes(4, "little") + value[4:])
    programs.enforce(POD, {}, ingress=True)
    assert programs.why(FROM_NODE / IP(src=WORLD4, dst=POD4) / UDP(sport=53, dport=5), receive=True) == 133


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_get_the_verdict_of_their_flow(programs: Programs, family: int) -> None:
    """Section 8 item 13: under a rule with ports, later fragments pass where the first did, and only there."""
    programs.enforce(PEER, {PolicyKey(INGRESS, POD_ID, 17, 53, 16): ALLOW}, ingress=True)
    for dport, reason in ((53, 0), (54, 133)):
        first_payload = UDP(sport=dport + 1000, dport=dport, len=64) / (b"x" * 24)
        if family == 4:
            first = E / ip(4, flags="MF", id=dport) / first_payload
            later = E / ip(4, frag=4, id=dport, proto=17) / (b"x" * 32)
        else:
            first = E / VALID6 / IPv6ExtHdrFragment(m=1, id=dport) / first_payload
            later = E / VALID6 / IPv6ExtHdrFragment(offset=4, id=dport, nh=17) / (b"x" * 32)
        assert programs.why(later) == 157
        assert programs.why(first) == reason
        assert programs.why(later) == reason


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
