"""Fragments from outside that the node puts together and takes apart again. Tier bpf.

The kernel's connection tracking, which any rule of iptables with states brings, puts together what is forwarded. The
parts that it sends on are packets of its own making, without the device where they came from.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess

import pytest
from live_harness import SERVER, InNode, Net, address, connect_all, family_of, listen
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import HBHOptUnknown, IPv6, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

PORT = 99
OUTSIDE = {4: "192.0.2.9", 6: "2001:db8:9::9"}
NEAR = {4: "192.0.2.1", 6: "2001:db8:9::1"}
NEAR_MAC, OUTSIDE_MAC = "02:00:00:00:09:01", "02:00:00:00:09:09"
LENGTH = 3000
STEP = 1200


def run(net: Net, name: str, *commands: str) -> str:
    prefix = ["nsenter", f"--net=/run/netns/{net.tag}{name}"]
    return "".join(subprocess.run([*prefix, *c.split()], check=True, text=True, stdout=-1).stdout for c in commands)


@pytest.fixture
def outside(net: Net) -> Net:
    """A host beside the node, in whose namespace connection tracking runs."""
    net.add("world")
    run(
        net,
        "node",
        f"ip link add out0 address {NEAR_MAC} type veth peer name out0 address {OUTSIDE_MAC} netns {net.tag}world",
        f"ip addr add {NEAR[4]}/24 dev out0",
        f"ip addr add {NEAR[6]}/64 dev out0 nodad",
        "ip link set out0 up",
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
        "iptables -A FORWARD -m conntrack --ctstate INVALID -j ACCEPT",
        "ip6tables -A FORWARD -m conntrack --ctstate INVALID -j ACCEPT",
    )
    run(net, "world", f"ip addr add {OUTSIDE[4]}/24 dev out0", f"ip addr add {OUTSIDE[6]}/64 dev out0 nodad")
    run(net, "world", "ip link set out0 up")
    return net


def fragments(family: int, port: int, padding: int) -> list[Packet]:
    """A datagram in parts. With many options before the first part, the kernel has no room for them in the others, and
    makes new ones when it takes the datagram apart."""
    whole = bytes(UDP(sport=4000, dport=port, len=8 + LENGTH, chksum=0 if family == 4 else None) / Raw(b"x" * LENGTH))
    target = address(SERVER, family)
    if family == 6:
        whole = bytes(IPv6(src=OUTSIDE[6], dst=target) / UDP(sport=4000, dport=port) / Raw(b"x" * LENGTH))[40:]
    found = []
    for start in range(0, len(whole), STEP):
        part, more = whole[start : start + STEP], start + STEP < len(whole)
        if family == 4:
            header = IP(src=OUTSIDE[4], dst=target, id=7, flags="MF" if more else 0, frag=start // 8, proto=17)
        else:
            header = IPv6(src=OUTSIDE[6], dst=target)
            if padding and not start:
                header /= IPv6ExtHdrHopByHop(
                    options=[HBHOptUnknown(otype=0x1E, optlen=padding, optdata=bytes(padding))]
                )
            header /= IPv6ExtHdrFragment(id=7, m=int(more), offset=start // 8, nh=17)
        found.append(header / Raw(part))
    return found


def arrives(net: Net, server: socket.socket, family: int, port: int, padding: int) -> bool:
    packets = [Ether(src=OUTSIDE_MAC, dst=NEAR_MAC) / part for part in fragments(family, port, padding)]

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind(("out0", 0))
            for packet in packets:
                sock.send(bytes(packet))

    net.run("world", send)
    server.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        return len(server.recv(LENGTH + 1)) == LENGTH
    return False


@pytest.mark.parametrize(("family", "padding"), [(4, 0), (6, 0), (6, 220)])
async def test_what_comes_from_outside_in_parts_is_not_from_the_node(
    outside: Net, node: InNode, family: int, padding: int
) -> None:
    await connect_all(node)
    with listen(outside, socket.SOCK_DGRAM, address(SERVER, family), PORT) as server:
        assert not arrives(outside, server, family, PORT, padding)

    def from_node() -> None:
        with socket.socket(family_of(address(SERVER, family)), socket.SOCK_DGRAM) as sock:
            sock.sendto(b"y" * LENGTH, (address(SERVER, family), PORT))

    with listen(outside, socket.SOCK_DGRAM, address(SERVER, family), PORT) as server:
        outside.run("node", from_node)
        server.settimeout(2)
        assert server.recv(LENGTH + 1) == b"y" * LENGTH
