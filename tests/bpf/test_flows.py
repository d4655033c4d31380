"""Flows through the endpoint program: answers, ends, errors about them, fragments, lifetimes. Tier bpf."""

from __future__ import annotations

import time
from typing import Any

import pytest
from bpf_harness import (
    CIDR4,
    CIDR6,
    CIDR_ID,
    NODE4,
    NODE6,
    OK,
    PEER,
    PEER4,
    PEER_ID,
    POD,
    POD4,
    POD6,
    POD_ID,
    WORLD4,
    WORLD6,
    WORLD_ID,
    Programs,
)
from frames import ALLOW, FAMILIES, FROM_NODE, VALID6, E, echo, ip, peer, pod
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6, IPv6ExtHdrFragment
from scapy.packet import Packet, Padding, Raw

from ciliate.datapath import conntrack
from ciliate.policy.mapstate import EGRESS, INGRESS, PolicyEntry, PolicyKey


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
    assert programs.why(inbound, receive=True) == 0
    programs.enforce(POD, {}, egress=True)
    assert programs.why(E / ip(family, dst=world) / more) == 133
    assert programs.why(inbound, receive=True) == 193
    assert programs.why(E / ip(family, dst=world) / more) == 133, "it is still ended"
    programs.enforce(POD, {}, egress=False)
    assert programs.why(E / ip(family, dst=world) / more) == 0, "policy allows it again"
    assert programs.why(inbound, receive=True) == 0


def asked_and_answered(family: int, kind: str) -> tuple[Packet, Packet]:
    """A question and its answer, above IP; policy knows the question as `ASKED` does."""
    if kind == "tcp":
        return TCP(sport=5, dport=80, flags="S"), TCP(sport=80, dport=5, flags="SA")
    if kind == "udp":
        return UDP(sport=5, dport=80), UDP(sport=80, dport=5)
    return echo(family), echo(family, reply=True)


def asked(family: int, kind: str, direction: int, identity: int) -> dict[PolicyKey, PolicyEntry]:
    """A policy that allows one identity this kind of question alone."""
    proto, port = {"tcp": (6, 80), "udp": (17, 80), "echo": (1, 8) if family == 4 else (58, 128)}[kind]
    return {PolicyKey(direction, identity, proto, port, 16): ALLOW}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
@pytest.mark.parametrize("direction", [EGRESS, INGRESS])
def test_a_revoked_flow_does_not_live_on_by_its_answers(
    programs: Programs, family: int, kind: str, direction: int
) -> None:
    """Whichever end's policy it was that let the flow begin, and though the end that asked says nothing more."""
    world = WORLD4 if family == 4 else WORLD6
    question, answer = asked_and_answered(family, kind)
    ways = {EGRESS: E / ip(family, dst=world), INGRESS: FROM_NODE / ip(family, src=world, dst=pod(family))}
    enforced = {"egress": direction == EGRESS, "ingress": direction == INGRESS}
    answers = {"packet": ways[1 - direction] / answer, "receive": direction == EGRESS}
    programs.enforce(POD, asked(family, kind, direction, WORLD_ID), **enforced)
    assert programs.why(ways[direction] / question, receive=direction == INGRESS) == 0
    assert programs.why(**answers) == 0
    more = {PolicyKey(direction, CIDR_ID): ALLOW}
    programs.enforce(POD, asked(family, kind, direction, WORLD_ID) | more, **enforced)
    programs.enforce(POD, asked(family, kind, direction, WORLD_ID), **enforced)
    assert programs.why(**answers) == 0, "another peer's rule went"
    programs.enforce(POD, {}, **enforced)
    assert programs.why(**answers) == 193
    programs.enforce(POD, asked(family, kind, direction, WORLD_ID), **enforced)
    assert programs.why(ways[direction] / question, receive=direction == INGRESS) == 0, "allowed again"
    assert programs.why(**answers) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
def test_answers_pass_as_far_as_the_peers_identity_may_have_the_flow(
    programs: Programs, family: int, kind: str
) -> None:
    """The peer was given other labels, or its address another holder, and the pod's own policy is as it was."""
    question, answer = asked_and_answered(family, kind)
    inbound = FROM_NODE / ip(family, src=peer(family), dst=pod(family)) / answer
    both = asked(family, kind, EGRESS, PEER_ID) | asked(family, kind, EGRESS, 500)
    programs.enforce(POD, both, egress=True)
    assert programs.why(E / ip(family) / question) == 0
    programs.name(peer(family), 500)
    assert programs.why(inbound, receive=True) == 0, "this one may have it, too"
    programs.name(peer(family), 501)
    assert programs.why(inbound, receive=True) == 193


