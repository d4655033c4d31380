"""What a pod could make up to get past a policy, or to harm others' flows, as tables of packets. Tier bpf."""

from __future__ import annotations

import pytest
from bpf_harness import PEER4, PEER6, POD, ROUTER4, ROUTER6, WORLD4, WORLD6, Programs
from frames import FAMILIES, FROM_NODE, E, ip, pod
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.packet import Packet


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
    table = [(peer, peer, 0), (peer, world, 133), (world, world, 0), (world, peer, 0), (router, peer, 0)]
    for sender, about, reason in table:
        error = FROM_NODE / unreachable(family, sender, pod(family), asked[about])
        assert programs.why(error, receive=True) == reason, (sender, about)
