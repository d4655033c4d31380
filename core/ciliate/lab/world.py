"""The world outside a lab's node: one namespace, joined to the node by a link, that owns any address asked for."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from ciliate.lab import netns
from ciliate.lab.command import ip_batch, run

NODE_ADDRESSES = ("172.31.255.1", "fd00:c11:ffff::1")
"""The node's side of the link: what peers know as the node."""
WORLD_LINK = ("172.31.255.2", "fd00:c11:ffff::2")
WORLD_ADDRESSES = ("198.18.255.254", "2001:2:0:ffff::fffe")
"""Where `entity/world` lives: benchmark ranges, which no policy has a reason to name."""
NODE_DEVICE = "uplink"
NODE_DEVICE_INDEX = 1001
WORLD_DEVICE = "eth0"
NODE_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
}


def connect(node: str, world: str) -> None:
    """Join the node's and the world's namespaces; each reaches the other's addresses through the link."""
    netns.set_sysctls(node, NODE_SYSCTLS)
    netns.set_sysctls(world, {"net/ipv6/conf/default/accept_dad": "0"})
    # with the same index at both ends the kernel takes the link for no pair, and tells of its carrier a second late
    device = [NODE_DEVICE, "index", str(NODE_DEVICE_INDEX), "type", "veth"]
    run("ip", "-n", node, "link", "add", *device, "peer", "name", WORLD_DEVICE, "netns", world)
    ip_batch(node, _end(NODE_DEVICE, NODE_ADDRESSES, WORLD_LINK))
    ip_batch(world, _end(WORLD_DEVICE, WORLD_LINK, NODE_ADDRESSES))


def _end(device: str, own: tuple[str, str], peer: tuple[str, str]) -> list[str]:
    return [
        f"address add {own[0]}/30 dev {device}",
        f"address add {own[1]}/126 dev {device} nodad",
        f"link set {device} up",
        f"route add default via {peer[0]}",
        f"route add default via {peer[1]}",
    ]


def add_addresses(world: str, addresses: Iterable[str]) -> None:
    """Give the world more addresses."""
    lines = [f"address add {text}/{ip_address(text).max_prefixlen} dev lo" for text in addresses]
    if lines:
        ip_batch(world, [f"{line} nodad" if ":" in line else line for line in lines])
