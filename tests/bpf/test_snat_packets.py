"""Masquerading of whatever is no plain packet: ICMP errors, fragments, every checksum, extension headers. Tier bpf."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from scapy.layers.inet import ICMP, IP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    fragment6,
)
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.packet import Packet, Raw
from snat_harness import GATEWAY, NODE, OTHER, POD, REMOTE, ROUTER, SECOND, Snat, ip, right
from snat_packets import FAMILIES, PORTS, echo, l4, reply, send
from test_snat import track

from ciliate.datapath import layout
from ciliate.datapath.layout import CT_FIRST_IN


def inside_error(family: int, packet: Packet, cut: int = 0) -> Packet:
    """An ICMP error about a packet, of which it has all or the first ``cut`` bytes of L4."""
    data = bytes(packet)
    if cut:
        data = data[: (20 if family == 4 else 40) + cut]
    if family == 4:
        return ICMP(type=3, code=4, nexthopmtu=1400) / Raw(data)
    return ICMPv6PacketTooBig(mtu=1400) / Raw(data)


def inner_of(family: int, packet: Packet) -> Packet:
    data = bytes(packet.payload)[8:]
    data += bytes(max(0, (40 if family == 4 else 60) - len(data)))  # of a cut one at least the ports can be read
    return IP(data) if family == 4 else IPv6(data)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [0, 8])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_an_error_about_a_pods_packet_reaches_the_pod(nat: Snat, family: int, protocol: str, cut: int) -> None:
    nat.out(send(family, protocol))
    sent = nat.out(send(family, protocol, OTHER))  # with another port
    error = ip(family, ROUTER[family], NODE[family]) / inside_error(family, sent, cut)
    after = nat.back(error)
    inner = inner_of(family, after)
    assert (after.src, after.dst) == (ROUTER[family], OTHER[family])
    assert (inner.src, inner.dst, inner.sport, inner.dport) == (OTHER[family], REMOTE[family], *PORTS)
    assert right(after), "the outer checksums"
    if not cut:
        assert right(inner), "the checksums inside"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_about_an_echo_reaches_the_pod(nat: Snat, family: int) -> None:
    nat.out(ip(family, POD[family], REMOTE[family]) / echo(family, 77))
    sent = nat.out(ip(family, OTHER[family], REMOTE[family]) / echo(family, 77))
    after = nat.back(ip(family, ROUTER[family], NODE[family]) / inside_error(family, sent))
    inner = inner_of(family, after)
    assert (after.dst, inner.src, inner.payload.id) == (OTHER[family], OTHER[family], 77)
    assert right(after)
    assert right(inner)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sender", ["pod", "node"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_an_error_that_a_pod_or_the_node_sends_is_understood_outside(
    nat: Snat, family: int, protocol: str, sender: str
) -> None:
    nat.out(send(family, protocol))
    port = nat.out(send(family, protocol, OTHER)).sport
    got = nat.back(reply(family, protocol, port))
    source = OTHER if sender == "pod" else NODE
    after = nat.out(ip(family, source[family], REMOTE[family]) / inside_error(family, got))
    inner = inner_of(family, after)
    assert (after.src, after.dst) == (NODE[family], REMOTE[family])
    assert (inner.src, inner.dst, inner.sport, inner.dport) == (REMOTE[family], NODE[family], PORTS[1], port)
    assert right(after)
    assert right(inner)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_about_others_go_on_as_they_are(nat: Snat, family: int) -> None:
    about_host = ip(family, NODE[family], REMOTE[family]) / l4("udp", *PORTS)
    nat.out(about_host)
    unknown = ip(family, NODE[family], REMOTE[family]) / l4("udp", 5, 6)
    for inner in (about_host, unknown):
        error = ip(family, ROUTER[family], NODE[family]) / inside_error(family, inner)
        assert bytes(nat.back(error)) == bytes(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_for_somebody_elses_address_is_not_turned_to_a_pod(nat: Snat, family: int) -> None:
    sent = nat.out(send(family, "udp"))
    error = ip(family, ROUTER[family], SECOND[family]) / inside_error(family, sent)
    assert bytes(nat.back(error)) == bytes(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pods_error_without_a_mapping_does_not_leave_by_the_pods_own_address(nat: Snat, family: int) -> None:
    """Neither about a flow that nobody knows, nor about another pod's; what came from outside to the pod itself may."""
    nat.out(send(family, "udp", OTHER))
    unknown = ip(family, REMOTE[family], POD[family]) / l4("udp", 80, 5000)
    others = ip(family, REMOTE[family], OTHER[family]) / l4("udp", *reversed(PORTS))
    for inner in (unknown, others):
        assert nat.why(ip(family, POD[family], REMOTE[family]) / inside_error(family, inner)) == 168
    track(nat, "ciliate_ct_any", 17, (REMOTE[family], 80), (POD[family], 5000), 60, CT_FIRST_IN)
    error = ip(family, POD[family], REMOTE[family]) / inside_error(family, unknown)
    assert bytes(nat.out(error)) == bytes(error)
    own = ip(family, GATEWAY[family], REMOTE[family]) / inside_error(family, unknown)
    assert bytes(nat.out(own)) == bytes(own), "the node's own complaint"


