"""What the datapath is told: about its node, its endpoints, and what they may do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

import msgspec

from ciliate.datapath import layout
from ciliate.datapath.feature import Feature
from ciliate.datapath.tunnel import TunnelConfig
from ciliate.policy.mapstate import MapState, PolicyEntry, PolicyKey

MONITOR_LEVELS = {
    "none": layout.MONITOR_TRACE_ALL | layout.MONITOR_VERDICT | layout.MONITOR_TRACE_FROM,
    "low": layout.MONITOR_TRACE_ALL | layout.MONITOR_VERDICT,
    "medium": layout.MONITOR_TRACE_NEW | layout.MONITOR_VERDICT,
    "maximum": layout.MONITOR_VERDICT,
}


class DatapathConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for every endpoint of the node. Without ``tunnel`` packets to other nodes' pods are routed, and
    ``node_routes`` says whether the routes are ours to make.
    """

    state_dir: Path
    instance: str = "default"
    bpf_root: Path = Path("/sys/fs/bpf")
    enable_ipv4: bool = True
    enable_ipv6: bool = True
    router4: IPv4Address | None = None
    router6: IPv6Address | None = None
    ct_tcp_max: int = 524288
    ct_any_max: int = 262144
    router_device: tuple[str, str] = ("ciliate_host", "ciliate_net")
    monitor: str = "medium"
    features: tuple[Feature, ...] = ()
    build: str = "auto"
    debug: bool = False
    sizes: Mapping[str, int] = {}
    node_routes: bool = False
    tunnel: TunnelConfig | None = None


class EndpointConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint as the datapath sees it. MACs are 6 bytes; ``node_mac`` is that of the host side.

    ``external``: somebody else made the device and connects it. ``through_stack``: packets of other pods of the node
    take the way through the node's stack (bridges, routes, port mappings) instead of the short one. ``monitor``: what
    is told of its packets (``layout.MONITOR_*``, one byte); without ``MONITOR_OWN`` as the node says.
    ``link_local``: its address on a device of somebody else.
    """

    id: int
    ifindex: int
    ifname: str
    identity: int
    mac: bytes
    node_mac: bytes
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    enforce_ingress: bool = False
    enforce_egress: bool = False
    external: bool = False
    through_stack: bool = False
    link_local: IPv6Address | None = None
    monitor: int = 0

    @property
    def addresses(self) -> list[layout.Address]:
        """The endpoint's addresses."""
        return [address for address in (self.ipv4, self.ipv6) if address is not None]

    @property
    def interface_id(self) -> bytes:
        """The lower half of the link-local address: as told, else as the kernel makes it of the MAC address."""
        if self.link_local is not None:
            return self.link_local.packed[8:]
        return bytes([self.mac[0] ^ 2]) + self.mac[1:3] + b"\xff\xfe" + self.mac[3:]


class PolicyChange(NamedTuple):
    """A delta of one endpoint's policy. ``enforce``: whether ingress and egress are enforced."""

    endpoint: int
    upserts: MapState
    deletes: Collection[PolicyKey]
    enforce: tuple[bool, bool]


class Present(msgspec.Struct, frozen=True):
    """What the kernel enforces for an endpoint."""

    map_state: dict[PolicyKey, PolicyEntry]
    enforce_ingress: bool
    enforce_egress: bool
