"""Services in the endpoint program: translation there and back, picking, refusing, with every checksum. Tier bpf."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from bpf_harness import (
    NODE_MAC,
    OK,
    PEER,
    PEER4,
    PEER6,
    POD,
    POD4,
    POD6,
    POD_MAC,
    REDIRECT,
    SHOT,
    WORLD4,
    WORLD6,
    Programs,
)
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, TCPerror, UDPerror, fragment
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw
from service_harness import VIP4, VIP6, Services, l4, parsed, unreachable

from ciliate.policy.mapstate import EGRESS, INGRESS, PolicyEntry, PolicyKey, Verdict

E = Ether(src=POD_MAC, dst=NODE_MAC)
FROM_NODE = Ether(src=NODE_MAC, dst=POD_MAC)
FAMILIES = [4, 6]
SELF4, SELF6 = "169.254.42.1", "fd00:c11:5:5e1f::1"
NO_BACKEND, NO_SERVICE, UNKNOWN_TARGET = 158, 196, 150


def vip(family: int) -> str:
    return VIP4 if family == 4 else VIP6


def pod(family: int) -> str:
    return POD4 if family == 4 else POD6


def peer(family: int) -> str:
    return PEER4 if family == 4 else PEER6


def outside(family: int, number: int = 0) -> str:
    return f"192.0.2.{10 + number}" if family == 4 else f"2001:db8::{10 + number:x}"


def ip(family: int, src: str, dst: str, **fields: Any) -> Packet:
    return IP(src=src, dst=dst, **fields) if family == 4 else IPv6(src=src, dst=dst, **fields)


@pytest.fixture
def services(programs: Programs) -> Services:
    return Services(programs)


LAYER = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", LAYER)
def test_there_and_back(services: Services, family: int, protocol: str) -> None:
    services.put((vip(family), 80), [(outside(family), 8080)], protocol)
    kind = LAYER[protocol]
    result, data = services.programs.send(E / ip(family, pod(family), vip(family)) / l4(protocol, 4000, 80))
    assert result == OK
    frame = parsed(data)
    assert (frame[1].src, frame[1].dst) == (pod(family), outside(family))
    assert (frame[kind].sport, frame[kind].dport) == (4000, 8080)
    fields = {"flags": "SA"} if protocol == "TCP" else {}
    answer = FROM_NODE / ip(family, outside(family), pod(family)) / l4(protocol, 8080, 4000, **fields)
    result, data = services.programs.receive(answer)
    assert result == OK
    frame = parsed(data)
    assert (frame[1].src, frame[1].dst) == (vip(family), pod(family))
    assert (frame[kind].sport, frame[kind].dport) == (80, 4000)


@pytest.mark.parametrize("family", FAMILIES)
def test_protocols_are_services_of_their_own(services: Services, family: int) -> None:
    services.put((vip(family), 53), [(outside(family, 1), 5301)], "TCP")
    services.put((vip(family), 53), [(outside(family, 2), 5302)], "UDP")
    for protocol, number in (("TCP", 1), ("UDP", 2)):
        _, data = services.programs.send(E / ip(family, pod(family), vip(family)) / l4(protocol, 4000, 53))
        frame = parsed(data)
        assert (frame[1].dst, frame[LAYER[protocol]].dport) == (outside(family, number), 5300 + number)
    untouched = E / ip(family, pod(family), vip(family)) / l4("SCTP", 4000, 53)
    assert services.programs.send(untouched) == (OK, bytes(untouched))


def test_udp_without_checksum_stays_without(services: Services) -> None:
    services.put((VIP4, 53), [(outside(4), 5353)], "UDP")
    _, data = services.programs.send(E / IP(src=POD4, dst=VIP4) / UDP(sport=9, dport=53, chksum=0) / b"x")
    assert Ether(data)[UDP].chksum == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backend_on_the_node_gets_it_straight(services: Services, family: int) -> None:
    services.put((vip(family), 80), [(peer(family), 8080)])
    result, data = services.programs.send(E / ip(family, pod(family), vip(family)) / TCP(sport=5, dport=80))
    assert result == REDIRECT
    assert (parsed(data)[1].dst, parsed(data)[TCP].dport) == (peer(family), 8080)


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_sees_the_backend(services: Services, family: int) -> None:
    """The rule names the backend's port; the service's own has no meaning to policy."""
    services.put((vip(family), 80), [(peer(family), 8080)])
    allow = {PolicyKey(EGRESS, 401, 6, 8080, 16): PolicyEntry(Verdict.ALLOW)}
    services.programs.enforce(POD, allow, egress=True)
    packet = E / ip(family, pod(family), vip(family)) / TCP(sport=5, dport=80)
    assert services.programs.why(packet) == 0
    services.programs.flush()
    services.programs.enforce(POD, {PolicyKey(EGRESS, 401, 6, 80, 16): PolicyEntry(Verdict.ALLOW)}, egress=True)
    assert services.programs.why(packet) == 133


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", LAYER)
def test_to_oneself(services: Services, family: int, protocol: str) -> None:
    """The pod sees another peer than itself, whatever its policy, and the answer comes from the service."""
    services.programs.enforce(POD, {}, ingress=True, egress=True)
    services.put((vip(family), 80), [(pod(family), 8080)], protocol)
    kind, me = LAYER[protocol], SELF4 if family == 4 else SELF6
    result, data = services.programs.send(E / ip(family, pod(family), vip(family)) / l4(protocol, 4000, 80))
    frame = parsed(data)
    assert result == REDIRECT
    assert (frame.src, frame.dst) == (NODE_MAC, POD_MAC)
    assert (frame[1].src, frame[1].dst) == (me, pod(family))
    assert (frame[kind].sport, frame[kind].dport) == (4000, 8080)
    fields = {"flags": "SA"} if protocol == "TCP" else {}
    result, data = services.programs.send(E / ip(family, pod(family), me) / l4(protocol, 8080, 4000, **fields))
    frame = parsed(data)
    assert result == REDIRECT
    assert (frame[1].src, frame[1].dst) == (vip(family), pod(family))
    assert (frame[kind].sport, frame[kind].dport) == (80, 4000)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_unasked_for_goes_to_oneself(services: Services, family: int) -> None:
    me = SELF4 if family == 4 else SELF6
    assert services.programs.why(E / ip(family, pod(family), me) / TCP(sport=1, dport=2)) == UNKNOWN_TARGET


@pytest.mark.parametrize("family", FAMILIES)
def test_tcp_without_backends_is_reset(services: Services, family: int) -> None:
    services.put((vip(family), 80), [])
    before = services.programs.reasons().get((NO_BACKEND, 1), 0)
    packet = E / ip(family, pod(family), vip(family)) / TCP(sport=4000, dport=80, flags="S", seq=77)
    result, data = services.programs.send(packet)
    frame = parsed(data)
    assert result == REDIRECT
    assert services.programs.reasons()[NO_BACKEND, 1] == before + 1
    assert (frame[1].src, frame[1].dst, frame.dst) == (vip(family), pod(family), POD_MAC)
    assert (frame[TCP].sport, frame[TCP].dport, frame[TCP].flags, frame[TCP].ack) == (80, 4000, "RA", 78)
    packet[TCP].flags, packet[TCP].ack = "A", 1234
    frame = parsed(services.programs.send(packet)[1])
    assert (frame[TCP].flags, frame[TCP].seq) == ("R", 1234)
    packet[TCP].flags = "R"
    assert services.programs.send(packet)[0] == SHOT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["UDP", "SCTP"])
def test_others_without_backends_hear_port_unreachable(services: Services, family: int, protocol: str) -> None:
    services.put((vip(family), 80), [], protocol)
    packet = ip(family, pod(family), vip(family)) / l4(protocol, 4000, 80)
    result, data = services.programs.send(E / packet)
    frame = parsed(data)
    assert result == REDIRECT
    assert (frame[1].src, frame[1].dst) == (vip(family), pod(family))
    if family == 4:
        assert (frame[ICMP].type, frame[ICMP].code) == (3, 3)
        assert bytes(frame[ICMP].payload) == bytes(packet)[:28]
    else:
        assert (frame[ICMPv6DestUnreach].type, frame[ICMPv6DestUnreach].code) == (1, 4)
        assert bytes(frame[ICMPv6DestUnreach].payload) == bytes(packet)[:48]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_keeps_its_backend(services: Services, family: int) -> None:
    """Others come, go and change places; only a flow whose own backend goes is given another."""
    all_five = [(outside(family, number), 8080) for number in range(5)]
    services.put((vip(family), 80), all_five)
    packet = E / ip(family, pod(family), vip(family)) / TCP(sport=4000, dport=80, flags="S")
    mine = parsed(services.programs.send(packet)[1])[1].dst
    packet[TCP].flags = "A"
    others = [item for item in all_five if item[0] != mine]
    for left in (all_five[::-1], [*others[2:], (mine, 8080)], [(mine, 8080)], [*others, (mine, 8080)]):
        services.put((vip(family), 80), left)
        assert parsed(services.programs.send(packet)[1])[1].dst == mine
    services.put((vip(family), 80), others)
    new = parsed(services.programs.send(packet)[1])[1].dst
    assert new in {address for address, _ in others}
    assert parsed(services.programs.send(packet)[1])[1].dst == new


def test_a_backend_of_another_service_too_keeps_its_flows(services: Services) -> None:
    services.put((VIP4, 80), [(outside(4), 8080), (outside(4, 1), 8080)])
    services.put((VIP4, 81), [(outside(4), 8080), (outside(4, 1), 8080)])
    packet = E / IP(src=POD4, dst=VIP4) / TCP(sport=4000, dport=80, flags="S")
    mine = parsed(services.programs.send(packet)[1])[1].dst
    services.put((VIP4, 80), [item for item in [(outside(4), 8080), (outside(4, 1), 8080)] if item[0] != mine])
    packet[TCP].flags = "A"
    assert parsed(services.programs.send(packet)[1])[1].dst == mine


def test_a_backend_that_comes_back_finds_its_flows(services: Services) -> None:
    two = [(outside(4), 8080), (outside(4, 1), 8080)]
    services.put((VIP4, 80), two)
    packet = E / IP(src=POD4, dst=VIP4) / TCP(sport=4000, dport=80, flags="S")
    mine = parsed(services.programs.send(packet)[1])[1].dst
    for _ in range(3):
        services.put((VIP4, 80), [item for item in two if item[0] != mine])
        services.put((VIP4, 80), two)
    packet[TCP].flags = "A"
    assert parsed(services.programs.send(packet)[1])[1].dst == mine


@pytest.mark.parametrize("maglev", [False, True], ids=["random", "maglev"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_gets_its_share(services: Services, family: int, maglev: bool) -> None:
    count, flows = 5, 3000
    services.put((vip(family), 80), [(outside(family, number), 8080) for number in range(count)], maglev=maglev)
    seen = Counter[str]()
    for port in range(flows):
        packet = E / ip(family, pod(family), vip(family)) / TCP(sport=10000 + port, dport=80)
        _, data = services.programs.send(packet)
        seen[Ether(data)[1].dst] += 1
    expected = flows / count
    statistic = sum((seen[outside(family, number)] - expected) ** 2 / expected for number in range(count))
    assert sum(seen.values()) == flows
    assert statistic < 23.5, seen  # chi-square, 4 degrees of freedom, p = 0.0001


def test_the_hash_is_the_one_of_the_model(services: Services) -> None:
    from ciliate.service.model import packed
    from ciliate.service.selection import flow_hash, place_of

    number = services.put((VIP4, 80), [(outside(4, index), 8080) for index in range(7)])
    backends = services.table.records[number].backends
    for port in range(200):
        _, data = services.programs.send(E / IP(src=POD4, dst=VIP4) / TCP(sport=20000 + port, dport=80))
        place = place_of(flow_hash(packed(POD4) or b"", packed(VIP4) or b"", 20000 + port, 80, 6), 7)
        found = services.number_of(Ether(data)[1].dst, 8080, 6)
        assert found == backends[place]


@pytest.mark.parametrize("family", FAMILIES)
def test_affinity(services: Services, family: int) -> None:
    """One client has one backend, until that leaves the service, even where it stays as another's."""
    all_five = [(outside(family, number), 8080) for number in range(5)]
    services.put((vip(family), 81), all_five)
    services.put((vip(family), 80), all_five, affinity=100)

    def connect(port: int) -> str:
        packet = E / ip(family, pod(family), vip(family)) / TCP(sport=port, dport=80)
        return str(Ether(services.programs.send(packet)[1])[1].dst)

    seen = {connect(port) for port in range(3000, 3040)}
    assert len(seen) == 1
    mine = seen.pop()
    services.put((vip(family), 80), [item for item in all_five if item[0] != mine], affinity=100)
    after = {connect(port) for port in range(4000, 4040)}
    assert len(after) == 1
    assert mine not in after


