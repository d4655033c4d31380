"""Masquerading beside services of the node: whose a port is, and whose the answers are. Tier bpf."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest
from nodeport_harness import forward
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from service_harness import Services
from snat_harness import NODE, OTHER, PASS, POD, REMOTE, SECOND, Snat, ip, right
from snat_packets import FAMILIES, l4, reply, send

from ciliate.datapath import lblayout, snat

PORT, TARGET, REMOTE_PORT = 30080, 8080, 443
RANGE = (30000, 32767)


@pytest.fixture(scope="module", params=["auto", "inline"])
def loaded(request: pytest.FixtureRequest, templates: Path) -> Iterator[Snat]:
    programs = Snat(templates, request.param, more=("CILIATE_SERVICES",), services=RANGE)
    yield programs
    programs.close()


@pytest.fixture
def services(loaded: Snat) -> Services:
    loaded.reset()
    return Services(loaded)


@pytest.fixture
def nat(services: Services) -> Snat:
    assert isinstance(services.programs, Snat)
    return services.programs


def node_port(services: Services, family: int, protocol: str = "TCP", port: int = PORT) -> None:
    """A service of the node, with a pod of this node behind it."""
    local = [POD[family]]
    services.put((NODE[family], port), [(POD[family], TARGET)], protocol, flags=lblayout.EXTERNAL, local=local)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("port", [PORT, 40000], ids=["in the range", "elsewhere"])
def test_no_pod_gets_the_port_of_a_service(
    services: Services, nat: Snat, family: int, protocol: str, port: int
) -> None:
    node_port(services, family, protocol.upper(), port)
    sent = nat.out(send(family, protocol, OTHER, (port, REMOTE_PORT)))
    assert (sent.src, sent.sport) != (NODE[family], port)
    answer = nat.back(reply(family, protocol, sent.sport))
    assert (answer.dst, answer.dport) == (OTHER[family], port)


def test_two_pods_with_one_port_whose_next_one_would_be_a_services(services: Services, nat: Snat) -> None:
    """7455 is followed by 30080 where all ports are looked through."""
    node_port(services, 4)
    for pod in (POD, OTHER):
        sent = nat.out(send(4, "tcp", pod, (7455, REMOTE_PORT)))
        answer = nat.back(reply(4, "tcp", sent.sport))
        assert (answer.dst, answer.dport) == (pod[4], 7455)


def test_no_search_ends_in_the_range_of_services(nat: Snat) -> None:
    """Before any service is there: one that comes later finds no mapping in its way."""
    found = set()
    for number in range(600):
        nat.out(send(4, "udp", POD, (2000 + number, REMOTE_PORT)))
        found.add(nat.out(send(4, "udp", OTHER, (2000 + number, REMOTE_PORT))).sport)
    assert len(found) == 600
    assert not [port for port in found if RANGE[0] <= port <= RANGE[1]]
    for port in RANGE:
        assert nat.out(send(4, "udp", POD, (port, REMOTE_PORT))).sport not in range(RANGE[0], RANGE[1] + 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("whose", ["pod", "node"])
def test_a_flow_that_was_there_before_the_service_keeps_its_answers(
    services: Services, nat: Snat, family: int, protocol: str, whose: str
) -> None:
    source = OTHER if whose == "pod" else NODE
    sent = nat.out(send(family, protocol, source, (40000, REMOTE_PORT)))
    assert (sent.src, sent.sport) == (NODE[family], 40000)
    node_port(services, family, protocol.upper(), 40000)
    answer = nat.back(reply(family, protocol, 40000))
    assert (answer.dst, answer.dport) == (source[family], 40000)
    assert right(answer)
    # another remote is a client of the service
    client = nat.back(reply(family, protocol, 40000, SECOND))
    assert (client.dst, client.dport) == (POD[family], TARGET)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_client_of_a_service_stays_one_after_the_answers(
    services: Services, nat: Snat, family: int, protocol: str
) -> None:
    """What a service answers leaves with the node's address, and is no flow of the node for all that."""
    node_port(services, family, protocol.upper())
    for number in range(3):
        request = ip(family, REMOTE[family], NODE[family]) / l4(protocol, REMOTE_PORT, PORT)
        arrived = nat.back(request)
        assert (arrived.dst, arrived.dport) == (POD[family], TARGET), f"request {number}"
        fields = {"flags": "SA"} if protocol == "tcp" else {}
        answer = nat.out(ip(family, POD[family], REMOTE[family]) / l4(protocol, TARGET, REMOTE_PORT, **fields))
        assert (answer.src, answer.sport) == (NODE[family], PORT), f"answer {number}"
    assert nat.mappings() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_service_without_backends_makes_no_flow_of_the_node(services: Services, nat: Snat, family: int) -> None:
    services.put((NODE[family], PORT), [], "TCP", flags=lblayout.EXTERNAL)
    refusal = ip(family, NODE[family], REMOTE[family]) / l4("tcp", PORT, REMOTE_PORT, flags="RA")
    assert bytes(nat.out(refusal)) == bytes(refusal)
    assert nat.mappings() == []


