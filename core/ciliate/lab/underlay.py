"""The network that joins the nodes of a lab: one switch, to which every node, the world and a store are plugged in.

Every node has one device into it, as a node of a small cluster has: to other nodes directly, to everybody else by way
of the world, which is the router of this network and knows the pods of every node.
"""

from __future__ import annotations

from collections.abc import Sequence

from ciliate.lab import netns, world
from ciliate.lab.command import ip_batch
from ciliate.lab.errors import LabError
from ciliate.lab.state import WORLD, LabDirectory

NET = "net"
"""The namespace of the switch."""
STORE = "etcd"
"""The namespace of an etcd that belongs to the lab."""
STORE_ADDRESSES = ("172.31.255.250", "fd00:c11:ffff::250")
MAX_NODES = 200
_BRIDGE = "switch"


def number_of(node: str) -> int:
    """``node3`` -> 3."""
    return int(node.removeprefix("node"))


def names(count: int) -> list[str]:
    """The names of a lab's nodes; LabError where there are too many."""
    if not 1 <= count <= MAX_NODES:
        raise LabError(f"--nodes: {count} given, expected 1 to {MAX_NODES}")
    return [f"node{number}" for number in range(1, count + 1)]


def addresses(node: str) -> tuple[str, str]:
    """A node's addresses of both families; the first node's are those of a lab with one node."""
    number = number_of(node)
    if number == 1:
        return world.NODE_ADDRESSES
    return f"172.31.255.{number + 1}", f"fd00:c11:ffff::{number + 1:x}"


def pod_ranges(node: str) -> tuple[str, str]:
    """The ranges of a node's pods, where there is more than one node."""
    number = number_of(node)
    return f"10.200.{number}.0/24", f"fd00:c11:a7e::{number:x}:0/112"


def connect(directory: LabDirectory, nodes: Sequence[str], store: bool) -> None:
    """Plug everybody in; the namespaces exist. ``store`` says that one of them is that of an etcd."""
    switch, outside = directory.namespace(NET), directory.namespace(WORLD)
    netns.set_sysctls(switch, {"net/ipv6/conf/default/accept_dad": "0"})
    ip_batch(switch, [f"link add {_BRIDGE} type bridge mcast_snooping 0", f"link set {_BRIDGE} up"])
    netns.set_sysctls(outside, {**world.NODE_SYSCTLS, "net/ipv4/conf/default/send_redirects": "0"})
    _plug_in(switch, outside, world.WORLD_DEVICE, "world", world.WORLD_LINK)
    for node in nodes:
        namespace = directory.namespace(node)
        netns.set_sysctls(namespace, world.NODE_SYSCTLS)
        _plug_in(switch, namespace, world.NODE_DEVICE, node, addresses(node), world.NODE_DEVICE_INDEX)
        ip_batch(namespace, [f"route add default via {text}" for text in world.WORLD_LINK])
        pairs = zip(pod_ranges(node), addresses(node), strict=True)
        ip_batch(outside, [f"route add {range_} via {address}" for range_, address in pairs])
    if store:
        _plug_in(switch, directory.namespace(STORE), "eth0", "store", STORE_ADDRESSES)


def _plug_in(switch: str, namespace: str, device: str, port: str, own: tuple[str, str], index: int = 0) -> None:
    # with the same index at both ends the kernel takes the link for no pair, and tells of its carrier a second late
    chosen = f"index {index} " if index else ""
    ip_batch(
        namespace,
        [
            f"link add {device} {chosen}type veth peer name {port} netns {switch}",
            f"address add {own[0]}/24 dev {device}",
            f"address add {own[1]}/64 dev {device} nodad",
        ],
    )
    ip_batch(switch, [f"link set {port} master {_BRIDGE} up"])
    ip_batch(namespace, [f"link set {device} up"])


def set_link(directory: LabDirectory, node: str, up: bool) -> None:
    """Pull a node's cable out of the switch, or plug it in again."""
    ip_batch(directory.namespace(NET), [f"link set {node} {'up' if up else 'down'}"])