def test_affinity_ends(services: Services) -> None:
    """A client that was away for longer than the timeout is a new one."""
    from ciliate.datapath import lblayout

    services.put((VIP4, 80), [(outside(4, number), 8080) for number in range(5)], affinity=100)
    table = services.programs.maps["ciliate_lb_affinity"]
    found = set()
    for port in range(40):
        for key, value in list(table.items()):
            backend, used = lblayout.AFFINITY.unpack(value)
            table.update(key, lblayout.AFFINITY.pack(backend, used - 200))
        packet = E / IP(src=POD4, dst=VIP4) / TCP(sport=3000 + port, dport=80)
        found.add(Ether(services.programs.send(packet)[1])[1].dst)
    assert len(found) > 1


def test_what_a_direct_connection_left_does_not_hide_the_service(services: Services) -> None:
    """The seed system's defect: the answers came from the backend's own address, and the connection failed."""
    services.put((VIP4, 80), [(outside(4), 8080)])
    direct = E / IP(src=POD4, dst=outside(4)) / TCP(sport=4000, dport=8080, flags="S")
    assert services.programs.send(direct)[0] == OK
    assert services.programs.send(E / IP(src=POD4, dst=VIP4) / TCP(sport=4000, dport=80, flags="S"))[0] == OK
    answer = FROM_NODE / IP(src=outside(4), dst=POD4) / TCP(sport=8080, dport=4000, flags="SA")
    assert parsed(services.programs.receive(answer)[1])[IP].src == VIP4
    # and the other way round
    assert services.programs.send(direct)[0] == OK
    assert parsed(services.programs.receive(answer)[1])[IP].src == outside(4)