@pytest.mark.parametrize("family", FAMILIES)
def test_icmp_errors_about_a_revoked_flow_do_not_pass(programs: Programs, family: int) -> None:
    world = WORLD4 if family == 4 else WORLD6
    error = ICMP(type=3, code=3) if family == 4 else ICMPv6DestUnreach(code=4)
    sent, came = ip(family, dst=world) / UDP(sport=5, dport=80), ip(family, src=world, dst=pod(family)) / UDP(dport=80)
    allowed = asked(family, "udp", EGRESS, WORLD_ID) | asked(family, "udp", INGRESS, WORLD_ID)
    inbound = FROM_NODE / ip(family, src=world, dst=pod(family)) / error / sent
    outbound = E / ip(family, dst=world) / error / came
    programs.enforce(POD, allowed, egress=True, ingress=True)
    assert programs.why(E / sent) == programs.why(FROM_NODE / came, receive=True) == 0
    programs.enforce(POD, allowed | {PolicyKey(EGRESS, CIDR_ID): ALLOW}, egress=True, ingress=True)
    programs.enforce(POD, allowed, egress=True, ingress=True)
    assert programs.why(inbound, receive=True) == programs.why(outbound) == 0
    programs.enforce(POD, {}, egress=True, ingress=True)
    assert (programs.why(inbound, receive=True), programs.why(outbound)) == (193, 193)


