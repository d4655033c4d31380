"""What a pod could make up to get past a policy, or to harm others' flows, as tables of packets. Tier bpf."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from bpf_harness import PEER, PEER4, PEER6, PEER_ID, POD, ROUTER4, ROUTER6, WORLD4, WORLD6, Programs
from frames import ALLOW, FAMILIES, FROM_NODE, E, ip, pod
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.packet import Packet

from ciliate.datapath import layout
from ciliate.policy.mapstate import INGRESS, PolicyKey


def of(family: int, four: str, six: str) -> str:
    return four if family == 4 else six


def unreachable(family: int, src: str, dst: str, inner: Packet) -> Packet:
    """An ICMP error about a packet."""
    if family == 4:
        return IP(src=src, dst=dst) / ICMP(type=3, code=3) / inner
    return IPv6(src=src, dst=dst) / ICMPv6DestUnreach(code=4) / inner


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_complains_of_what_it_was_sent_and_of_nothing_else(programs: Programs, family: int) -> None:
    """An error about another's packet would pass the receiver's policy as part of that flow."""
    peer, world, router = (of(family, *pair) for pair in ((PEER4, PEER6), (WORLD4, WORLD6), (ROUTER4, ROUTER6)))
    programs.enforce(POD, {}, ingress=True)
    asked = {target: ip(family, src=pod(family), dst=target) / UDP(sport=5, dport=53) for target in (peer, world)}
    for packet in asked.values():
        assert programs.why(E / packet) == 0
    table = [(peer, peer, 0), (peer, world, 187), (world, world, 0), (world, peer, 0), (router, peer, 0)]
    for sender, about, reason in table:
        error = FROM_NODE / unreachable(family, sender, pod(family), asked[about])
        assert programs.why(error, receive=True) == reason, (sender, about)


LAYERS = {"tcp": TCP(sport=80, dport=5, flags="A"), "udp": UDP(sport=53, dport=5)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("answer", [True, False], ids=["answer", "request"])
def test_who_forges_a_pod_of_the_node_from_outside_holds_no_flow_of_it(
    programs: Programs, family: int, kind: str, answer: bool
) -> None:
    """It comes from another device than the pod's. The flow goes on undisturbed."""
    me, peer, layer = pod(family), of(family, PEER4, PEER6), LAYERS[kind].copy()
    if not answer:
        layer.sport, layer.dport = layer.dport, layer.sport
    mine = layer.copy()
    mine.sport, mine.dport = layer.dport, layer.sport
    programs.enforce(POD, {} if answer else {PolicyKey(INGRESS, PEER_ID): ALLOW}, ingress=True)
    forged = FROM_NODE / ip(family, src=peer, dst=me) / layer
    ours = E / ip(family, src=me, dst=peer) / mine
    if answer:
        assert programs.why(ours) == 0
    else:
        assert programs.why(forged, receive=True) == 0
    info = layout.ENDPOINT_INFO.pack(2, PEER_ID, PEER, 0, bytes(6), bytes(6))
    programs.maps["ciliate_lxc"].update(layout.endpoint_key(ip_address(peer)), info)
    assert programs.why(forged, receive=True) == 132
    programs.endpoint(PEER)
    assert programs.why(forged, receive=True) == 0