def test_a_tuple_that_is_in_use_gets_another_backend(services: Services) -> None:
    """A living direct connection and one through the service could not be told apart at one backend."""
    two = [(outside(4), 8080), (outside(4, 1), 8080)]
    services.put((VIP4, 80), two)
    for port in range(4000, 4020):
        for address, _ in two[:1]:
            for flags in ("S", "A"):
                services.programs.send(E / IP(src=POD4, dst=address) / TCP(sport=port, dport=8080, flags=flags))
        _, data = services.programs.send(E / IP(src=POD4, dst=VIP4) / TCP(sport=port, dport=80, flags="S"))
        assert Ether(data)[IP].dst == outside(4, 1)


def test_answers_of_a_service_that_is_gone_are_dropped(services: Services) -> None:
    number = services.put((VIP4, 80), [(outside(4), 8080)])
    services.programs.send(E / IP(src=POD4, dst=VIP4) / TCP(sport=4000, dport=80, flags="S"))
    services.delete(number)
    answer = FROM_NODE / IP(src=outside(4), dst=POD4) / TCP(sport=8080, dport=4000, flags="SA")
    assert services.programs.why(answer, receive=True) == NO_SERVICE


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments(services: Services, family: int) -> None:
    """Every fragment goes to the backend that the first one went to; only the first has ports and a checksum."""
    services.put((vip(family), 80), [(outside(family, number), 8080) for number in range(3)], "UDP")
    whole = ip(family, pod(family), vip(family)) / UDP(sport=4000, dport=80) / Raw(bytes(range(256)) * 12)
    if family == 4:
        parts = [E / part for part in fragment(whole, 1000)]
    else:
        long = IPv6(src=POD6, dst=VIP6) / IPv6ExtHdrFragment(id=7) / whole[UDP]
        parts = [E / part for part in fragment6(long, 1000)]
    targets, payload = set(), b""
    for part in parts:
        result, data = services.programs.send(part)
        assert result == OK
        frame = Ether(data)
        targets.add(frame[1].dst)
        payload += bytes(frame[IP].payload) if family == 4 else bytes(frame[IPv6ExtHdrFragment].payload)
    assert len(targets) == 1
    again = parsed(
        bytes(E / ip(family, pod(family), targets.pop(), **({"proto": 17} if family == 4 else {"nh": 17})) / payload)
    )
    assert (again[UDP].sport, again[UDP].dport) == (4000, 8080)


