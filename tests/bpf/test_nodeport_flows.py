"""How long what node ports remember of a flow counts, and how much of it one client may have. Tier bpf."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
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
from snat_harness import CLIENT_SHARE, MACS, NODE, PASS, POD, REMOTE, ROUTER, SECOND, Snat

from ciliate.datapath import bpf, layout
from ciliate.datapath.loadbalancer import Shares

LAYERS = {"TCP": TCP, "UDP": UDP}
CLIENT = 40000
SHARE_USED = 189
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


@EVERY_FAMILY
@pytest.mark.parametrize("flags", ["S", "A"])
def test_one_client_leaves_ports_to_the_others(services: Services, family: int, flags: str) -> None:
    put_elsewhere(services, family)
    established = Flow(services, family, elsewhere=True)
    established.establish()
    assert flood(services, family, ROUTER[family], 32768, 28232, flags) == CLIENT_SHARE
    assert flood(services, family, REMOTE[family], 50000, 100) == 100
    assert established.served


def test_a_port_of_the_nodes_own_sockets_and_services_is_not_lent(services: Services) -> None:
    """Else answers would go to the service, or the socket lose its own."""
    first = Flow(services, 4, elsewhere=True)
    lent = first.ask("S")
    services.forget()
    put(services, 4, port=lent)
    other = first.ask("S")
    assert other != lent
    services.forget()
    with services.programs.listen(socket.SOCK_STREAM, "0.0.0.0", other):
        assert first.ask("S") not in (lent, other)


def test_a_client_with_his_share_may_go_on_with_what_is_over(services: Services) -> None:
    """He is refused and counted while his flows live, and served again when they are over, collected or not."""
    put_elsewhere(services, 4)
    before = services.programs.reasons().get((SHARE_USED, 0), 0)
    passed = flood(services, 4, ROUTER[4], 1000, CLIENT_SHARE + 500)
    refused = services.programs.reasons()[SHARE_USED, 0] - before
    assert passed == CLIENT_SHARE
    assert refused == 500
    client = ip_address(ROUTER[4])
    assert collect(services) == Shares(CLIENT_SHARE, ((client, CLIENT_SHARE, refused),))
    assert flood(services, 4, ROUTER[4], 1000, 100) == 100  # the flows that he has
    age(services, 61)
    assert flood(services, 4, ROUTER[4], 20000, 100) > 90
    assert collect(services).held in range(91, 101)
    assert flood(services, 4, ROUTER[4], 30000, 100) == 100
    age(services, 61)
    assert collect(services) == Shares(0, ())
    assert entries(services, ["ciliate_lb_share"]) == {"ciliate_lb_share": 0}


def test_outside_a_client_of_ipv6_is_his_whole_network(services: Services) -> None:
    """He has as many addresses as he likes; a pod of the cluster has its own one, and its own share."""
    put_elsewhere(services, 6)
    host = int(ip_address(ROUTER[6]))
    neighbours = [str(ip_address(host + number)) for number in range(1, 4)]
    pod = "2001:db8:9::ffff"
    ipcache, key = services.programs.maps["ciliate_ipcache"], layout.ipcache_key(ip_network(pod))
    ipcache.update(key, layout.ipcache_entry(500))
    try:
        assert sum(flood(services, 6, text, 1000, CLIENT_SHARE // 3 + 200) for text in neighbours) == CLIENT_SHARE
        assert flood(services, 6, pod, 1000, 100) == 100
    finally:
        ipcache.delete(key)
    network = ip_address("2001:db8:9::")
    assert [item[:2] for item in collect(services).most] == [(network, CLIENT_SHARE), (ip_address(pod), 100)]
