"""Frames of the pod under test, and what is inside them."""

from __future__ import annotations

from typing import Any

from bpf_harness import NODE_MAC, PEER4, PEER6, POD4, POD6, POD_MAC
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from ciliate.policy.mapstate import PolicyEntry, Verdict

ALLOW, DENY, PROXY = PolicyEntry(Verdict.ALLOW), PolicyEntry(Verdict.DENY), PolicyEntry(Verdict.REDIRECT, 10001)
E = Ether(src=POD_MAC, dst=NODE_MAC)
FROM_NODE = Ether(src=NODE_MAC, dst=POD_MAC)  # without both addresses scapy would ask the network for them
FAMILIES = [4, 6]


def ip(family: int, src: str = "", dst: str = "", **fields: Any) -> Packet:
    """An IP header from POD to PEER, or between the given addresses."""
    if family == 4:
        return IP(src=src or POD4, dst=dst or PEER4, **fields)
    if "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    return IPv6(src=src or POD6, dst=dst or PEER6, **fields)


def pod(family: int) -> str:
    return POD4 if family == 4 else POD6


def peer(family: int) -> str:
    return PEER4 if family == 4 else PEER6


def echo(family: int, reply: bool = False, number: int = 77) -> Packet:
    if family == 4:
        return ICMP(type=0 if reply else 8, id=number)
    return (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=number)


VALID6 = IPv6(src=POD6, dst=PEER6)


VALID6 = ip(6)
