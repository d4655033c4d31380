"""Packets to and from other nodes through the programs of tunnels, as tables, in both builds. Tier bpf."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from bpf_harness import (
    CIDR4,
    CIDR_ID,
    HOST_ID,
    NODE4,
    NODE6,
    OK,
    PEER4,
    PEER6,
    PEER_ID,
    POD,
    POD4,
    POD6,
    POD_ID,
    POD_MAC,
    REDIRECT,
    ROUTER4,
    ROUTER6,
    SHOT,
    WORLD4,
    WORLD6,
    WORLD_ID,
)
from frames import ALLOW, FROM_NODE, E, ip
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6ND_RS, ICMPv6TimeExceeded, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw
from tunnel_harness import (
    NODE,
    NODE_V6,
    PORT,
    REMOTE4,
    REMOTE6,
    REMOTE_HOST_ID,
    REMOTE_ID,
    REMOTE_ROUTER4,
    REMOTE_ROUTER6,
    THIRD,
    UNKNOWN4,
    UNKNOWN6,
    TunnelPrograms,
    build_or_skip,
    wrapped,
)

from ciliate.datapath import layout
from ciliate.policy.mapstate import INGRESS, PolicyKey

FAMILIES = [4, 6]
MAGIC, IDENTITY_MARK, OVERLAY_MARK = 0xF00, 0xF00, 0x400
KUBERNETES = 0xC000


def of(family: int, four: str, six: str) -> str:
    return four if family == 4 else six


def marked(identity: int, magic: int = IDENTITY_MARK) -> int:
    """A mark that says who sent a packet (inventory 1.11)."""
    return (identity & 0xFFFF) << 16 | magic | identity >> 16


@pytest.fixture(scope="module", params=["global", "inline"])
def functions(request: pytest.FixtureRequest) -> str:
    """The build of the programs."""
    return build_or_skip(request.param)


def loaded(programs: TunnelPrograms) -> Iterator[TunnelPrograms]:
    yield programs
    programs.close()


@pytest.fixture(scope="module")
def endpoints(templates: Path, functions: str) -> Iterator[TunnelPrograms]:
    yield from loaded(TunnelPrograms(templates, "endpoint", functions))


@pytest.fixture(scope="module")
def hosts(templates: Path, functions: str) -> Iterator[TunnelPrograms]:
    yield from loaded(TunnelPrograms(templates, "host", functions))


@pytest.fixture(scope="module")
def overlays(templates: Path, functions: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TunnelPrograms]:
    source = wrapped(tmp_path_factory.mktemp("wrapper") / "c")
    yield from loaded(TunnelPrograms(templates, "test_overlay", functions, source))


@pytest.fixture
def endpoint(endpoints: TunnelPrograms) -> TunnelPrograms:
    endpoints.reset()
    return endpoints


@pytest.fixture
def host(hosts: TunnelPrograms) -> TunnelPrograms:
    hosts.reset()
    return hosts


@pytest.fixture
def overlay(overlays: TunnelPrograms) -> TunnelPrograms:
    overlays.reset()
    return overlays


# what pods send


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("node", [NODE, NODE_V6])
def test_a_packet_to_another_node_is_redirected_into_the_tunnel(
    endpoint: TunnelPrograms, family: int, known: bool, node: str
) -> None:
    endpoint.know(node)
    target = of(family, REMOTE4, REMOTE6) if known else of(family, UNKNOWN4, UNKNOWN6)
    packet = E / ip(family, dst=target, ttl=64) / TCP(dport=80)
    result, data, mark = endpoint.run("from_container", packet)
    assert result == REDIRECT
    assert mark & MAGIC == OVERLAY_MARK
    after = Ether(data)
    assert (after.ttl if family == 4 else after.hlim) == 63, "the node is the hop"
    assert (after.src, after.dst) == (packet.src, packet.dst)
    del after.chksum
    assert bytes(Ether(bytes(after))) == data, "the checksum was kept right"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packet_whose_ttl_ends_here_is_answered(endpoint: TunnelPrograms, family: int) -> None:
    packet = E / ip(family, dst=of(family, REMOTE4, REMOTE6), ttl=1) / UDP(dport=53) / Raw(b"x" * 40)
    result, data, _ = endpoint.run("from_container", packet)
    answer = Ether(data)
    assert result == REDIRECT
    if family == 4:
        assert (answer[IP].src, answer[ICMP].type) == (ROUTER4, 11)
    else:
        assert answer[IPv6].src == ROUTER6
        assert answer.haslayer(ICMPv6TimeExceeded)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", [0, KUBERNETES, KUBERNETES | 0x0A00])
def test_what_goes_to_the_stack_says_who_sent_it_and_keeps_others_bits(
    endpoint: TunnelPrograms, family: int, before: int
) -> None:
    packet = E / ip(family, dst=of(family, WORLD4, WORLD6)) / TCP(dport=80)
    result, _, mark = endpoint.run("from_container", packet, before)
    assert (result, mark) == (OK, marked(POD_ID) | before & KUBERNETES)


@pytest.mark.parametrize(
    ("target", "port", "reason"),
    [
        (NODE, PORT, 197),
        (NODE, PORT + 1, 0),
        (WORLD4, PORT, 197),
        (CIDR4, PORT, 197),
        (NODE4, PORT, 197),
        (NODE_V6, PORT, 197),
        (REMOTE4, PORT, 0),
        (PEER4, PORT, 0),
    ],
)
def test_no_pod_makes_tunnel_packets(endpoint: TunnelPrograms, target: str, port: int, reason: int) -> None:
    """Masqueraded they would be this node's, with any identity in them."""
    before = endpoint.reasons()
    inside = E / ip(4, src=POD4, dst=REMOTE4) / UDP(dport=80)
    family = 6 if ":" in target else 4
    packet = E / ip(family, dst=target) / UDP(sport=4000, dport=port) / VXLAN(vni=HOST_ID) / inside
    assert (endpoint.run("from_container", packet)[0] == SHOT) == bool(reason)
    assert endpoint.reason(before) == reason