def connected(nat: Snat, stack: ExitStack, family: int, kind: socket.SocketKind) -> None:
    """A socket of the node from PORT to the remote, whose address is here as well."""

    def make() -> None:
        for address in (NODE[family], REMOTE[family]):
            os.system(f"ip address replace {address} dev lo nodad 2>/dev/null || ip address replace {address} dev lo")
        far = stack.enter_context(socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind))
        near = stack.enter_context(socket.socket(far.family, kind))
        for made, end in ((far, (REMOTE[family], REMOTE_PORT)), (near, (NODE[family], PORT))):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(end)
        if kind == socket.SOCK_STREAM:
            far.listen()
        deadline = time.monotonic() + 10
        while near.connect_ex((REMOTE[family], REMOTE_PORT)):  # the kernel makes an IPv6 address's route a little later
            assert time.monotonic() < deadline

    def take_away() -> None:
        for address in (NODE[family], REMOTE[family]):
            os.system(f"ip address del {address}/{32 if family == 4 else 128} dev lo")

    stack.callback(lambda: nat.inside(take_away))
    nat.inside(make)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("protocol", "kind"), [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)])
def test_a_connection_of_the_node_that_nobody_masquerades_keeps_its_answers(
    services: Services, nat: Snat, family: int, protocol: str, kind: socket.SocketKind
) -> None:
    """No engine, another one, or a destination that is reached directly: its socket tells whose the answer is."""
    node_port(services, family, protocol.upper())
    with ExitStack() as stack:
        connected(nat, stack, family, kind)
        answer = reply(family, protocol, PORT)
        assert bytes(nat.back(answer)) == bytes(answer)
        client = nat.back(reply(family, protocol, PORT, SECOND))
        assert (client.dst, client.dport) == (POD[family], TARGET)
    gone = nat.back(reply(family, protocol, PORT))
    assert (gone.dst, gone.dport) == (POD[family], TARGET), "a client of the service, once the socket is closed"


def answered_elsewhere(family: int, port: int) -> Packet:
    return ip(family, SECOND[family], NODE[family]) / l4("udp", TARGET, port)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_another_nodes_backend_find_the_client_although_they_are_for_a_tuple_of_the_node(
    services: Services, nat: Snat, family: int
) -> None:
    """The backend is no pod, so what goes to it counts as the node's own flow; the client is behind that."""
    services.put((NODE[family], PORT), [(SECOND[family], TARGET)], "UDP", flags=lblayout.EXTERNAL)
    result, data = forward(services, ip(family, REMOTE[family], NODE[family]) / l4("udp", 4000, PORT))
    assert result == PASS
    forwarded = Ether(data).payload
    assert (forwarded.src, forwarded.dst) == (NODE[family], SECOND[family])
    result, data = forward(services, answered_elsewhere(family, forwarded.sport))
    assert result == PASS
    answer = Ether(data).payload
    assert (answer.src, answer.sport) == (NODE[family], PORT)
    assert (answer.dst, answer.dport) == (REMOTE[family], 4000)


def test_the_node_may_have_the_port_of_a_service_by_name(nat: Snat) -> None:
    """Only pods keep off the range: a process of the node that binds there had its reasons."""
    own = send(4, "udp", NODE, (PORT, REMOTE_PORT))
    assert bytes(nat.out(own)) == bytes(own)
    assert [(item.host, item.node, item.node_port) for item in nat.mappings()] == [(True, ip_address(NODE[4]), PORT)]
    assert snat.flush_all(nat.table) == 1
