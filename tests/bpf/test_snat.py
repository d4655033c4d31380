"""Masquerading packet by packet: every protocol, both families, errors, fragments, collisions, exhaustion. Tier bpf."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    fragment6,
)
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.packet import Packet, Raw
from snat_harness import ENDPOINT, NODE, OTHER, POD, REMOTE, ROUTER, SECOND, Snat, ip, right

from ciliate.datapath import layout, snat
from ciliate.datapath.layout import CT_ENTRY, CT_FIRST_IN, CT_FIRST_OUT, CT_KEY

FAMILIES = [4, 6]
PORTS = (40000, 443)


@pytest.fixture(scope="module", params=["auto", "inline"])
def loaded(request: pytest.FixtureRequest, templates: Path) -> Iterator[Snat]:
    programs = Snat(templates, request.param)
    yield programs
    programs.close()


@pytest.fixture
def nat(loaded: Snat) -> Snat:
    loaded.reset()
    return loaded


def l4(protocol: str, source: int, target: int, **fields: Any) -> Packet:
    """A packet of a protocol between two ports, with something in it."""
    if protocol == "tcp":
        return TCP(sport=source, dport=target, **{"flags": "S", **fields}) / b"hello"
    if protocol == "udp":
        return UDP(sport=source, dport=target, **fields) / b"hello"
    return SCTP(sport=source, dport=target, tag=7) / SCTPChunkData(data=b"hello world!")


def send(
    family: int, protocol: str, pod: dict[int, str] = POD, ports: tuple[int, int] = PORTS, **fields: Any
) -> Packet:
    return ip(family, pod[family], REMOTE[family]) / l4(protocol, *ports, **fields)


def reply(family: int, protocol: str, port: int, remote: dict[int, str] = REMOTE, **fields: Any) -> Packet:
    fields = {"flags": "SA", **fields} if protocol == "tcp" else fields
    return ip(family, remote[family], NODE[family]) / l4(protocol, PORTS[1], port, **fields)


def echo(family: int, number: int, answer: bool = False) -> Packet:
    if family == 4:
        return ICMP(type=0 if answer else 8, id=number, seq=3) / b"hello"
    return (ICMPv6EchoReply if answer else ICMPv6EchoRequest)(id=number, seq=3, data=b"hello")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_a_flow_keeps_its_port_and_gets_the_nodes_address(nat: Snat, family: int, protocol: str) -> None:
    after = nat.out(send(family, protocol))
    assert (after.src, after.dst, after.sport, after.dport) == (NODE[family], REMOTE[family], *PORTS)
    assert right(after)
    answer = nat.back(reply(family, protocol, after.sport))
    assert (answer.src, answer.dst, answer.sport, answer.dport) == (REMOTE[family], POD[family], *reversed(PORTS))
    assert right(answer)
    (mapping,) = nat.mappings()
    assert (str(mapping.source), mapping.source_port) == (POD[family], PORTS[0])
    assert (str(mapping.node), mapping.node_port) == (NODE[family], PORTS[0])
    assert (str(mapping.remote), mapping.remote_port, mapping.host) == (REMOTE[family], PORTS[1], False)
    assert 0 <= time.monotonic() - mapping.created < 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_a_taken_port_is_replaced_and_every_answer_finds_its_pod(nat: Snat, family: int, protocol: str) -> None:
    first, second = nat.out(send(family, protocol)), nat.out(send(family, protocol, OTHER))
    assert first.sport == PORTS[0]
    assert second.sport != PORTS[0]
    assert 1024 <= second.sport <= 65535
    assert right(second)
    assert nat.out(send(family, protocol, OTHER)).sport == second.sport, "a flow keeps its mapping"
    for pod, port in ((POD, first.sport), (OTHER, second.sport)):
        answer = nat.back(reply(family, protocol, port))
        assert (answer.dst, answer.dport) == (pod[family], PORTS[0])
        assert right(answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_echoes_keep_their_identifier_where_it_is_free(nat: Snat, family: int) -> None:
    found = []
    for pod in (POD, OTHER):
        after = nat.out(ip(family, pod[family], REMOTE[family]) / echo(family, 77))
        assert after.src == NODE[family]
        assert right(after)
        found.append(after.payload.id)
    assert found[0] == 77
    assert found[1] != 77
    for pod, number in zip((POD, OTHER), found, strict=True):
        answer = nat.back(ip(family, REMOTE[family], NODE[family]) / echo(family, number, answer=True))
        assert (answer.dst, answer.payload.id) == (pod[family], 77)
        assert right(answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_port_serves_many_remotes(nat: Snat, family: int) -> None:
    assert nat.out(send(family, "udp")).sport == PORTS[0]
    elsewhere = ip(family, OTHER[family], SECOND[family]) / l4("udp", *PORTS)
    assert nat.out(elsewhere).sport == PORTS[0]
    assert nat.back(reply(family, "udp", PORTS[0])).dst == POD[family]
    assert nat.back(reply(family, "udp", PORTS[0], SECOND)).dst == OTHER[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_masqueraded(nat: Snat, family: int) -> None:
    for packet in (
        ip(family, POD[family], OTHER[family]) / l4("tcp", *PORTS),  # pods among each other
        ip(family, ROUTER[family], REMOTE[family]) / l4("tcp", *PORTS),  # what the node forwards for others
    ):
        assert bytes(nat.out(packet)) == bytes(packet)
    assert nat.mappings() == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("port", [22, 80, 2222, 40000, 65535])
def test_what_arrives_without_a_mapping_goes_on_to_the_stack(nat: Snat, family: int, port: int) -> None:
    packet = ip(family, ROUTER[family], NODE[family]) / l4("tcp", 50000, port)
    assert bytes(nat.back(packet)) == bytes(packet)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_a_flow_of_the_node_keeps_its_tuple_and_pods_keep_off(nat: Snat, family: int, protocol: str) -> None:
    own = ip(family, NODE[family], REMOTE[family]) / l4(protocol, *PORTS)
    assert bytes(nat.out(own)) == bytes(own)
    assert [mapping.host for mapping in nat.mappings()] == [True]
    assert nat.out(send(family, protocol)).sport != PORTS[0]
    answer = reply(family, protocol, PORTS[0])
    assert bytes(nat.back(answer)) == bytes(answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_of_the_node_on_a_pods_port_is_given_another(nat: Snat, family: int) -> None:
    nat.out(send(family, "udp"))
    own = nat.out(ip(family, NODE[family], REMOTE[family]) / l4("udp", *PORTS))
    assert own.sport != PORTS[0]
    assert right(own)
    answer = nat.back(reply(family, "udp", own.sport))
    assert (answer.dst, answer.dport) == (NODE[family], PORTS[0])
    assert nat.back(reply(family, "udp", PORTS[0])).dst == POD[family]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("protocol", "kind"), [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)])
def test_a_port_on_which_the_node_listens_is_never_given_to_a_pod(
    nat: Snat, family: int, protocol: str, kind: socket.SocketKind
) -> None:
    with nat.listen(kind, "0.0.0.0" if family == 4 else "::", PORTS[0]):
        after = nat.out(send(family, protocol))
    assert after.sport != PORTS[0]
    incoming = reply(family, protocol, PORTS[0], flags="S") if protocol == "tcp" else reply(family, protocol, PORTS[0])
    assert bytes(nat.back(incoming)) == bytes(incoming)


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


def track(
    nat: Snat, table: str, proto: int, begins: tuple[str, int], other: tuple[str, int], seconds: int, first: int
) -> bytes:
    """Enter a flow as a pod's end has it, which began it (CT_FIRST_OUT) or not."""
    key = layout.conntrack_key(proto, *((ip_address(address), port) for address, port in (begins, other)))
    pods = {layout.to_mapped(ip_address(text)) for text in POD.values()}
    ends = [(0, 0, 0, 0, ENDPOINT, first) if part in pods else (0,) * 6 for part in CT_KEY.unpack(key)[:2]]
    value = (int(time.monotonic()) + seconds, 0, 0, bytes(2), 0, *ends[0], *ends[1], 0, 0, 0, 0)
    nat.maps[table].update(key, CT_ENTRY.pack(*value))
    return key


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_to_flows_from_outside_keep_the_pods_address(nat: Snat, family: int) -> None:
    for proto, table, packet, ports in (
        (6, "ciliate_ct_tcp", l4("tcp", 80, 5000, flags="SA"), (5000, 80)),
        (17, "ciliate_ct_any", l4("udp", 80, 5000), (5000, 80)),
        (1 if family == 4 else 58, "ciliate_ct_any", echo(family, 9, True), (0, 9)),
    ):
        track(nat, table, proto, (REMOTE[family], ports[0]), (POD[family], ports[1]), 60, CT_FIRST_IN)
        packet = ip(family, POD[family], REMOTE[family]) / packet
        assert bytes(nat.out(packet)) == bytes(packet)
    assert nat.mappings() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drained_engine_serves_its_mappings_and_makes_none(nat: Snat, family: int) -> None:
    nat.out(send(family, "tcp"))
    nat.device(active=False)
    assert nat.out(send(family, "tcp")).src == NODE[family]
    assert nat.back(reply(family, "tcp", PORTS[0])).dst == POD[family]
    new = send(family, "tcp", OTHER)
    assert bytes(nat.out(new)) == bytes(new)