def test_a_pod_of_this_node_is_reached_without_the_tunnel(endpoint: TunnelPrograms) -> None:
    result, _, mark = endpoint.run("from_container", E / ip(4, dst=PEER4) / TCP(dport=80))
    assert (result, mark) == (REDIRECT, 0)


# what reaches pods through the stack

SENDERS: list[tuple[str, str, str, int, int, int]] = [
    # what, source, source6, mark, device it came from, who it is
    ("a mark", WORLD4, WORLD6, marked(777), 1, 777),
    ("a mark of 24 bits", WORLD4, WORLD6, marked(0xABCDEF), 1, 0xABCDEF),
    ("a mark beside those of Kubernetes", WORLD4, WORLD6, marked(777) | KUBERNETES, 1, 777),
    ("a proxy for ingress", WORLD4, WORLD6, marked(777, 0xA00), 0, 777),
    ("a proxy for egress", WORLD4, WORLD6, marked(777, 0xB00), 0, 777),
    ("decrypted", WORLD4, WORLD6, marked(777, 0xD00) | 0x3000, 1, 777),
    ("the host by its mark", WORLD4, WORLD6, 0xC00, 1, HOST_ID),
    ("a mark of Kubernetes alone", WORLD4, WORLD6, 0x4000, 1, WORLD_ID),
    ("the host itself", WORLD4, WORLD6, 0, 0, HOST_ID),
    ("a foreign mark on the host itself", WORLD4, WORLD6, 0x12340400, 0, HOST_ID),
    ("world", WORLD4, WORLD6, 0, 1, WORLD_ID),
    ("a prefix", CIDR4, "2001:db8:1::7", 0, 1, CIDR_ID),
    ("the node's address from elsewhere", NODE4, NODE6, 0, 1, WORLD_ID),
    ("a pod of this node", PEER4, PEER6, 0, 1, PEER_ID),
    ("a pod of another node past the tunnel", REMOTE4, REMOTE6, 0, 1, WORLD_ID),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", SENDERS, ids=lambda case: case[0])
def test_who_sent_a_packet(endpoint: TunnelPrograms, family: int, case: tuple[str, str, str, int, int, int]) -> None:
    _, four, six, mark, device, identity = case
    packet = FROM_NODE / ip(family, of(family, four, six), of(family, POD4, POD6)) / TCP(dport=80)
    endpoint.enforce(POD, {PolicyKey(INGRESS, identity, 6, 80, 16): ALLOW}, ingress=True)
    assert endpoint.run("to_container", packet, mark, device)[0] == OK
    endpoint.flush()
    endpoint.enforce(POD, {PolicyKey(INGRESS, identity + 1, 6, 80, 16): ALLOW}, ingress=True)
    assert endpoint.run("to_container", packet, mark, device)[0] == SHOT


# what the node itself sends


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("four", "six"), [(REMOTE4, REMOTE6), (UNKNOWN4, UNKNOWN6), (REMOTE_ROUTER4, REMOTE_ROUTER6)])
def test_the_node_reaches_other_nodes_pods(host: TunnelPrograms, family: int, four: str, six: str) -> None:
    packet = FROM_NODE / ip(family, of(family, ROUTER4, ROUTER6), of(family, four, six), ttl=1) / TCP(dport=80)
    result, data, mark = host.run("from_host", packet, ingress_ifindex=0)
    assert (result, data) == (REDIRECT, bytes(packet))
    assert mark & MAGIC == OVERLAY_MARK


