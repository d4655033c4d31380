"""How long what node ports remember of a flow counts, and how much of it one client may have. Tier bpf."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bpf_harness import context
from nodeport_harness import (
    FAMILIES,
    PORT,
    TARGET,
    age,
    arrive,
    collect,
    entries,
    forward,
    ip,
    leave,
    leave_own,
    put,
    put_elsewhere,
)
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from service_harness import Services
from snat_harness import MACS, NODE, PASS, POD, REMOTE, ROUTER, SECOND, Snat

from ciliate.datapath import bpf

LAYERS = {"TCP": TCP, "UDP": UDP}
CLIENT = 40000
IDLE = {"TCP": 21600, "UDP": 60}
"""Seconds without a packet after which a flow is over."""


@pytest.fixture(scope="module")
def loaded_snat(templates: Path) -> Iterator[Snat]:
    programs = Snat(templates, more=("CILIATE_SERVICES",))
    yield programs
    programs.close()


@pytest.fixture
def services(loaded_snat: Snat) -> Services:
    loaded_snat.reset()
    return Services(loaded_snat)


def segment(protocol: str, sport: int, dport: int, flags: str = "A") -> Packet:
    return TCP(sport=sport, dport=dport, flags=flags) if protocol == "TCP" else UDP(sport=sport, dport=dport) / b"hello"


class Flow:
    """One flow of a client outside through the node port, to a backend of this node or of another."""

    def __init__(self, services: Services, family: int, elsewhere: bool, protocol: str = "TCP") -> None:
        self.services, self.family, self.elsewhere, self.protocol = services, family, elsewhere, protocol
        self.backend = (SECOND if elsewhere else POD)[family]
        self.port = CLIENT
        (put_elsewhere if elsewhere else put)(services, family, protocol)

    def ask(self, flags: str = "A") -> int:
        """The client's packet; gives the port by which the backend knows the client."""
        packet = ip(self.family, REMOTE[self.family], NODE[self.family]) / segment(self.protocol, CLIENT, PORT, flags)
        result, data = (forward if self.elsewhere else arrive)(self.services, packet)
        assert result == PASS
        frame = Ether(data)
        assert frame[1].dst == self.backend
        self.port = frame[LAYERS[self.protocol]].sport
        return self.port

    def answer(self, flags: str = "A") -> tuple[str, int, str, int]:
        """What becomes of the backend's packet: source and destination, address and port."""
        client = (NODE if self.elsewhere else REMOTE)[self.family]
        packet = ip(self.family, self.backend, client) / segment(self.protocol, TARGET, self.port, flags)
        result, data = (forward if self.elsewhere else leave)(self.services, packet)
        assert result == PASS
        frame = Ether(data)
        kind = LAYERS[self.protocol]
        return frame[1].src, frame[kind].sport, frame[1].dst, frame[kind].dport

    def establish(self) -> None:
        self.ask("S")
        self.answer("SA")
        self.ask()
        self.answer()

    @property
    def served(self) -> bool:
        """Whether the backend's next packet is the service's."""
        return self.answer()[:2] == (NODE[self.family], PORT)

    @property
    def taken(self) -> bool:
        """Whether somebody's packet with the flow's tuple would be taken for an answer of the service."""
        source, port, target, target_port = self.answer("SA")
        if self.elsewhere:
            return (source, port, target, target_port) != (self.backend, TARGET, NODE[self.family], self.port)
        return port == PORT


ELSEWHERE = pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@EVERY_FAMILY
@ELSEWHERE
@pytest.mark.parametrize("protocol", LAYERS)
def test_a_flow_lives_as_long_as_conntrack_lets_it(
    services: Services, family: int, elsewhere: bool, protocol: str
) -> None:
    flow = Flow(services, family, elsewhere, protocol)
    flow.establish()
    for _ in range(3):  # answers alone keep it
        age(services, IDLE[protocol] - 5)
        assert flow.served
    for _ in range(3):  # and so do questions
        age(services, IDLE[protocol] - 5)
        flow.ask()
    assert flow.served
    collect(services)
    assert flow.served


def closed(flow: Flow) -> None:
    flow.ask("FA")
    flow.answer("FA")
    flow.ask()
    age(flow.services, 11)


def reset(flow: Flow) -> None:
    flow.answer("RA")
    age(flow.services, 11)


def idle(flow: Flow) -> None:
    age(flow.services, IDLE[flow.protocol] + 5)


def begun_by_client(flow: Flow) -> None:
    """A flow of its own from the same place to the same place, past the service."""
    if flow.elsewhere:
        leave_own(
            flow.services,
            ip(flow.family, NODE[flow.family], flow.backend) / segment(flow.protocol, flow.port, TARGET, "S"),
        )
    else:
        packet = ip(flow.family, REMOTE[flow.family], flow.backend) / segment(flow.protocol, flow.port, TARGET, "S")
        assert arrive(flow.services, packet)[1] == bytes(Ether(**MACS) / packet)


