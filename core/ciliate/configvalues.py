"""Values of options: how texts are read, what they must not be, and which of them contradict each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

from ciliate.ports import PortRange, parse_range

if TYPE_CHECKING:
    from ciliate.config import AgentConfig

MOST_NODE_PORTS = 32768
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
NAMES = {"node_name": 253, "cluster_name": 63, "instance": 32}
"""Options that become part of keys, paths and devices' names, with how many characters they may have."""
SHAPES = {
    "operator_api_serve_addr": "ADDRESS:PORT, or nothing",
    "node_port_range": "two ports, the lower one first, as 30000-32767, or nothing",
}
"""What a pattern means, for people."""


def check_text(field: str, text: str) -> None:
    """ValueError where a text cannot be the value of an option."""
    if not text.isprintable():
        raise ValueError("expected text without control characters")
    longest = NAMES.get(field)
    if longest and text and (len(text) > longest or not _NAME.fullmatch(text)):
        raise ValueError(f"expected up to {longest} letters, digits, '-', '_' and '.', no sign at the ends")
    if longest and not text and field != "node_name":  # which is the host's name then
        raise ValueError("expected a name")


def networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """A comma-separated list of networks. ValueError names what is none."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


def addresses(text: str) -> tuple[IPv4Address | IPv6Address, ...]:
    """A comma-separated list of addresses, at most one of a family. ValueError says what is wrong."""
    found = tuple(ip_address(part.strip()) for part in text.split(",") if part.strip())
    if len({address.version for address in found}) < len(found):
        raise ValueError("expected at most one address of each family")
    return found


def node_ports(text: str) -> PortRange | None:
    """A range of ports for services, which leaves half of all to others. ValueError says what is wrong."""
    found = parse_range(text)
    if found and found[1] - found[0] >= MOST_NODE_PORTS:
        raise ValueError(f"expected at most {MOST_NODE_PORTS} ports")
    return found


def node_address(value: Any, family: Callable[[str], object]) -> str:
    """``auto``, or an address of the family."""
    text = str(value).strip()
    try:
        return text if text == "auto" else str(family(text))
    except ValueError as error:
        raise ValueError(f"expected auto or an address: {error}") from error


def boolean(text: str) -> bool:
    """Any of the usual words for true and false."""
    lowered = text.strip().lower()
    if lowered in ("true", "yes", "on", "1"):
        return True
    if lowered in ("false", "no", "off", "0"):
        return False
    raise ValueError("expected true or false")


def network(family: Callable[[str], IPv4Network | IPv6Network], value: object) -> IPv4Network | IPv6Network:
    """A network that pods can have addresses of; ValueError says what is wrong."""
    try:
        found = family(str(value))
    except ValueError as error:
        raise ValueError(f"expected a network in CIDR notation: {error}") from error
    if found.num_addresses < 8:
        raise ValueError("expected a network of at least 8 addresses")
    unusable = found.is_loopback or found.is_multicast or found.is_link_local
    if unusable or not found.prefixlen:
        raise ValueError("expected a network that is not loopback, link-local, multicast or everything")
    return found


def contradictions(config: AgentConfig) -> Iterator[tuple[str, object, str]]:
    """Options that do not go together: field, value, what was expected."""
    if not config.enable_ipv4 and not config.enable_ipv6:
        yield "enable-ipv6", False, "expected true, as enable-ipv4 is false: pods need one family"
    if config.auto_direct_node_routes and config.tunnel != "disabled":
        yield "auto-direct-node-routes", True, f"expected false, as tunnel is {config.tunnel}"
    if config.socket_path == config.cni_socket_path:
        yield "cni-socket-path", config.cni_socket_path, "expected another path than socket-path"
