"""Services from outside at the node's devices, with masquerading beside them. Tier bpf."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest
from bpf_harness import REDIRECT, SHOT
from nodeport_harness import FAMILIES, OUTSIDE, PORT, TARGET, arrive, forward, ip, leave, put, put_elsewhere
from scapy.layers.inet import TCP, UDP, IPerror
from scapy.layers.inet6 import ICMPv6DestUnreach
from scapy.layers.l2 import Ether
from service_harness import Services, l4, parsed, unreachable
from snat_harness import GATEWAY, MACS, NODE, PASS, POD, REMOTE, ROUTER, SECOND, Snat

from ciliate.datapath import layout, lblayout

NO_BACKEND, NO_RANGE = 158, 199


@pytest.fixture(scope="module")
def loaded_snat(templates: Path) -> Iterator[Snat]:
    programs = Snat(templates, more=("CILIATE_SERVICES",))
    yield programs
    programs.close()


@pytest.fixture
def services(loaded_snat: Snat) -> Services:
    loaded_snat.reset()
    return Services(loaded_snat)


LAYERS = {"TCP": TCP, "UDP": UDP}


@pytest.mark.parametrize("protocol", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(services: Services, family: int, protocol: str) -> None:
    """The client's address stays, and masquerading leaves the answers alone."""
    put(services, family, protocol)
    kind = LAYERS[protocol]
    result, data = arrive(services, ip(family, REMOTE[family], NODE[family]) / l4(protocol, 4000, PORT))
    frame = parsed(data)
    assert result == PASS
    assert (frame[1].src, frame[1].dst) == (REMOTE[family], POD[family])
    assert (frame[kind].sport, frame[kind].dport) == (4000, TARGET)
    result, data = leave(services, ip(family, POD[family], REMOTE[family]) / l4(protocol, TARGET, 4000, flags="SA"))
    frame = parsed(data)
    assert result == PASS
    assert (frame[1].src, frame[1].dst) == (NODE[family], REMOTE[family])
    assert (frame[kind].sport, frame[kind].dport) == (PORT, 4000)


@pytest.mark.parametrize("family", FAMILIES)
def test_cluster_addresses_are_not_for_the_outside(services: Services, family: int) -> None:
    put(services, family, flags=0)
    packet = ip(family, REMOTE[family], NODE[family]) / l4("TCP", 4000, PORT)
    assert arrive(services, packet) == (PASS, bytes(Ether(**MACS) / packet))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("local", [True, False], ids=["Local", "Cluster"])