def begun_by_backend(flow: Flow) -> None:
    flow.answer("S")


@pytest.mark.xfail(
    strict=True, reason="entries of node ports have no lifetime and capture later flows of the same tuple"
)
@EVERY_FAMILY
@ELSEWHERE
@pytest.mark.parametrize("over", [closed, reset, idle, begun_by_client, begun_by_backend])
def test_what_a_connection_left_behind_captures_nothing(
    services: Services, family: int, elsewhere: bool, over: Callable[[Flow], None]
) -> None:
    flow = Flow(services, family, elsewhere)
    flow.establish()
    assert flow.taken
    over(flow)
    assert not flow.taken


@pytest.mark.xfail(
    strict=True, reason="entries of node ports have no lifetime and capture later flows of the same tuple"
)
@EVERY_FAMILY
@pytest.mark.parametrize(("elsewhere", "over"), [(False, idle), (True, idle), (False, begun_by_client)])
def test_what_datagrams_left_behind_captures_nothing(
    services: Services, family: int, elsewhere: bool, over: Callable[[Flow], None]
) -> None:
    flow = Flow(services, family, elsewhere, "UDP")
    flow.establish()
    assert flow.taken
    over(flow)
    assert not flow.taken


@pytest.mark.xfail(
    strict=True, reason="entries of node ports have no lifetime and capture later flows of the same tuple"
)
@EVERY_FAMILY
@ELSEWHERE
@pytest.mark.parametrize("flags", ["S", "A"])
def test_what_was_never_answered_lives_briefly(services: Services, family: int, elsewhere: bool, flags: str) -> None:
    flow = Flow(services, family, elsewhere)
    for _ in range(3):
        flow.ask(flags)
    age(services, 61)
    assert not flow.taken


@EVERY_FAMILY
@ELSEWHERE
def test_a_connection_that_begins_again_from_the_same_port_is_served(
    services: Services, family: int, elsewhere: bool
) -> None:
    flow = Flow(services, family, elsewhere)
    for over in (closed, reset, idle, begun_by_client, begun_by_backend):
        flow.establish()
        assert flow.served
        over(flow)
    flow.establish()
    assert flow.served


@pytest.mark.xfail(strict=True, reason="nobody collects the clients of other nodes' backends")
@EVERY_FAMILY
@ELSEWHERE
@pytest.mark.parametrize("over", [closed, reset, idle])
def test_what_is_over_is_collected(
    services: Services, family: int, elsewhere: bool, over: Callable[[Flow], None]
) -> None:
    flow = Flow(services, family, elsewhere)
    flow.establish()
    collect(services)
    assert sum(entries(services).values()) > 1
    over(flow)
    age(services, 60)
    collect(services)
    assert entries(services) == {"ciliate_lb_flow": 0, "ciliate_lb_client": 0}


def flood(services: Services, family: int, client: str, first: int, count: int, flags: str = "S") -> int:
    """Packets to the node port from many ports of a client; how many of them passed."""
    frame = bytearray(bytes(Ether(**MACS) / ip(family, client, NODE[family]) / segment("TCP", 1, PORT, flags)))
    descriptor, given, at = services.programs.object.program_fd("from_netdev"), context(), 34 if family == 4 else 54

    def send() -> int:
        passed = 0
        for port in range(first, first + count):
            frame[at : at + 2] = port.to_bytes(2, "big")
            passed += bpf.test_run(descriptor, frame, given)[0] == PASS
        return passed

    found: int = services.programs.inside(send)
    return found


@pytest.mark.xfail(strict=True, reason="28,232 connections of one client leave no port to anybody")
@EVERY_FAMILY
@pytest.mark.parametrize("flags", ["S", "A"])
def test_one_client_leaves_ports_to_the_others(services: Services, family: int, flags: str) -> None:
    put_elsewhere(services, family)
    established = Flow(services, family, elsewhere=True)
    established.establish()
    assert flood(services, family, ROUTER[family], 32768, 28232, flags) < 10000
    assert flood(services, family, REMOTE[family], 50000, 100) == 100
    assert established.served


@pytest.mark.xfail(strict=True, reason="a port that a service has is lent to a client, whose answers go to the service")
def test_a_port_of_the_nodes_own_sockets_and_services_is_not_lent(services: Services) -> None:
    """Else answers would go to the service, or the socket lose its own."""
    first = Flow(services, 4, elsewhere=True)
    lent = first.ask("S")
    for _ in range(3):
        services.forget()
        put(services, 4, port=lent)
        other = first.ask("S")
        assert other != lent
        services.forget()
        with services.programs.listen(socket.SOCK_STREAM, NODE[4], other):
            assert first.ask("S") not in (lent, other)