NOT_SENT: list[tuple[str, Packet, int]] = [
    ("world", IP(src=ROUTER4, dst=WORLD4) / TCP(), 160),
    ("a pod of this node", IP(src=ROUTER4, dst=PEER4) / TCP(), 160),
    ("world, IPv6", IPv6(src=ROUTER6, dst=WORLD6) / TCP(), 160),
    ("ARP", ARP(pdst=REMOTE4), 190),
    ("router solicitation", IPv6(src=ROUTER6, dst="ff02::2") / ICMPv6ND_RS(), 190),
    ("no IP at all", Raw(b"\0" * 40), 166),
    ("a header too short", IP(src=ROUTER4, dst=REMOTE4, proto=6, len=28) / Raw(b"12345678"), 135),
]


@pytest.mark.parametrize("case", NOT_SENT, ids=lambda case: case[0])
def test_what_the_router_device_drops(host: TunnelPrograms, case: tuple[str, Packet, int]) -> None:
    _, inner, reason = case
    before = host.reasons()
    frame = Ether(src=POD_MAC, dst=POD_MAC, **({"type": 0x88B5} if isinstance(inner, Raw) else {})) / inner
    assert host.run("from_host", frame, ingress_ifindex=0)[0] == SHOT
    assert host.reason(before) == reason


# what comes out of the tunnel


def inner(family: int, source: str = "", target: str = "", **fields: Any) -> Packet:
    return FROM_NODE / ip(family, source or of(family, REMOTE4, REMOTE6), target or of(family, POD4, POD6), **fields)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("node", [NODE, NODE_V6])
def test_the_tunnel_key_says_who_it_is(overlay: TunnelPrograms, family: int, node: str) -> None:
    key = PolicyKey(INGRESS, 0xABCDE, 6, 80, 16)
    overlay.enforce(POD, {key: ALLOW}, ingress=True)
    packet = inner(family, ttl=1) / TCP(dport=80)
    result, data, _ = overlay.unwrapped(packet, 0xABCDE, node)
    assert result == REDIRECT
    after = Ether(data)
    assert (after.dst, after.ttl if family == 4 else after.hlim) == (POD_MAC, 1), "the other node was the hop"
    before = overlay.reasons()
    assert overlay.unwrapped(inner(family) / TCP(dport=80, sport=1), 0xABCDF, node)[0] == SHOT
    assert overlay.reason(before) == 133