@pytest.mark.parametrize("last", ["A", "S"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_end_of_an_ended_flow_may_open_its_own(programs: Programs, family: int, last: str) -> None:
    world = WORLD4 if family == 4 else WORLD6
    outbound = E / ip(family, dst=world)
    inbound = FROM_NODE / ip(family, src=world, dst=pod(family))
    assert programs.why(outbound / TCP(sport=5, dport=80, flags="S")) == 0
    programs.enforce(POD, {}, egress=True)
    assert programs.why(outbound / TCP(sport=5, dport=80, flags=last)) == 133
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
    programs.enforce(POD, {}, ingress=True)
    back = FROM_NODE / ip(family, src=world, dst=pod(family))
    answer = layer(sport=53, dport=53, flags="SA") if layer is TCP else payload
    assert programs.why(back / answer, receive=True) == 0
    programs.enforce(POD, {}, ingress=True, egress=True)
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
@pytest.mark.parametrize("sender", [WORLD4, "203.0.113.77", CIDR4])
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


OPTIONS = [IPOption_NOP()] * 4
Q4, Q6 = {"src": POD4, "dst": WORLD4}, {"src": POD6, "dst": WORLD6}
QUOTES: list[tuple[str, Packet]] = [
    # what an error says that it complains of, with a flow of these ends known
    ("version", IP(**Q4, version=6) / UDP(sport=5, dport=53)),
    ("header length below an IP header", IP(**Q4, ihl=4) / UDP(sport=5, dport=53)),
    ("header length beyond", IP(**Q4, ihl=15) / UDP(sport=5, dport=53)),
    ("later fragment, whose payload would be ports", IP(**Q4, frag=1) / UDP(sport=5, dport=53)),
    ("protocol without flows", IP(**Q4, proto=47) / UDP(sport=5, dport=53)),
    ("cut", Raw(bytes(IP(**Q4) / UDP(sport=5, dport=53))[:27])),
    (
        "cut, with padding behind",
        Raw(bytes(IP(**Q4, options=OPTIONS) / UDP(sport=5, dport=53))[:28]) / Padding(bytes(9)),
    ),
    ("version 6", IPv6(**Q6, version=4) / UDP(sport=5, dport=53)),
    ("later fragment 6", IPv6(**Q6) / IPv6ExtHdrFragment(offset=1, nh=17) / UDP(sport=5, dport=53)),
    ("cut 6", Raw(bytes(IPv6(**Q6) / UDP(sport=5, dport=53))[:47])),
]


@pytest.mark.parametrize(("name", "quote"), QUOTES, ids=[row[0] for row in QUOTES])
def test_icmp_errors_that_quote_what_cannot_be(programs: Programs, name: str, quote: Packet) -> None:
    family = 6 if "6" in name else 4
    assert programs.why(E / ip(family, dst=WORLD4 if family == 4 else WORLD6) / UDP(sport=5, dport=53)) == 0
    if family == 4:
        assert programs.why(error4(quote), receive=True) == 135
        return
    frame = FROM_NODE / IPv6(src=WORLD6, dst=POD6) / ICMPv6DestUnreach() / quote
    assert programs.why(frame, receive=True) == 135


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pods_icmp_error_goes_to_who_sent_the_packet_inside(programs: Programs, family: int) -> None:
    """Or with an error about any flow that came to it, it could send anywhere."""
    world, other = (WORLD4, CIDR4) if family == 4 else (WORLD6, CIDR6)
    came = ip(family, src=world, dst=pod(family)) / UDP(sport=5, dport=53)
    assert programs.why(FROM_NODE / came, receive=True) == 0
    programs.enforce(POD, {}, egress=True)
    error = ICMP(type=3, code=3) if family == 4 else ICMPv6DestUnreach(code=4)
    assert programs.why(E / ip(family, dst=world) / error / came) == 0
    assert programs.why(E / ip(family, dst=other) / error / came) == 187


def false_errors(family: int, src: str, dst: str) -> list[Packet]:
    """ICMP errors of every kind from one address to another about packets that were never sent to the first one."""
    world = WORLD4 if family == 4 else WORLD6
    quotes = [
        ip(family, src=dst, dst=world) / UDP(sport=8472, dport=8472),
        ip(family, src=dst, dst=world) / TCP(sport=80, dport=5, flags="A"),
        ip(family, src=world, dst=src) / UDP(sport=5, dport=53),
    ]
    layer = ICMP if family == 4 else ICMPv6DestUnreach
    codes = [(3, 4), (3, 3), (11, 0), (12, 0)] if family == 4 else [(1, 4), (2, 0), (3, 0), (4, 0)]
    return [
        ip(family, src=src, dst=dst) / layer(type=kind, code=code) / quote for kind, code in codes for quote in quotes
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pods_icmp_errors_about_what_it_never_got_are_dropped(programs: Programs, family: int) -> None:
    """Nothing is enforced here, so that policy would let them by: to a pod, to the node, to the world."""
    node, world = (NODE4, WORLD4) if family == 4 else (NODE6, WORLD6)
    for target in (peer(family), node, world):
        for error in false_errors(family, pod(family), target):
            assert programs.why(E / error) == 187
    for error in false_errors(family, peer(family), pod(family)):
        assert programs.why(FROM_NODE / error, receive=True) == 187, "through the stack, from a pod elsewhere"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_routers_icmp_errors_are_policys_to_judge(programs: Programs, family: int) -> None:
    """Whoever forwards packets may complain of any: the node, and what is outside of the cluster."""
    world = WORLD4 if family == 4 else WORLD6
    for error in false_errors(family, world, pod(family)):
        assert programs.why(FROM_NODE / error, receive=True) == 0
    programs.enforce(POD, {}, ingress=True)
    for error in false_errors(family, world, pod(family)):
        assert programs.why(FROM_NODE / error, receive=True) == 133


def test_an_icmp_error_about_a_reply_passes(programs: Programs) -> None:
    """A pod that served a request hears that its answer did not arrive."""
    assert programs.why(FROM_NODE / IP(src=WORLD4, dst=POD4) / UDP(sport=5, dport=53), receive=True) == 0
    programs.enforce(POD, {}, egress=True)
    answer = IP(src=POD4, dst=WORLD4) / UDP(sport=53, dport=5)
    assert programs.why(error4(answer), receive=True) == 0


def lifetimes(programs: Programs) -> set[int]:
    """Seconds that each flow has left, to the next ten."""
    now = int(time.monotonic())
    return {round((flow.lifetime - now) / 10) * 10 for flow in programs.flows()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_lives_long_once_it_is_answered_and_until_a_reset(programs: Programs, family: int) -> None:
    world = WORLD4 if family == 4 else WORLD6
    outbound, inbound = E / ip(family, dst=world), FROM_NODE / ip(family, src=world, dst=pod(family))

    def out(flags: str) -> set[int]:
        assert programs.why(outbound / TCP(sport=5, dport=80, flags=flags)) == 0
        return lifetimes(programs)

    def back(flags: str) -> set[int]:
        assert programs.why(inbound / TCP(sport=80, dport=5, flags=flags), receive=True) == 0
        return lifetimes(programs)

    assert (out("S"), back("RA")) == ({60}, {10}), "refused"
    assert (out("S"), back("SA"), out("A")) == ({60}, {60}, {21600}), "a new connection with the same ports"
    assert (back("R"), out("A"), back("A")) == ({10}, {21600}, {21600}), "who goes on did not believe it"
    assert (out("RA"), out("R")) == ({10}, {10})
    programs.flush()
    assert (out("A"), out("PA"), out("A")) == ({60}, {60}, {60}), "nobody answers"
    assert (back("A"), out("FA"), back("FA")) == ({21600}, {21600}, {10})
    programs.flush()
    assert (back("A"), out("R")) == ({60}, {10}), "to a port where nobody listens"


@pytest.mark.parametrize("kind", ["lone ACKs", "datagrams"])
def test_a_pods_flood_leaves_the_idle_flows_of_others_alone(programs: Programs, kind: str) -> None:
    """They send nothing meanwhile, and the flood makes three times as many flows as there is room for."""
    table, proto = ("ciliate_ct_tcp", 6) if kind == "lone ACKs" else ("ciliate_ct_any", 17)
    idle = {programs.track(PEER, proto, number) for number in range(1, 501)}
    segment = TCP(sport=0, dport=99, flags="A") if proto == 6 else UDP(sport=0, dport=99)
    flood = bytearray(bytes(E / ip(4, dst=WORLD4) / segment))
    for number in range(1, 3 * 4096):
        flood[34:36] = number.to_bytes(2, "big")
        assert programs.send(bytes(flood))[0] == OK
    kept = {key for key, _ in programs.maps[table].items()}
    assert idle <= kept, f"{len(idle - kept)} of {len(idle)} are lost"
    assert len(kept) < 4096


def test_a_flow_counts_as_of_whose_pod_began_it(programs: Programs) -> None:
    """Or got its first packet, where nobody here began it; and no longer than it lives."""
    shares, maps = programs.maps["ciliate_ct_share"], [programs.maps[name] for name in conntrack.MAPS]

    def used() -> list[tuple[int, int]]:
        return [conntrack.share_of(shares, number).used for number in (POD, PEER, 0)]

    for number in (1, 2):
        assert programs.why(E / ip(4) / UDP(sport=number, dport=53)) == 0
        assert programs.why(E / ip(4) / UDP(sport=number, dport=53)) == 0
    assert programs.why(FROM_NODE / ip(4, src=WORLD4, dst=POD4) / TCP(sport=9, dport=80, flags="S"), receive=True) == 0
    assert used() == [(1, 2), (0, 0), (1, 2)]
    programs.track(PEER, 6, 700)
    now = int(time.monotonic())
    conntrack.collect(maps, now, shares)
    assert used() == [(1, 2), (1, 0), (2, 2)]
    conntrack.collect(maps, now + 100, shares)
    assert used() == [(0, 0), (1, 0), (1, 0)]
    conntrack.forget_share(shares, PEER)
    assert used() == [(0, 0), (0, 0), (1, 0)]


def test_a_full_table_keeps_the_flows_in_use_and_opens_none(programs: Programs) -> None:
    """One pod makes several times as many flows as there is room for."""
    ours = E / ip(4, dst=WORLD4) / UDP(sport=5, dport=53)
    answer = FROM_NODE / IP(src=WORLD4, dst=POD4) / UDP(sport=53, dport=5)
    unasked = FROM_NODE / IP(src=WORLD4, dst=POD4) / UDP(sport=54, dport=5)
    flood = bytearray(bytes(E / ip(4, dst=WORLD4) / UDP(sport=0, dport=99)))
    programs.enforce(POD, {}, ingress=True)
    assert programs.why(ours) == 0
    for number in range(3 * 4096):
        flood[34:36] = number.to_bytes(2, "big")
        assert programs.send(bytes(flood))[0] == OK
        if number % 256 == 0:
            assert programs.why(answer, receive=True) == 0, f"after {number} others"
            assert programs.why(unasked, receive=True) == 133
    assert len(programs.flows()) <= 4096


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
    assert seen_flags(programs) == [(0x13, 0x13)]  # FIN, SYN and ACK of either end
    assert out("A") == 0
    assert near(lifetime(programs), 10)
    assert out("S") == 0
    assert near(lifetime(programs), 60)
    assert seen_flags(programs) == [(0x02, 0)]


def seen_flags(programs: Programs) -> list[tuple[int, int]]:
    return [(flow.tx_flags, flow.rx_flags) for flow in programs.flows()]


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