def fragments(packet: Packet, size: int = 64) -> list[Packet]:
    if isinstance(packet, IP):
        return list(fragment(IP(bytes(packet)), size))
    head = IPv6(src=packet.src, dst=packet.dst) / IPv6ExtHdrFragment(id=5) / packet.payload
    return list(fragment6(IPv6(bytes(head)), 40 + 8 + size))


def whole(family: int, parts: list[Packet]) -> Packet:
    """The packet of its fragments, as a receiver puts it together."""
    head = 20 if family == 4 else 48
    data = b"".join(bytes(part)[head:] for part in parts)
    first = parts[0]
    if family == 4:
        again = IP(src=first.src, dst=first.dst, id=first.id, proto=first.proto) / Raw(data)
    else:
        again = IPv6(src=first.src, dst=first.dst, nh=first.payload.nh) / Raw(data)
    return type(again)(bytes(again))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["udp", "echo"])
def test_later_fragments_follow_their_first(nat: Snat, family: int, protocol: str) -> None:
    def between(source: str, target: str, ports: tuple[int, int], number: int, answer: bool) -> Packet:
        body = UDP(sport=ports[0], dport=ports[1]) if protocol == "udp" else echo(family, number, answer)
        if protocol == "udp" or family == 4:
            return ip(family, source, target) / body / Raw(bytes(range(200)))
        body.data = bytes(range(200))
        return ip(family, source, target) / body

    nat.out(between(POD[family], REMOTE[family], PORTS, 77, False))
    sent = [nat.out(part) for part in fragments(between(OTHER[family], REMOTE[family], PORTS, 77, False))]
    assert len(sent) > 2
    assert {part.src for part in sent} == {NODE[family]}
    together = whole(family, sent)
    assert right(together)
    port = together.sport if protocol == "udp" else together.payload.id
    assert port not in (PORTS[0], 77)
    answer = between(REMOTE[family], NODE[family], (PORTS[1], port), port, True)
    got = [nat.back(part) for part in fragments(answer)]
    assert {part.dst for part in got} == {OTHER[family]}
    together = whole(family, got)
    assert right(together)
    assert (together.dport if protocol == "udp" else together.payload.id) in (PORTS[0], 77)


def test_a_later_fragment_without_its_first_is_left_to_the_stack(nat: Snat) -> None:
    nat.out(send(4, "udp"))
    part = fragments(ip(4, REMOTE[4], NODE[4]) / UDP(sport=PORTS[1], dport=PORTS[0]) / Raw(bytes(200)))[1]
    assert bytes(nat.back(part)) == bytes(part)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_told_does_not_leave_with_a_pods_address(nat: Snat, family: int) -> None:
    """A fragment whose first part is not known, and what neither endpoints nor we can masquerade."""
    unknown = fragments(ip(family, OTHER[family], REMOTE[family]) / UDP(sport=1, dport=2) / Raw(bytes(300)))[1]
    protocol = ip(family, OTHER[family], REMOTE[family], **{"proto" if family == 4 else "nh": 47}) / Raw(bytes(20))
    for packet in (unknown, protocol):
        assert nat.why(packet) == 168
        packet.dst = POD[family]
        assert nat.why(packet) == 0
        packet.src, packet.dst = NODE[family], REMOTE[family]
        assert nat.why(packet) == 0
    nat.reset(active=False)
    protocol.src = OTHER[family]
    assert nat.why(protocol) == 0


def test_fragmented_sctp_goes_where_the_port_stays_and_is_refused_where_it_cannot(nat: Snat) -> None:
    def packet(pod: str) -> Packet:
        return ip(4, pod, REMOTE[4]) / SCTP(sport=PORTS[0], dport=PORTS[1]) / SCTPChunkData(data=bytes(200))

    assert {part.src for part in map(nat.out, fragments(packet(POD[4])))} == {NODE[4]}
    assert nat.why(fragments(packet(OTHER[4]))[0]) == 168