REFUSED: list[tuple[str, str, str, int, str | None, int]] = [
    # what, source, target, VNI, node, reason
    ("no tunnel key", REMOTE4, POD4, REMOTE_ID, None, 147),
    ("an unknown node", REMOTE4, POD4, REMOTE_ID, "192.0.2.66", 194),
    ("an unknown node over IPv6", REMOTE4, POD4, REMOTE_ID, "2001:db8:ff::66", 194),
    ("a known address mapped into IPv6", REMOTE4, POD4, REMOTE_ID, "::ffff:192.0.2.66", 194),
    ("no identity", REMOTE4, POD4, 0, NODE, 195),
    ("another address of this node as sender", NODE4, POD4, REMOTE_ID, NODE, 132),
    ("another address of this node as sender, IPv6", NODE6, POD6, HOST_ID, NODE_V6, 132),
    ("a pod of another node as sender", REMOTE4, POD4, REMOTE_ID, THIRD, 132),
    ("a pod of another node as sender, IPv6", REMOTE6, POD6, REMOTE_ID, THIRD, 132),
    ("another node as sender", REMOTE_ROUTER4, POD4, HOST_ID, THIRD, 132),
    ("a pod of this node as sender", PEER4, POD4, PEER_ID, NODE, 132),
    ("this node as sender", ROUTER4, POD4, HOST_ID, NODE, 132),
    ("the receiver as sender", POD4, POD4, POD_ID, NODE, 132),
    ("a pod of this node as sender, IPv6", PEER6, POD6, PEER_ID, NODE, 132),
    ("this node as sender, IPv6", ROUTER6, POD6, REMOTE_ID, NODE, 132),
    ("a pod that nobody has", REMOTE4, "10.5.0.77", REMOTE_ID, NODE, 152),
    ("a pod that nobody has, IPv6", REMOTE6, "fd05::77", REMOTE_ID, NODE, 152),
    ("a pod of that node", REMOTE4, UNKNOWN4, REMOTE_ID, NODE, 152),
    ("a pod of another node", REMOTE4, REMOTE4, REMOTE_ID, NODE, 151),
    ("a prefix outside", REMOTE4, CIDR4, REMOTE_ID, NODE, 151),
    ("an address of the node's that is not for pods", REMOTE4, NODE4, REMOTE_ID, NODE, 151),
    ("nowhere", REMOTE4, "0.0.0.0", REMOTE_ID, NODE, 152),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_what_is_refused_out_of_the_tunnel(
    overlay: TunnelPrograms, case: tuple[str, str, str, int, str | None, int]
) -> None:
    _, source, target, identity, node, reason = case
    family = 6 if ":" in source else 4
    before = overlay.reasons()
    result, _, _ = overlay.unwrapped(inner(family, source, target) / TCP(dport=80), identity, node)
    assert (result, overlay.reason(before)) == (SHOT, reason)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (Ether(dst=POD_MAC) / ARP(pdst=POD4), 166),
        (FROM_NODE / IP(src=REMOTE4, dst=POD4, proto=6, len=28) / Raw(b"12345678"), 135),
        (FROM_NODE / IP(src=REMOTE4, dst=POD4, len=400) / TCP(), 134),
        (FROM_NODE / IP(src=REMOTE4, dst=POD4, proto=47) / Raw(b"x" * 20), 137),
        (FROM_NODE / IP(src=REMOTE4, dst=POD4, frag=100, proto=17) / Raw(b"x" * 20), 157),
    ],
)
def test_malformed_packets_out_of_the_tunnel(overlay: TunnelPrograms, frame: Packet, reason: int) -> None:
    before = overlay.reasons()
    assert overlay.unwrapped(frame, REMOTE_ID)[0] == SHOT
    assert overlay.reason(before) == reason


HOSTS = [
    # source of what a node says it sent itself, and who that is
    (REMOTE_ROUTER4, REMOTE_ROUTER6, REMOTE_HOST_ID),
    (REMOTE4, REMOTE6, REMOTE_ID),
    (UNKNOWN4, UNKNOWN6, WORLD_ID),
    (WORLD4, WORLD6, WORLD_ID),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("four", "six", "identity"), HOSTS)
