"""What one pod may take of the node's ports and of the table of mappings, and how long nobody's answer keeps a port.
Tier bpf."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from snat_harness import MACS, NODE, OTHER, PASS, POD, REMOTE, SECOND, SHOT, Snat, ip
from snat_packets import FAMILIES, PORTS, echo, l4, reply, send

from ciliate.datapath import snat

SHARE_REFUSED, NO_PORT = 188, 167
RESERVE = 64512


def flood(nat: Snat, packet: Packet, ports: range) -> int:
    """Send from each of these ports as fast as it goes; how many were dropped."""
    data = bytearray(bytes(Ether(**MACS) / packet))
    assert packet.version == 4
    dropped = 0
    for port in ports:
        data[34:36] = port.to_bytes(2, "big")
        if packet.proto == 17:
            data[40:42] = b"\0\0"
        result, _ = nat.raw("to_netdev", bytes(data))
        assert result in (PASS, SHOT)
        dropped += result == SHOT
    return dropped


@pytest.fixture(scope="module")
def flooded(templates: Path) -> Iterator[Snat]:
    """One pod has sent a datagram from every port there is to one remote."""
    nat = Snat(templates)
    flood(nat, send(4, "udp"), range(1, 65536))
    yield nat
    nat.close()


def test_others_get_ports_whatever_one_pod_sends(flooded: Snat) -> None:
    assert flood(flooded, send(4, "udp", OTHER), range(20000, 20500)) == 0
    own = {item.node_port for item in flooded.mappings() if str(item.source) == OTHER[4]}
    assert len(own) == 500


def test_the_node_has_ports_that_no_pod_gets(flooded: Snat) -> None:
    pods = {item.node_port for item in flooded.mappings() if not item.host}
    assert max(pods) < RESERVE
    assert flood(flooded, send(4, "udp", NODE), range(30000, 30500)) == 0


def test_one_pod_has_its_share_and_what_it_wants_beyond_is_refused_and_counted(flooded: Snat) -> None:
    mine = [item for item in flooded.mappings() if str(item.source) == POD[4]]
    assert 20000 < len(mine) < 42000
    refused = flooded.reasons()[SHARE_REFUSED, 1]
    assert refused > 15000
    (usage,) = [item for item in snat.usage(flooded.maps[snat.PODS]) if str(item.source) == POD[4]]
    assert (usage.mappings, usage.refused) == (len(mine), refused)
    again = flooded.out(send(4, "udp", POD, (mine[0].source_port, PORTS[1])))
    assert again.sport == mine[0].node_port, "what is there goes on"
    elsewhere = ip(4, POD[4], SECOND[4]) / l4("udp", *PORTS)
    assert flooded.out(elsewhere).sport == PORTS[0], "its flows to others have ports"


def seconds_left(nat: Snat) -> float:
    (mapping,) = nat.mappings()
    return mapping.lifetime - time.monotonic()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["syn", "ack", "data", "udp", "echo"])
def test_what_nobody_answers_lives_briefly(nat: Snat, family: int, kind: str) -> None:
    flags = {"syn": "S", "ack": "A", "data": "PA"}
    if kind == "echo":
        packet = ip(family, POD[family], REMOTE[family]) / echo(family, 77)
    elif kind == "udp":
        packet = send(family, "udp")
    else:
        packet = send(family, "tcp", flags=flags[kind])
    for _ in range(3):
        nat.out(packet)
    assert seconds_left(nat) <= 30


@pytest.mark.parametrize(("protocol", "flags", "least"), [("tcp", "A", 21000), ("udp", "", 55), ("sctp", "", 55)])
def test_an_answer_gives_a_flow_its_life(nat: Snat, protocol: str, flags: str, least: int) -> None:
    fields = {"flags": flags} if flags else {}
    nat.out(send(4, protocol, **fields))
    nat.back(reply(4, protocol, PORTS[0], **fields))
    assert seconds_left(nat) > least
    nat.out(send(4, protocol, **fields))
    assert seconds_left(nat) > least


def test_a_pod_cannot_push_others_out_of_the_table(templates: Path) -> None:
    nat = Snat(templates, entries=4096, most=512)
    try:
        port = nat.out(send(4, "tcp", OTHER)).sport
        nat.back(reply(4, "tcp", port))
        refused = 0
        for number in range(6000):
            packet = ip(4, POD[4], f"198.51.{number // 250}.{number % 250}") / l4("udp", *PORTS)
            refused += nat.run("to_netdev", Ether(**MACS) / packet)[0] == SHOT
        assert refused >= 6000 - 512
        assert nat.back(reply(4, "tcp", port)).dst == OTHER[4], "an idle connection of another pod"
        (usage,) = [item for item in snat.usage(nat.maps[snat.PODS]) if str(item.source) == POD[4]]
        assert (usage.mappings, usage.refused) == (512, refused)
        # nothing of it was answered: collection gives it all back
        conntrack = {6: nat.maps["ciliate_ct_tcp"], 0: nat.maps["ciliate_ct_any"]}
        snat.collect(nat.table, conntrack, int(time.monotonic()) + 40, nat.maps[snat.PODS])
        left = {str(item.source): item.mappings for item in snat.usage(nat.maps[snat.PODS])}
        assert left.get(POD[4], 0) == 0
        assert nat.out(ip(4, POD[4], SECOND[4]) / l4("udp", *PORTS)).sport == PORTS[0]
    finally:
        nat.close()


def test_the_count_of_a_pods_mappings_follows_what_is_there(nat: Snat) -> None:
    def count(pod: dict[int, str]) -> int:
        return {str(item.source): item.mappings for item in snat.usage(nat.maps[snat.PODS])}.get(pod[4], 0)

    for port in range(5000, 5020):
        nat.out(send(4, "udp", POD, (port, PORTS[1])))
    assert count(POD) == 20
    # a dead one's port goes to another pod
    mapping = next(item for item in nat.mappings() if item.node_port == 5000)
    over = mapping._replace(lifetime=int(time.monotonic()) - 5)
    for key, value in zip(snat.halves(mapping), snat._values(over), strict=True):
        nat.table.update(key, value)
    assert nat.out(send(4, "udp", OTHER, (5000, PORTS[1]))).sport == 5000
    assert (count(POD), count(OTHER)) == (19, 1)
    conntrack = {6: nat.maps["ciliate_ct_tcp"], 0: nat.maps["ciliate_ct_any"]}
    nat.table.delete_many(snat.halves(next(item for item in nat.mappings() if item.node_port == 5001)))
    snat.collect(nat.table, conntrack, None, nat.maps[snat.PODS])
    assert (count(POD), count(OTHER)) == (18, 1)
    assert ip_address(NODE[4]) not in {item.source for item in snat.usage(nat.maps[snat.PODS])}
    assert NO_PORT not in {reason for reason, _ in nat.reasons()}
