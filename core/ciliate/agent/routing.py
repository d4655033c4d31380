"""From options to how packets reach other nodes. Blocking: call in a thread, in the agent's namespace."""

from __future__ import annotations

import logging

from ciliate.config import AgentConfig
from ciliate.datapath import devices, nodefilters
from ciliate.datapath.noderoutes import own_address
from ciliate.datapath.tunnel import OVERHEAD, TunnelConfig

log = logging.getLogger(__name__)
SMALLEST_MTU = 1280
"""What IPv6 asks of every link (RFC 8200 section 5)."""


def tunnel_config(config: AgentConfig) -> TunnelConfig | None:
    """The tunnel that the options ask for, fitted to the devices that lead out of the node; None for direct routing."""
    if config.tunnel == "disabled":
        return None
    uplinks = tuple(nodefilters.native_devices(config.devices))
    families = _families(config)
    return TunnelConfig(
        protocol=config.tunnel,
        port=config.tunnel_port,
        mtu=config.mtu or inner_mtu(uplinks, families),
        families=families,
        uplinks=uplinks,
    )


def _families(config: AgentConfig) -> tuple[int, ...]:
    """The IP versions with which other nodes reach this one, IPv4 first. Where none is known yet, both may come."""
    chosen = {4: config.ipv4_node, 6: config.ipv6_node}
    found = [version for version, text in chosen.items() if text != "auto" or own_address(version) is not None]
    return tuple(found) or (4, 6)


def inner_mtu(uplinks: tuple[str, ...], families: tuple[int, ...]) -> int:
    """The size of packets that fit into the tunnel on every uplink, or 0 where there is no uplink to ask."""
    sizes = [size for name in uplinks if (size := devices.mtu_of(name))]
    if not sizes:
        return 0
    wanted = min(sizes) - max(OVERHEAD[version] for version in families)
    if wanted < SMALLEST_MTU:
        log.warning("uplinks %s: their MTU leaves %d bytes inside the tunnel; IPv6 needs 1280", uplinks, wanted)
    return max(wanted, SMALLEST_MTU)