@pytest.mark.parametrize("by_backend", [True, False], ids=["backend", "router"])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_about_what_a_pod_sent(services: Services, family: int, protocol: str, by_backend: bool) -> None:
    """The pod never heard of the backend: the error must speak of the service, or its socket does not know it."""
    services.put((vip(family), 80), [(outside(family), 8080)], protocol)
    _, data = services.programs.send(E / ip(family, pod(family), vip(family)) / l4(protocol, 4000, 80))
    router = WORLD4 if family == 4 else WORLD6
    source = outside(family) if by_backend else router
    result, data = services.programs.receive(FROM_NODE / unreachable(family, Ether(data)[1], source, pod(family)))
    assert result == OK
    frame = parsed(data)
    assert frame[1].src == (vip(family) if by_backend else router)
    if family == 4:
        inner = frame[IPerror]
        assert (inner.src, inner.dst) == (POD4, VIP4)
        ports = inner.payload
        assert isinstance(ports, TCPerror | UDPerror)
    else:
        inner = frame[ICMPv6DestUnreach].payload
        assert (inner.src, inner.dst) == (POD6, VIP6)
        ports = inner.payload
    assert (ports.sport, ports.dport) == (4000, 80)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_of_a_pod_about_an_answer(services: Services, family: int) -> None:
    """It complains about the service; the backend must hear of itself."""
    services.put((vip(family), 80), [(outside(family), 8080)], "UDP")
    services.programs.send(E / ip(family, pod(family), vip(family)) / l4("UDP", 4000, 80))
    answer = FROM_NODE / ip(family, outside(family), pod(family)) / l4("UDP", 8080, 4000)
    _, data = services.programs.receive(answer)
    error = E / unreachable(family, Ether(data)[1], pod(family), vip(family))
    result, data = services.programs.send(error)
    frame = parsed(data)
    assert result == OK
    assert frame[1].dst == outside(family)
    inner = frame[IPerror] if family == 4 else frame[ICMPv6DestUnreach].payload
    assert (inner.src, inner.dst) == (outside(family), pod(family))
    assert (inner.payload.sport, inner.payload.dport) == (8080, 4000)


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_of_a_pod_about_what_it_sent_itself(services: Services, family: int, protocol: str) -> None:
    """To a closed port, through a service: it comes from the service, about what was sent there."""
    me = SELF4 if family == 4 else SELF6
    services.programs.enforce(POD, {}, ingress=True, egress=True)
    services.put((vip(family), 80), [(pod(family), 8080)], protocol)
    _, data = services.programs.send(E / ip(family, pod(family), vip(family)) / l4(protocol, 4000, 80))
    sent = Ether(data)[1]
    result, data = services.programs.send(E / unreachable(family, sent, pod(family), me))
    frame = parsed(data)
    assert (result, frame.src, frame.dst) == (REDIRECT, NODE_MAC, POD_MAC)
    assert (frame[1].src, frame[1].dst) == (vip(family), pod(family))
    inner = frame[IPerror] if family == 4 else frame[ICMPv6DestUnreach].payload
    assert (inner.src, inner.dst) == (pod(family), vip(family))
    assert (inner.payload.sport, inner.payload.dport) == (4000, 80)
    other = sent.copy()
    other.payload.sport = 4001
    assert services.programs.why(E / unreachable(family, other, pod(family), me)) == 150


def test_pods_that_have_no_service_send_what_they_sent(services: Services) -> None:
    """Not a byte changes of what goes to no service, on either side."""
    services.programs.endpoint(PEER)
    packet = E / IP(src=POD4, dst=outside(4)) / TCP(sport=4000, dport=8080, flags="S")
    assert services.programs.send(packet) == (OK, bytes(packet))
    services.programs.enforce(POD, {PolicyKey(INGRESS, 0, 0, 0, 0): PolicyEntry(Verdict.ALLOW)}, ingress=True)
    answer = FROM_NODE / IP(src=outside(4), dst=POD4) / TCP(sport=8080, dport=4000, flags="SA")
    assert services.programs.receive(answer) == (OK, bytes(answer))
