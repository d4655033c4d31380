"""What the tests of masquerading send: packets of pods, of the node, of remotes."""

from __future__ import annotations

from typing import Any

from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.packet import Packet
from snat_harness import NODE, POD, REMOTE, ip

FAMILIES = [4, 6]
PORTS = (40000, 443)


def l4(protocol: str, source: int, target: int, **fields: Any) -> Packet:
    """A packet of a protocol between two ports, with something in it."""
    if protocol == "tcp":
        return TCP(sport=source, dport=target, **{"flags": "S", **fields}) / b"hello"
    if protocol == "udp":
        return UDP(sport=source, dport=target, **fields) / b"hello"
    return SCTP(sport=source, dport=target, tag=7) / SCTPChunkData(data=b"hello world!")


def send(
    family: int, protocol: str, pod: dict[int, str] = POD, ports: tuple[int, int] = PORTS, **fields: Any
) -> Packet:
    return ip(family, pod[family], REMOTE[family]) / l4(protocol, *ports, **fields)


def reply(family: int, protocol: str, port: int, remote: dict[int, str] = REMOTE, **fields: Any) -> Packet:
    fields = {"flags": "SA", **fields} if protocol == "tcp" else fields
    return ip(family, remote[family], NODE[family]) / l4(protocol, PORTS[1], port, **fields)


def echo(family: int, number: int, answer: bool = False) -> Packet:
    if family == 4:
        return ICMP(type=0 if answer else 8, id=number, seq=3) / b"hello"
    return (ICMPv6EchoReply if answer else ICMPv6EchoRequest)(id=number, seq=3, data=b"hello")