@pytest.mark.parametrize("claimed", [HOST_ID, 4, 5, 99], ids=["host", "health", "init", "unused"])
def test_who_claims_to_be_reserved_is_who_the_ipcache_says_and_never_this_node(
    overlay: TunnelPrograms, family: int, four: str, six: str, identity: int, claimed: int
) -> None:
    source = of(family, four, six)
    packet = inner(family, source) / TCP(dport=80)
    overlay.enforce(POD, {PolicyKey(INGRESS, identity, 6, 80, 16): ALLOW}, ingress=True)
    assert overlay.unwrapped(packet, claimed)[0] == REDIRECT
    overlay.flush()
    overlay.enforce(POD, {PolicyKey(INGRESS, claimed, 6, 80, 16): ALLOW}, ingress=True)
    assert overlay.unwrapped(packet, claimed)[0] == SHOT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("identity", [REMOTE_ID, WORLD_ID, 0xFFFFFF])
def test_what_is_for_the_node_goes_to_its_stack_with_the_senders_mark(
    overlay: TunnelPrograms, family: int, identity: int
) -> None:
    packet = inner(family, target=of(family, ROUTER4, ROUTER6)) / TCP(dport=80)
    result, data, mark = overlay.unwrapped(packet, identity)
    assert (result, data, mark) == (OK, bytes(packet), marked(identity))


def test_a_pod_that_is_reached_through_the_stack_gets_its_packets_there(overlay: TunnelPrograms) -> None:
    for text in (PEER4, PEER6):
        overlay.maps["ciliate_lxc"].delete(layout.endpoint_key(ip_address(text)))
    result, _, mark = overlay.unwrapped(inner(4, target=PEER4) / TCP(dport=80), REMOTE_ID)
    assert (result, mark) == (OK, marked(REMOTE_ID))


def test_a_flow_of_another_node_is_tracked_at_its_receiver(overlay: TunnelPrograms) -> None:
    overlay.enforce(POD, {PolicyKey(INGRESS, REMOTE_ID, 6, 80, 16): ALLOW}, ingress=True)
    assert overlay.unwrapped(inner(4) / TCP(sport=4000, dport=80, flags="S"), REMOTE_ID)[0] == REDIRECT
    assert [(flow.endpoint, flow.peer_identity) for flow in overlay.flows()] == [(POD, REMOTE_ID)]


@pytest.mark.parametrize("family", FAMILIES)
def test_another_nodes_pod_cannot_complain_of_what_it_never_got(overlay: TunnelPrograms, family: int) -> None:
    about = ip(family, of(family, POD4, POD6), of(family, WORLD4, WORLD6)) / TCP(dport=80)
    error = ICMP(type=3, code=4) if family == 4 else ICMPv6DestUnreach(type=2)
    before = overlay.reasons()
    assert overlay.unwrapped(inner(family) / error / about, REMOTE_ID)[0] == SHOT
    assert overlay.reason(before) == 187


CLAIMED = [("asked", "A"), ("asks", "A"), ("asks", "R")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("role", "flags"), CLAIMED)
def test_a_pod_of_another_node_that_does_not_come_through_the_tunnel_is_part_of_no_flow(
    endpoint: TunnelPrograms, family: int, role: str, flags: str
) -> None:
    """Neither as an answer, nor so that the flow ends; as its node's own packets it passes where the world may."""
    me, remote = of(family, POD4, POD6), of(family, REMOTE4, REMOTE6)
    endpoint.enforce(POD, {PolicyKey(INGRESS, REMOTE_ID, 6, 80, 16): ALLOW}, ingress=True)
    sport, dport = (4000, 80) if role == "asks" else (80, 4000)
    theirs = FROM_NODE / ip(family, remote, me) / TCP(sport=sport, dport=dport, flags=flags)
    mark = marked(REMOTE_ID)
    if role == "asks":
        assert endpoint.run("to_container", theirs, mark)[0] == OK
    else:
        endpoint.send(E / ip(family, me, remote) / TCP(sport=dport, dport=sport, flags="S"))
    before = endpoint.reasons()
    assert endpoint.run("to_container", theirs)[0] == SHOT
    assert endpoint.reason(before) == (133 if role == "asks" else 132)
    assert endpoint.run("to_container", theirs, mark)[0] == OK, "the flow goes on"
    endpoint.flush()
    endpoint.enforce(POD, {PolicyKey(INGRESS, WORLD_ID, 6, 80, 16): ALLOW}, ingress=True)
    if role == "asks":
        assert endpoint.run("to_container", theirs)[0] == OK
