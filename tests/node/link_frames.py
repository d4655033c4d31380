"""Frames that a pod on another plugin's link may send to its neighbours, and such as it may not."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import (
    ICMPv6MLQuery,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6NDOptUnknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    RouterAlert,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from ciliate.datapath.netlink import in_netns
from ciliate.lab import netns

SECRET = b"carried-past-policy"
ETH_P_ALL = 3
ALL_NODES, BROADCAST = "33:33:00:00:00:01", "ff:ff:ff:ff:ff:ff"


class End(NamedTuple):
    """Who is at one end of a link. ``local``: the IPv6 link-local address."""

    mac: str
    ipv4: str
    ipv6: str
    local: str


def forbidden(sender: End, victim: End, gateway: End) -> dict[str, Packet]:
    """What no pod may say to its neighbours, by what it would be good for."""
    to, all_nodes = Ether(src=sender.mac, dst=victim.mac), Ether(src=sender.mac, dst=ALL_NODES)
    own, mine = IPv6(src=sender.ipv6, dst=victim.ipv6, hlim=255), IPv6(src=sender.local, dst="ff02::1", hlim=255)
    source, target = ICMPv6NDOptSrcLLAddr(lladdr=sender.mac), ICMPv6NDOptDstLLAddr(lladdr=sender.mac)
    asks, tells = ICMPv6ND_NS(tgt=victim.ipv6), ICMPv6ND_NA(tgt=sender.ipv6, R=0, S=0, O=1)
    router = ICMPv6ND_RA(routerlifetime=1800) / source / ICMPv6NDOptPrefixInfo(prefix="2001:db8:66::", prefixlen=64)
    foreign = IPv6(src="2001:db8::666", dst=victim.ipv6, hlim=255)
    payload, stuffed = Raw(SECRET), ICMPv6NDOptUnknown(type=1, len=4, data=SECRET.ljust(30))
    claim = {"op": 2, "hwsrc": sender.mac, "hwdst": victim.mac, "pdst": victim.ipv4}
    group = IPv6ExtHdrHopByHop(options=[RouterAlert()])
    listener = IPv6(src=sender.local, dst="ff02::16", hlim=1) / group
    return {
        "solicitation of routers": all_nodes / mine / ICMPv6ND_RS() / source,
        "router advertisement": all_nodes / mine / router,
        "router advertisement to one": to / own / router,
        "router advertisement of the gateway": all_nodes / IPv6(src=gateway.local, dst="ff02::1", hlim=255) / router,
        "router advertisement behind options": all_nodes / mine / IPv6ExtHdrDestOpt() / router,
        "router advertisement in a fragment": all_nodes / mine / IPv6ExtHdrFragment() / router,
        "router advertisement in a VLAN": all_nodes / Dot1Q(vlan=0) / mine / router,
        "redirect": to
        / IPv6(src=gateway.local, dst=victim.ipv6, hlim=255)
        / ICMPv6ND_Redirect(tgt=sender.ipv6, dst="2001:db8::1"),
        "solicitation in the gateway's name": to / IPv6(src=gateway.ipv6, dst=victim.ipv6, hlim=255) / asks / source,
        "solicitation in the gateway's link-local name": to
        / IPv6(src=gateway.local, dst=victim.ipv6, hlim=255)
        / asks
        / source,
        "solicitation of nobody's": to / foreign / asks / source,
        "solicitation with another's MAC": to / own / asks / ICMPv6NDOptSrcLLAddr(lladdr=gateway.mac),
        "probe for the victim's address": to / IPv6(src="::", dst="ff02::1", hlim=255) / asks,
        "solicitation from afar": to / IPv6(src=sender.ipv6, dst=victim.ipv6, hlim=64) / asks / source,
        "solicitation with payload": to / own / asks / source / payload,
        "solicitation with a long option": to / own / asks / stuffed,
        "solicitation and a trailer": to / Raw(bytes(own / asks / source) + SECRET),
        "advertisement of the gateway": to / own / ICMPv6ND_NA(tgt=gateway.ipv6, R=0, S=0, O=1) / target,
        "advertisement of the gateway's link-local address": to
        / own
        / ICMPv6ND_NA(tgt=gateway.local, R=0, S=0, O=1)
        / target,
        "advertisement in the gateway's name": to
        / IPv6(src=gateway.ipv6, dst=victim.ipv6, hlim=255)
        / ICMPv6ND_NA(tgt=gateway.ipv6, R=0, S=0, O=1)
        / target,
        "advertisement of the victim's own address": to / own / ICMPv6ND_NA(tgt=victim.ipv6, R=0, S=0, O=1) / target,
        "advertisement as a router": to / own / ICMPv6ND_NA(tgt=sender.ipv6, R=1, S=0, O=1) / target,
        "advertisement of another's MAC": to / own / tells / ICMPv6NDOptDstLLAddr(lladdr=gateway.mac),
        "advertisement with payload": to / own / tells / target / payload,
        "advertisement behind options": to / own / IPv6ExtHdrDestOpt() / tells / target,
        "query of multicast listeners": all_nodes
        / IPv6(src=sender.local, dst="ff02::1", hlim=1)
        / group
        / ICMPv6MLQuery(),
        "report of a multicast listener": to / listener / ICMPv6MLReport(mladdr="ff02::1:2"),
        "report with payload": to / listener / ICMPv6MLReport2() / payload,
        "ARP answer of the gateway": to / ARP(psrc=gateway.ipv4, **claim),
        "ARP announcement of the gateway": to
        / ARP(op=1, hwsrc=sender.mac, psrc=gateway.ipv4, hwdst="00:00:00:00:00:00", pdst=gateway.ipv4),
        "ARP answer of the victim": to / ARP(psrc=victim.ipv4, **claim),
        "ARP with another's MAC": to
        / ARP(op=2, hwsrc=gateway.mac, psrc=sender.ipv4, hwdst=victim.mac, pdst=victim.ipv4),
        "ARP probe for the victim's address": to / ARP(op=1, hwsrc=sender.mac, psrc="0.0.0.0", pdst=victim.ipv4),
        "ARP in a VLAN": to / Dot1Q(vlan=0) / ARP(op=1, hwsrc=sender.mac, psrc=sender.ipv4, pdst=victim.ipv4),
        "ARP of another kind": to / ARP(op=8, hwsrc=sender.mac, psrc=sender.ipv4, pdst=victim.ipv4),
        "ARP with payload": to / ARP(op=1, hwsrc=sender.mac, psrc=sender.ipv4, pdst=victim.ipv4) / Raw(SECRET * 3),
        "ARP and a trailer": to / ARP(op=1, hwsrc=sender.mac, psrc=sender.ipv4, pdst=victim.ipv4) / Raw(SECRET[:18]),
        "LLDP": Ether(src=sender.mac, dst=victim.mac, type=0x88CC) / payload,
        "802.1X": Ether(src=sender.mac, dst=victim.mac, type=0x888E) / payload,
        "an ethertype for experiments": Ether(src=sender.mac, dst=victim.mac, type=0x88B5) / payload,
        "an offer of DHCP": Ether(src=sender.mac, dst=BROADCAST)
        / IP(src=sender.ipv4, dst="255.255.255.255")
        / UDP(sport=67, dport=68)
        / BOOTP(op=2)
        / DHCP(options=[("message-type", "offer"), "end"]),
    }


def allowed(sender: End, victim: End) -> dict[str, Packet]:
    """What neighbours need to hear of a pod."""
    to = Ether(src=sender.mac, dst=victim.mac)
    own, local = IPv6(src=sender.ipv6, dst=victim.ipv6, hlim=255), IPv6(src=sender.local, dst=victim.ipv6, hlim=255)
    asks = ICMPv6ND_NS(tgt=victim.ipv6) / ICMPv6NDOptSrcLLAddr(lladdr=sender.mac)
    tells = ICMPv6NDOptDstLLAddr(lladdr=sender.mac)
    return {
        "solicitation": to / own / asks,
        "solicitation from the link-local address": to / local / asks,
        "solicitation without an option": to / own / ICMPv6ND_NS(tgt=victim.ipv6),
        "probe for its own address": to / IPv6(src="::", dst="ff02::1", hlim=255) / ICMPv6ND_NS(tgt=sender.ipv6),
        "probe with a nonce": to
        / IPv6(src="::", dst="ff02::1", hlim=255)
        / ICMPv6ND_NS(tgt=sender.local)
        / ICMPv6NDOptUnknown(type=14, len=1, data=b"nonce6"),
        "advertisement": to / own / ICMPv6ND_NA(tgt=sender.ipv6, R=0, S=1, O=1) / tells,
        "advertisement of the link-local address": to / local / ICMPv6ND_NA(tgt=sender.local, R=0, S=0, O=1) / tells,
        "ARP question": to / ARP(op=1, hwsrc=sender.mac, psrc=sender.ipv4, pdst=victim.ipv4),
        "ARP answer": to / ARP(op=2, hwsrc=sender.mac, psrc=sender.ipv4, hwdst=victim.mac, pdst=victim.ipv4),
        "ARP announcement": to / ARP(op=1, hwsrc=sender.mac, psrc=sender.ipv4, pdst=sender.ipv4),
        "ARP probe for its own address": to / ARP(op=1, hwsrc=sender.mac, psrc="0.0.0.0", pdst=sender.ipv4),
    }


@contextlib.contextmanager
def link(namespace: str, ifname: str = "eth0") -> Iterator[socket.socket]:
    """A raw socket on an interface inside a namespace, which sends frames and hears all that come in."""
    file = os.open(netns.path(namespace), os.O_RDONLY)
    try:
        opened = in_netns(file, lambda: _open(ifname))
    finally:
        os.close(file)
    with opened:
        yield opened


def _open(ifname: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    opened.bind((ifname, ETH_P_ALL))
    opened.settimeout(10.0)
    return opened


def heard(hearer: socket.socket, sender: socket.socket, marker: bytes) -> list[bytes]:
    """What came in until the marker, a frame that is let through, came too."""
    sender.send(marker)
    frames = []
    while True:
        frame, (_, _, kind, _, _) = hearer.recvfrom(65536)
        if kind == socket.PACKET_OUTGOING:
            continue
        if frame == marker:
            return frames
        frames.append(frame)