def test_which_backends_serve(services: Services, family: int, local: bool) -> None:
    """With the policy Local those of this node, with Cluster all of them."""
    both = [(SECOND[family], TARGET), (POD[family], TARGET)]
    flags = OUTSIDE | lblayout.LOCAL_ONLY if local else OUTSIDE
    put(services, family, backends=both, local=[POD[family]], flags=flags)
    seen = set()
    for port in range(4000, 4060):
        _, data = arrive(services, ip(family, REMOTE[family], NODE[family]) / l4("TCP", port, PORT))
        seen.add(Ether(data)[1].dst)
    assert seen == {POD[family]} if local else {POD[family], SECOND[family]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("maglev", [False, True], ids=["random", "maglev"])
def test_local_falls_back_to_what_terminates_here(services: Services, family: int, maglev: bool) -> None:
    """Where a backend elsewhere is ready, pods and Cluster have that; from outside Local has what serves here still."""
    both = [(SECOND[family], TARGET), (POD[family], TARGET)]
    for flags, expected in ((OUTSIDE | lblayout.LOCAL_ONLY, POD), (OUTSIDE, SECOND)):
        put(services, family, backends=both, local=[POD[family]], ending=[POD[family]], flags=flags, maglev=maglev)
        services.forget()
        seen = set()
        for port in range(4000, 4020):
            _, data = arrive(services, ip(family, REMOTE[family], NODE[family]) / l4("TCP", port, PORT))
            seen.add(Ether(data)[1].dst)
        assert seen == {expected[family]}


@pytest.mark.parametrize("protocol", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_nodes_backend_answers_by_this_node(services: Services, family: int, protocol: str) -> None:
    """The client's address becomes the node's, and its port one of the node's: two clients with one are told apart."""
    put_elsewhere(services, family, protocol)
    kind, ports = LAYERS[protocol], {}
    for client in (REMOTE[family], ROUTER[family]):
        result, data = forward(services, ip(family, client, NODE[family]) / l4(protocol, 4000, PORT))
        frame = parsed(data)
        assert result == PASS
        assert (frame[1].src, frame[1].dst, frame[kind].dport) == (NODE[family], SECOND[family], TARGET)
        ports[client] = frame[kind].sport
    assert ports[REMOTE[family]] != ports[ROUTER[family]]
    for client, port in ports.items():
        for _ in range(2):
            result, data = forward(
                services, ip(family, SECOND[family], NODE[family]) / l4(protocol, TARGET, port, flags="SA")
            )
            frame = parsed(data)
            assert result == PASS
            assert (frame[1].src, frame[1].dst) == (NODE[family], client)
            assert (frame[kind].sport, frame[kind].dport) == (PORT, 4000)
        _, data = forward(services, ip(family, client, NODE[family]) / l4(protocol, 4000, PORT))
        assert Ether(data)[kind].sport == port


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_another_nodes_backend_find_the_client(services: Services, family: int) -> None:
    put_elsewhere(services, family, "UDP")
    _, data = forward(services, ip(family, REMOTE[family], NODE[family]) / l4("UDP", 4000, PORT))
    result, data = forward(services, unreachable(family, Ether(data)[1], SECOND[family], NODE[family]))
    frame = parsed(data)
    assert result == PASS
    assert (frame[1].src, frame[1].dst) == (NODE[family], REMOTE[family])
    inner = frame[IPerror] if family == 4 else frame[ICMPv6DestUnreach].payload
    assert (inner.src, inner.dst) == (REMOTE[family], NODE[family])
    assert (inner.payload.sport, inner.payload.dport) == (4000, PORT)


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_outside_has_an_address_of_the_node(services: Services, family: int) -> None:
    put(services, family)
    for source in (NODE, GATEWAY):
        assert arrive(services, ip(family, source[family], POD[family]) / l4("TCP", 4000, PORT))[0] == SHOT


@pytest.mark.parametrize("protocol", LAYERS)
@pytest.mark.parametrize("target", [NODE, POD], ids=["node", "pod"])
def test_nobody_outside_opens_a_flow_with_another_address_of_the_node(
    services: Services, protocol: str, target: dict[int, str]
) -> None:
    own, key = "2001:db8::77", layout.ipcache_key(ip_network("2001:db8::77"))
    ipcache = services.programs.maps["ciliate_ipcache"]
    ipcache.update(key, layout.ipcache_entry(1))
    try:
        before = services.programs.reasons().get((132, 0), 0)
        assert arrive(services, ip(6, own, target[6]) / l4(protocol, 4000, 81))[0] == SHOT
        assert services.programs.reasons()[132, 0] == before + 1
    finally:
        ipcache.delete(key)
    assert arrive(services, ip(6, own, target[6]) / l4(protocol, 4000, 81))[0] == PASS


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_backend_here_local_is_silent_and_cluster_refuses(services: Services, family: int) -> None:
    """A balancer in front takes silence for the sign to ask another node."""
    packet = ip(family, REMOTE[family], NODE[family]) / l4("TCP", 4000, PORT)
    put(services, family, local=[], flags=OUTSIDE | lblayout.LOCAL_ONLY)
    assert arrive(services, packet)[0] == SHOT
    put(services, family, backends=[], flags=OUTSIDE)
    result, data = arrive(services, packet)
    frame = parsed(data)
    assert result == REDIRECT
    assert (frame.src, frame.dst) == (MACS["dst"], MACS["src"])
    assert (frame[1].src, frame[1].dst) == (NODE[family], REMOTE[family])
    assert "R" in frame[TCP].flags
    assert (NO_BACKEND, 0) in services.programs.reasons()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_sources_in_the_ranges(services: Services, family: int) -> None:
    ranges = ["198.51.100.0/29"] if family == 4 else ["2001:db8:1::/125"]
    put(services, family, ranges=ranges)
    before = services.programs.reasons().get((NO_RANGE, 0), 0)
    assert arrive(services, ip(family, REMOTE[family], NODE[family]) / l4("TCP", 4000, PORT))[0] == PASS
    assert arrive(services, ip(family, SECOND[family], NODE[family]) / l4("TCP", 4000, PORT))[0] == SHOT
    assert services.programs.reasons()[NO_RANGE, 0] == before + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_about_answers_find_the_backend(services: Services, family: int) -> None:
    put(services, family, "UDP")
    arrive(services, ip(family, REMOTE[family], NODE[family]) / l4("UDP", 4000, PORT))
    _, data = leave(services, ip(family, POD[family], REMOTE[family]) / l4("UDP", TARGET, 4000))
    result, data = arrive(services, unreachable(family, Ether(data)[1], ROUTER[family], NODE[family]))
    frame = parsed(data)
    assert result == PASS
    assert frame[1].dst == POD[family]
    inner = frame[IPerror] if family == 4 else frame[ICMPv6DestUnreach].payload
    assert (inner.src, inner.payload.sport) == (POD[family], TARGET)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_backends_come_from_the_service(services: Services, family: int) -> None:
    put(services, family, "UDP")
    _, data = arrive(services, ip(family, REMOTE[family], NODE[family]) / l4("UDP", 4000, PORT))
    result, data = leave(services, unreachable(family, Ether(data)[1], POD[family], REMOTE[family]))
    frame = parsed(data)
    assert result == PASS
    assert frame[1].src == NODE[family]
    inner = frame[IPerror] if family == 4 else frame[ICMPv6DestUnreach].payload
    assert (inner.dst, inner.payload.dport) == (NODE[family], PORT)