def test_exhaustion_is_bounded_counted_and_passes(nat: Snat) -> None:
    """65,535 flows of one remote and port: 64,512 ports can be had by search, the rest by luck of keeping one's own."""
    template = send(4, "udp")
    data = bytearray(bytes(Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01") / template))
    ports, dropped = set(), 0
    for port in range(1, 65536):
        data[34:36] = port.to_bytes(2, "big")
        data[40:42] = b"\0\0"
        result, after = nat.raw("to_netdev", bytes(data))
        if result == 2:
            dropped += 1
        else:
            ports.add(after[34:36])
    assert dropped == 0, "every port is free for the first pod"
    assert len(ports) == 65535
    before = nat.reasons().get((167, 1), 0)
    assert nat.why(send(4, "udp", OTHER, (9, PORTS[1]))) == 167
    assert nat.reasons()[167, 1] == before + 1
    assert nat.out(ip(4, OTHER[4], SECOND[4]) / l4("udp", *PORTS)).sport == PORTS[0], "another remote is not concerned"
    assert nat.out(send(4, "udp", POD, (4711, PORTS[1]))).sport == 4711, "flows that have a mapping go on"
    gone = next(item for item in nat.mappings() if item.node_port == 9)
    nat.table.delete_many(snat.halves(gone))
    assert nat.out(send(4, "udp", OTHER, (9, PORTS[1]))).sport == 9


def test_a_dead_mapping_gives_its_port_away(nat: Snat) -> None:
    nat.out(send(4, "udp"))
    (mapping,) = nat.mappings()
    over = mapping._replace(lifetime=int(time.monotonic()) - 5)
    for key, value in zip(snat.halves(mapping), snat._values(over), strict=True):
        nat.table.update(key, value)
    assert nat.out(send(4, "udp", OTHER)).sport == PORTS[0]
    assert [str(item.source) for item in nat.mappings()] == [OTHER[4]]


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_the_table_evicted_comes_back(nat: Snat, half: int) -> None:
    nat.out(send(4, "udp"))
    port = nat.out(send(4, "udp", OTHER)).sport
    mapping = next(item for item in nat.mappings() if str(item.source) == OTHER[4])
    keys, stale = snat.halves(mapping), snat._values(mapping._replace(refreshed=mapping.refreshed - 3))
    for key, value in zip(keys, stale, strict=True):
        nat.table.update(key, value)
    nat.table.delete(keys[half])
    if half:
        assert nat.out(send(4, "udp", OTHER)).sport == port
    else:
        assert nat.back(reply(4, "udp", port)).dst == OTHER[4]
    assert nat.table.lookup(keys[half]) is not None
    assert nat.back(reply(4, "udp", port)).dst == OTHER[4]


def test_a_half_whose_other_half_is_somebody_elses_is_worth_nothing(nat: Snat) -> None:
    nat.out(send(4, "udp"))
    (mapping,) = nat.mappings()
    thief = mapping._replace(source=ip_address(OTHER[4]))
    stale = snat._values(mapping._replace(refreshed=mapping.refreshed - 3))[0]
    nat.table.update(snat.halves(mapping)[0], stale)
    for key, value in zip(snat.halves(thief), snat._values(thief), strict=True):
        nat.table.update(key, value)
    assert nat.out(send(4, "udp")).sport != PORTS[0]
    assert nat.back(reply(4, "udp", PORTS[0])).dst == OTHER[4]


@pytest.mark.parametrize(
    ("out", "back", "seconds"),
    [
        (["S"], [], 60),
        (["S", "A"], ["SA"], 21600),
        (["S", "A", "FA"], ["SA"], 21600),
        (["S", "A", "FA"], ["SA", "FA"], 10),
        (["S"], ["RA"], 10),
        (["S", "A", "R", "A"], ["SA"], 21600),
        (["S", "A", "FA", "S"], ["SA", "FA"], 60),
    ],
)
def test_lifetimes_of_tcp(nat: Snat, out: list[str], back: list[str], seconds: int) -> None:
    sent, got = iter(out), iter(back)
    nat.out(send(4, "tcp", flags=next(sent)))
    for flags in got:
        nat.back(reply(4, "tcp", PORTS[0], flags=flags))
    for flags in sent:
        nat.out(send(4, "tcp", flags=flags))
    (mapping,) = nat.mappings()
    left = mapping.lifetime - time.monotonic()
    if out[-1] == "S" and len(out) > 1:
        seconds = 21600 if "A" in out else seconds
    assert seconds - 3 <= left <= seconds + 1


def test_collection_follows_conntrack_and_lifetimes(nat: Snat) -> None:
    conntrack = {6: nat.maps["ciliate_ct_tcp"], 0: nat.maps["ciliate_ct_any"]}

    def collect(ahead: int) -> int:
        return snat.collect(nat.table, conntrack, int(time.monotonic()) + ahead)

    tracked, untracked = send(4, "tcp"), send(4, "tcp", ports=(40001, 443))
    gone = send(4, "tcp", OTHER, (40002, 443))  # of a pod that was deleted
    host = ip(4, NODE[4], REMOTE[4]) / l4("tcp", 40003, 443, flags="A")
    for packet in (tracked, untracked, gone, host):
        packet[TCP].flags = "A"
        nat.out(packet)
    ends = (POD[4], PORTS[0]), (REMOTE[4], PORTS[1])
    key = track(nat, "ciliate_ct_tcp", 6, *ends, 9000, CT_FIRST_OUT)
    assert collect(0) == 0, "a flow that sends is not compared"
    assert collect(60) == 2
    assert sorted(item.source_port for item in nat.mappings()) == [40000, 40003]
    nat.maps["ciliate_ct_tcp"].delete(key)
    assert collect(60) == 1
    assert collect(30000) == 1
    assert list(nat.table.items()) == []


def test_flush_takes_both_halves_of_what_is_picked(nat: Snat) -> None:
    nat.out(send(4, "udp"))
    nat.out(send(6, "tcp", OTHER))
    assert snat.flush(nat.table, lambda item: item.proto == 6) == 1
    assert [item.proto for item in nat.mappings()] == [17]
    assert len(list(nat.table.items())) == 2
    assert snat.flush_all(nat.table) == 1
    assert list(nat.table.items()) == []


def test_a_reserved_tuple_is_not_given_away(nat: Snat) -> None:
    node, remote = ip_address(NODE[4]), ip_address(REMOTE[4])
    assert snat.reserve(nat.table, 17, node, PORTS[0], remote, PORTS[1], 100)
    assert not snat.reserve(nat.table, 17, node, PORTS[0], remote, PORTS[1], 100)
    assert nat.out(send(4, "udp")).sport != PORTS[0]


def test_a_full_table_makes_room_and_never_translates_wrongly(templates: Path) -> None:
    nat = Snat(templates, entries=512)
    try:
        lost = 0
        for number in range(2000):
            flow = (f"10.200.{number % 7}.{number % 200 + 1}", 30000 + number % 50)
            port = nat.out(ip(4, flow[0], REMOTE[4]) / l4("udp", flow[1], 443)).sport
            answer = nat.back(reply(4, "udp", port))
            lost += (answer.dst, answer.dport) == (NODE[4], port)
            assert (answer.dst, answer.dport) in (flow, (NODE[4], port))
        assert lost < 20, "of a table that is full all the time"
        assert len(list(nat.table.items())) <= 512
    finally:
        nat.close()


def test_a_device_without_an_address_of_the_family_does_not_masquerade(nat: Snat) -> None:
    nat.device(addresses={4: NODE[4]})
    packet = send(6, "tcp")
    assert bytes(nat.out(packet)) == bytes(packet)
    assert nat.out(send(4, "tcp")).src == NODE[4]


def test_destinations_to_be_reached_directly(nat: Snat) -> None:
    from ipaddress import ip_network

    from snat_harness import POD_RANGES

    direct = [*POD_RANGES, ip_network("198.51.100.0/24"), ip_network("2001:db8:1::/48")]
    snat.write_classes(nat.maps[snat.CLASSES], POD_RANGES, direct)
    for family in FAMILIES:
        packet = send(family, "tcp")
        assert bytes(nat.out(packet)) == bytes(packet)
    assert nat.out(ip(4, POD[4], ROUTER[4]) / l4("tcp", *PORTS)).src == NODE[4]


def test_icmp_destination_unreachable_of_a_pod_about_an_unknown_flow_is_left_alone(nat: Snat) -> None:
    packet = (
        ip(6, POD[6], REMOTE[6]) / ICMPv6DestUnreach(code=4) / Raw(bytes(ip(6, REMOTE[6], POD[6]) / l4("udp", 1, 2)))
    )
    assert bytes(nat.out(packet)) == bytes(packet)
