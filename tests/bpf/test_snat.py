"""Masquerading flow by flow: every protocol, both families, collisions, exhaustion, lifetimes. Tier bpf."""

from __future__ import annotations

import socket
import time
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import TCP
from scapy.layers.inet6 import ICMPv6DestUnreach
from scapy.packet import Raw
from snat_harness import ENDPOINT, NODE, OTHER, POD, REMOTE, ROUTER, SECOND, Snat, ip, right
from snat_packets import FAMILIES, PORTS, echo, l4, reply, send

from ciliate.datapath import layout, snat
from ciliate.datapath.layout import CT_ENTRY, CT_FIRST_IN, CT_FIRST_OUT, CT_KEY


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


def track(
    nat: Snat, table: str, proto: int, begins: tuple[str, int], other: tuple[str, int], seconds: int, first: int
) -> bytes:
    """Enter a flow as a pod's end has it, which began it (CT_FIRST_OUT) or not."""
    key = layout.conntrack_key(proto, *((ip_address(address), port) for address, port in (begins, other)))
    pods = {layout.to_mapped(ip_address(text)) for text in POD.values()}
    ends = [(0, 0, 0, 0, 0, ENDPOINT, first) if part in pods else (0,) * 7 for part in CT_KEY.unpack(key)[:2]]
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
        (["S"], [], 30),
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
        nat.back(reply(4, "tcp", nat.out(packet).sport, flags="A"))
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


def test_icmp_destination_unreachable_of_a_pod_about_an_unknown_flow_stays_in(nat: Snat) -> None:
    """It would leave with the pod's own address."""
    packet = (
        ip(6, POD[6], REMOTE[6]) / ICMPv6DestUnreach(code=4) / Raw(bytes(ip(6, REMOTE[6], POD[6]) / l4("udp", 1, 2)))
    )
    assert nat.why(packet) == 168