def test_sctp_whose_checksum_is_left_to_the_device_keeps_it_so(nat: Snat) -> None:
    nat.out(send(4, "sctp"))
    after = nat.out(
        ip(4, OTHER[4], REMOTE[4]) / SCTP(sport=PORTS[0], dport=PORTS[1], chksum=0) / SCTPChunkData(data=b"x")
    )
    assert after.sport != PORTS[0]
    assert after[SCTP].chksum == 0


@pytest.mark.parametrize("size", [0, 1, 3, 100, 1400])
def test_the_checksum_of_sctp_is_right_for_every_length(nat: Snat, size: int) -> None:
    nat.out(send(4, "sctp"))
    after = nat.out(
        ip(4, OTHER[4], REMOTE[4]) / SCTP(sport=PORTS[0], dport=PORTS[1]) / Raw((bytes(range(256)) * 6)[:size])
    )
    assert after.sport != PORTS[0]
    assert right(after)


def test_udp_without_a_checksum_stays_without(nat: Snat) -> None:
    nat.out(send(4, "udp"))
    after = nat.out(ip(4, OTHER[4], REMOTE[4]) / UDP(sport=PORTS[0], dport=PORTS[1], chksum=0) / b"hello")
    assert (after.src, after[UDP].chksum) == (NODE[4], 0)
    assert after.sport != PORTS[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checksum_that_becomes_zero_is_sent_as_all_ones(nat: Snat, family: int) -> None:
    # the payload makes up for everything else, so that the translated packet sums up to zero
    base = ip(family, NODE[family], REMOTE[family]) / UDP(sport=PORTS[0], dport=PORTS[1]) / Raw(b"\0\0")
    payload = type(base)(bytes(base))[UDP].chksum
    sent = (
        ip(family, POD[family], REMOTE[family]) / UDP(sport=PORTS[0], dport=PORTS[1]) / Raw(payload.to_bytes(2, "big"))
    )
    assert nat.out(sent)[UDP].chksum == 0xFFFF


def test_ipv6_behind_extension_headers(nat: Snat) -> None:
    nat.out(send(6, "udp"))
    after = nat.out(IPv6(src=OTHER[6], dst=REMOTE[6]) / IPv6ExtHdrDestOpt() / l4("udp", *PORTS))
    assert after.src == NODE[6]
    assert after[UDP].sport != PORTS[0]
    assert right(after)


@pytest.mark.parametrize(
    ("family", "packet"),
    [(4, ICMP(type=13)), (6, ICMPv6EchoReply(id=5)), (4, ICMP(type=0, id=5)), (6, Raw(b"\x8a" + bytes(15)))],
)
def test_icmp_that_cannot_be_answered_is_refused_and_counted(nat: Snat, family: int, packet: Packet) -> None:
    fields = {"nh": 58} if family == 6 else {}
    assert nat.why(ip(family, OTHER[family], REMOTE[family], **fields) / packet) == 168
    assert nat.mappings() == []


def test_neighbour_discovery_and_arp_are_left_alone(nat: Snat) -> None:
    packet = IPv6(src=NODE[6], dst=ROUTER[6], nh=58) / Raw(b"\x87" + bytes(23))
    assert bytes(nat.out(packet)) == bytes(packet)
    assert nat.run("to_netdev", Ether(type=0x806) / Raw(bytes(46)))[0] == 0xFFFFFFFF


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_of_another_node_cannot_complain_of_what_was_not_sent_to_it(nat: Snat, family: int) -> None:
    """Routers may send errors about any flow; a pod that did would cut the path MTU of other pods' flows."""
    sent = nat.out(send(family, "udp"))
    far = {4: "10.201.0.9", 6: "fd00:c11:a7f::9"}[family]
    key = layout.ipcache_key(ip_network(far))
    nat.maps["ciliate_ipcache"].update(key, layout.ipcache_entry(500))
    try:
        error = ip(family, far, NODE[family]) / inside_error(family, sent)
        assert bytes(nat.back(error)) == bytes(error)
    finally:
        nat.maps["ciliate_ipcache"].delete(key)
    after = nat.back(ip(family, far, NODE[family]) / inside_error(family, sent))
    assert after.dst == POD[family], "the same from an address that is no pod's"
