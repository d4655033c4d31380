"""From options to how packets reach other nodes. Blocking: call in a thread, in the agent's namespace."""

from __future__ import annotations

import logging

from ciliate.config import AgentConfig
from ciliate.datapath import devices, nodefilters
from ciliate.datapath.noderoutes import own_address
from ciliate.datapath.tunnel import OVERHEAD, TunnelConfig
from ciliate.mtu import Mtu, fit

log = logging.getLogger(__name__)


def tunnel_config(config: AgentConfig) -> TunnelConfig | None:
    """The tunnel that the options ask for, fitted to the devices that lead out of the node; None for direct routing."""
    if config.tunnel == "disabled":
        return None
    uplinks = tuple(nodefilters.native_devices(config.devices))
    families = _families(config)
    return TunnelConfig(
        protocol=config.tunnel,
        port=config.tunnel_port,
        mtu=node_mtu(config).route,
        families=families,
        uplinks=uplinks,
    )


def _families(config: AgentConfig) -> tuple[int, ...]:
    """The IP versions with which other nodes reach this one, IPv4 first. Where none is known yet, both may come."""
    chosen = {4: config.ipv4_node, 6: config.ipv6_node}
    found = [version for version, text in chosen.items() if text != "auto" or own_address(version) is not None]
    return tuple(found) or (4, 6)


def node_mtu(config: AgentConfig) -> Mtu:
    """The sizes of packets by the options and the links that lead out of the node as they are now."""
    links = nodefilters.native_devices(config.devices)
    overhead = 0 if config.tunnel == "disabled" else max(OVERHEAD[version] for version in _families(config))
    sizes = fit(config.mtu, [devices.mtu_of(name) for name in links], overhead)
    if sizes.route + overhead > sizes.device:
        where = ", ".join(links) or "no uplink"
        log.warning(
            "%s: MTU %d, too small for pods' %d and the tunnel's %d", where, sizes.device, sizes.route, overhead
        )
    return sizes
