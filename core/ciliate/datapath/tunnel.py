"""The tunnel between nodes: its device, and the programs that run with it. Blocking: call from threads.

The device is one of VXLAN in collect-metadata mode: programs say for each packet which node it goes to and which
number (the sender's identity) it carries. Geneve uses the same device on Geneve's port; `lib/geneve.h` exchanges the
header where packets leave and enter the node. A device that is as it should be is used as it is, so a new agent
interrupts nothing.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Literal

import msgspec

from ciliate.datapath import devices
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.netlink import route
from ciliate.datapath.nodeprograms import NodeFeature
from ciliate.datapath.pins import PinDirectory

log = logging.getLogger(__name__)
PORTS = {"vxlan": 8472, "geneve": 6081}
"""UDP port of each protocol where none is chosen; the first is that of Linux and of Cilium, not IANA's 4789."""
OVERHEAD = {4: 50, 6: 70}
"""Bytes of the outer headers by IP version of the network between nodes: IP, UDP 8, tunnel 8, Ethernet 14."""
DEVICES = {"vxlan": "ciliate_vxlan", "geneve": "ciliate_geneve"}
Address = IPv4Address | IPv6Address


class TunnelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How packets reach other nodes.

    ``port`` 0 is the protocol's own. ``mtu`` is that of packets inside the tunnel, 0 leaves the kernel's. ``families``
    are the IP versions of the network between nodes that this node has, the preferred one first. ``uplinks`` are the
    devices that lead out of the node.
    """

    protocol: Literal["vxlan", "geneve"]
    port: int = 0
    mtu: int = 0
    families: tuple[int, ...] = (4, 6)
    uplinks: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """The device's name."""
        return DEVICES[self.protocol]

    @property
    def udp_port(self) -> int:
        """The UDP port of both ends."""
        return self.port or PORTS[self.protocol]

    def address(self, ipv4: IPv4Address | None, ipv6: IPv6Address | None) -> Address | None:
        """Where a node with these addresses is tunnelled to; None where it has none that this node can reach."""
        found = {4: ipv4, 6: ipv6}
        return next((address for version in self.families if (address := found[version]) is not None), None)


def ensure_device(config: TunnelConfig) -> int:
    """The tunnel device, up; returns its interface index. One of another kind or port is made anew."""
    name = config.device
    with devices.doing(f"tunnel device {name}"):
        link = devices.find_link(name)
        if link is not None and not _fits(link, config):
            log.info("tunnel device %s: is not what is wanted and is made anew", name)
            route().link("del", index=link["index"])
            link = None
        if link is None:
            _free_port(config)
            route().link("add", ifname=name, kind="vxlan", **_parameters(config))
            link = devices.find_link(name)
        if link is None:
            raise DatapathError(errno.ENODEV, f"device {name}: vanished while it was made")
        index: int = link["index"]
        devices.quiet_device(name)
        # nobody resolves neighbours there: programs alone send to it
        wanted: dict[str, Any] = {"arp": False, "state": "up"}
        if config.mtu and link.get("IFLA_MTU") != config.mtu:
            wanted["mtu"] = config.mtu
        route().link("set", index=index, **wanted)
        return index


def _parameters(config: TunnelConfig) -> dict[str, Any]:
    return {
        "vxlan_collect_metadata": True,
        "vxlan_learning": False,
        "vxlan_port": config.udp_port,
        # other implementations leave the checksum out, which is allowed for tunnels (RFC 6935)
        "vxlan_udp_zero_csum6_rx": True,
    }


def _fits(link: Any, config: TunnelConfig) -> bool:
    info = link.get("IFLA_LINKINFO")
    if info is None or info.get("IFLA_INFO_KIND") != "vxlan":
        return False
    data = info.get("IFLA_INFO_DATA")
    return bool(data.get("IFLA_VXLAN_COLLECT_METADATA")) and data.get("IFLA_VXLAN_PORT") == config.udp_port


def _free_port(config: TunnelConfig) -> None:
    """Two devices cannot share a port: one of the other protocol goes first where it has this one's."""
    for name in DEVICES.values():
        link = devices.find_link(name)
        if link is not None and _fits(link, config):
            route().link("del", index=link["index"])


def remove_devices(keep: TunnelConfig | None) -> list[str]:
    """Remove tunnel devices of other modes, which nothing refers to any more; returns their names."""
    wanted = keep.device if keep else None
    return [name for name in DEVICES.values() if name != wanted and devices.delete_device(name)]


def prepare_router(index: int, mtu: int) -> None:
    """Make the router device carry packets to other nodes: it resolves no neighbours, and its MTU is the tunnel's."""
    wanted: dict[str, Any] = {"arp": False}
    if mtu:
        wanted["mtu"] = mtu
    with devices.doing("router device"):
        route().link("set", index=index, **wanted)


def constants(index: int, config: TunnelConfig | None) -> dict[str, bytes]:
    """What the endpoint, overlay and host programs need to know; 0 for no tunnel."""
    port = config.udp_port if config else 0
    return {"tunnel_ifindex": index.to_bytes(4, "little"), "tunnel_port": port.to_bytes(2, "big")}


def features(config: TunnelConfig, router: str, loaded: Callable[[PinDirectory], None]) -> Sequence[NodeFeature]:
    """What runs on the tunnel device, the router device and, for Geneve, the uplinks.

    ``loaded`` fills the map of nodes before a packet meets a program that asks it.
    """
    found = [
        NodeFeature("tunnel", "overlay", (config.device,), loaded=loaded),
        NodeFeature("tunnel-host", "host", (router,)),
    ]
    if config.protocol == "geneve":
        port = config.udp_port.to_bytes(2, "big")
        found.append(
            NodeFeature(
                "tunnel-geneve",
                "netdev",
                config.uplinks,
                defines=("CILIATE_GENEVE",),
                constants={"tunnel_port": port},
                loaded=loaded,
            )
        )
    return found
