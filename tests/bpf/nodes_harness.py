"""Two nodes with pods, joined by a link: namespaces, and the datapath by the loader alone, in every routing mode."""

from __future__ import annotations

import array
import contextlib
import fcntl
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Any, NamedTuple

from live_harness import ALLOW, LOADERS, Net, _setns, connect_pod
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from ciliate.datapath import Datapath, DatapathConfig, EndpointConfig, layout
from ciliate.datapath.pins import unmount
from ciliate.datapath.tunnel import OVERHEAD, TunnelConfig
from ciliate.identity import HOST
from ciliate.node import Node
from ciliate.policy.mapstate import INGRESS, PolicyKey

MODES = ("vxlan", "geneve", "direct")
UNDERLAY = {4: "192.0.2", 6: "2001:db8:ff:"}
LINK_MTU = 1500
CLIENT, STRANGER, SERVER = 1, 2, 3
HOME = {CLIENT: 1, STRANGER: 1, SERVER: 2}
"""Pod -> the number of its node."""
IDENTITY = {CLIENT: 0x1302, STRANGER: 0x1303, SERVER: 0x1301}
REMOTE_HOST = 6
"""What these tests make of the other node itself."""


class Mode(NamedTuple):
    """A routing mode, and the IP version between the nodes."""

    name: str
    underlay: int = 4

    def tunnel(self) -> TunnelConfig | None:
        if self.name == "direct":
            return None
        mtu = LINK_MTU - OVERHEAD[self.underlay]
        protocol: Any = self.name
        return TunnelConfig(protocol=protocol, mtu=mtu, families=(self.underlay,), uplinks=("eth0",))


def underlay(node: int, version: int) -> str:
    return f"192.0.2.{node}" if version == 4 else f"2001:db8:ff::{node}"


def pods(node: int, version: int) -> IPv4Network | IPv6Network:
    return ip_network(f"10.88.{node}.0/24" if version == 4 else f"fd88:{node}::/64")


def router(node: int, version: int) -> str:
    return f"10.88.{node}.1" if version == 4 else f"fd88:{node}::1"


def address(pod: int, version: int) -> str:
    node = HOME[pod]
    return f"10.88.{node}.{10 + pod}" if version == 4 else f"fd88:{node}::{10 + pod:x}"


def node_record(number: int, mode: Mode) -> Node:
    four, six = IPv4Address(underlay(number, 4)), IPv6Address(underlay(number, 6))
    return Node(
        name=f"n{number}",
        ipv4=four if mode.name == "direct" or mode.underlay == 4 else None,
        ipv6=six if mode.name == "direct" or mode.underlay == 6 else None,
        pods4=IPv4Network(str(pods(number, 4))),
        pods6=IPv6Network(str(pods(number, 6))),
        router4=IPv4Address(router(number, 4)),
        router6=IPv6Address(router(number, 6)),
    )


class PodNode:
    """One node: its namespace, its datapath and its pods."""

    def __init__(self, net: Net, number: int, mode: Mode, root: Path, cache: Path, loader: str, build: str) -> None:
        self.net, self.number, self.mode, self.root = net, number, mode, root
        self.loader, self.build = loader, build
        root.mkdir()
        (root / "templates").symlink_to(cache)
        self.configs: dict[int, EndpointConfig] = {}
        self.datapath = self._make()

    @property
    def name(self) -> str:
        return f"n{self.number}"

    def _make(self) -> Datapath:
        config = DatapathConfig(
            state_dir=self.root,
            instance="test",
            bpf_root=self.root / "bpffs",
            router4=IPv4Address(router(self.number, 4)),
            router6=IPv6Address(router(self.number, 6)),
            ct_tcp_max=4096,
            ct_any_max=4096,
            monitor="none",
            build=self.build,
            tunnel=self.mode.tunnel(),
            node_routes=self.mode.name == "direct",
        )
        datapath = Datapath(config, LOADERS[self.loader]())
        for pool in (datapath._worker, datapath._sweeper):
            pool.submit(_setns, self.net.descriptors[self.name]).result()
        return datapath

    async def start(self) -> None:
        """Start, and connect every pod and the other node; what was there is used."""
        await self.datapath.start()
        await self.datapath.programs.start()
        await self.datapath.change_ipcache(dict(self._ipcache()))
        for pod in [pod for pod, home in HOME.items() if home == self.number]:
            await self.datapath.add_endpoint(self._connect(pod), policy(pod))
        failed = await self.datapath.nodes.sync_nodes([node_record(3 - self.number, self.mode)])
        assert not failed, failed

    async def restart(self) -> None:
        """What a new agent does after the old one was killed."""
        await self.datapath.stop()
        self.datapath = self._make()
        await self.start()

    async def switch(self, mode: Mode) -> None:
        """A new agent with another routing mode."""
        self.mode = mode
        await self.restart()

    def _ipcache(self) -> Iterator[tuple[bytes, bytes]]:
        other = 3 - self.number
        record = node_record(other, self.mode)
        to = self.datapath.nodes.address(record.ipv4, record.ipv6)
        for version in (4, 6):
            yield layout.ipcache_key(ip_network(router(self.number, version))), layout.ipcache_entry(HOST)
            yield layout.ipcache_key(ip_network(underlay(self.number, version))), layout.ipcache_entry(HOST)
            yield layout.ipcache_key(ip_network(router(other, version))), layout.ipcache_entry(REMOTE_HOST, to)
            yield layout.ipcache_key(ip_network(underlay(other, version))), layout.ipcache_entry(REMOTE_HOST)
            for pod, home in HOME.items():
                node = None if home == self.number else to
                prefix = ip_network(address(pod, version))
                yield layout.ipcache_key(prefix), layout.ipcache_entry(IDENTITY[pod], node)

    def _connect(self, pod: int) -> EndpointConfig:
        if pod in self.configs:
            return self.configs[pod]
        own = IPv4Address(address(pod, 4)), IPv6Address(address(pod, 6))
        routers = IPv4Address(router(self.number, 4)), IPv6Address(router(self.number, 6))
        tunnel = self.mode.tunnel()
        more = {"identity": IDENTITY[pod], "enforce_ingress": pod == SERVER, "mtu": tunnel.mtu if tunnel else LINK_MTU}
        self.configs[pod] = connect_pod(self.net, self.name, pod, own, routers, **more)
        return self.configs[pod]


def policy(pod: int) -> dict[PolicyKey, Any]:
    """The server lets the client, the client's node and its own node do this much; others may do nothing."""
    if pod != SERVER:
        return {}
    client = IDENTITY[CLIENT]
    return {
        PolicyKey(INGRESS, client, 6, 80, 16): ALLOW,
        PolicyKey(INGRESS, client, 17, 53, 16): ALLOW,
        PolicyKey(INGRESS, client, 1, 8, 16): ALLOW,
        PolicyKey(INGRESS, client, 58, 128, 16): ALLOW,
        PolicyKey(INGRESS, REMOTE_HOST, 6, 82, 16): ALLOW,
        PolicyKey(INGRESS, HOST, 6, 83, 16): ALLOW,
    }


def make_net(tag: str) -> Net:
    """Namespaces of both nodes and all pods, the nodes joined by a link."""
    net = Net(tag)
    try:
        for number in (1, 2):
            net.add(f"n{number}")
        for pod in HOME:
            net.add(f"pod{pod}")
        first, second = f"{tag}n1", f"{tag}n2"
        command = f"link add eth0 mtu {LINK_MTU} type veth peer name eth0 mtu {LINK_MTU} netns {second}"
        subprocess.run(["ip", "-n", first, *command.split()], check=True)
        for number in (1, 2):
            lines = [
                "link set lo up",
                f"address add {underlay(number, 4)}/24 dev eth0",
                f"address add {underlay(number, 6)}/64 dev eth0 nodad",
                "link set eth0 up",
            ]
            command = ["ip", "-n", f"{tag}n{number}", "-batch", "-"]
            subprocess.run(command, input="\n".join(lines), text=True, check=True)
        for version in (4, 6):
            _wait_for_link(net, underlay(2, version))
    except BaseException:
        net.remove()
        raise
    return net


def _wait_for_link(net: Net, target: str) -> None:
    """Until the nodes reach each other: what is sent before IPv6 is ready on a new device is lost."""
    command = ["nsenter", f"--net=/run/netns/{net.tag}n1", "ping", "-c1", "-W0.2", "-n", target]
    end = time.monotonic() + 10
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < end, f"{target} does not answer"


@contextlib.asynccontextmanager
async def two_nodes(
    net: Net, mode: Mode, root: Path, cache: Path, loader: str = "shared", build: str = "auto"
) -> AsyncIterator[tuple[PodNode, PodNode]]:
    """Both nodes running; nothing of them is left afterwards."""
    nodes = [PodNode(net, number, mode, root / f"n{number}", cache, loader, build) for number in (1, 2)]
    try:
        for node in nodes:
            await node.start()
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            with contextlib.suppress(RuntimeError):
                await node.datapath.destroy()
            unmount(node.root / "bpffs")


def plain_link(net: Net) -> None:
    """Let the kernel itself make segments and checksums of what leaves a node, as for a card that can do neither."""
    for number in (1, 2):
        net.run(f"n{number}", lambda: [_ethtool("eth0", command) for command in (TX_CHECKSUM, TSO, GSO)])


TX_CHECKSUM, TSO, GSO = 0x17, 0x1F, 0x24
_SIOCETHTOOL = 0x8946


def _ethtool(name: str, command: int) -> None:
    """Switch something of a device off (``struct ethtool_value``)."""
    value = array.array("I", [command, 0])
    request = struct.pack("=16sQ", name.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request.ljust(40, b"\0"))


def tcpdump(captured: list[bytes], protocol: str, directory: Path) -> str:
    """What tcpdump reads in these frames, inner packets included. It knows Geneve by its port, and VXLAN where told."""
    path = directory / f"{uuid.uuid4().hex}.pcap"
    wrpcap(str(path), [Ether(frame) for frame in captured])
    kind = ["-T", "vxlan"] if protocol == "vxlan" else []
    command = ["tcpdump", "-nn", "-t", "-v", *kind, "-r", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def capture(net: Net, node: int) -> socket.socket:
    """A socket that sees every frame on the node's link."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind(("eth0", 0))
        sock.settimeout(1)
        return sock

    made: socket.socket = net.run(f"n{node}", make)
    return made


def frames(sock: socket.socket) -> list[bytes]:
    """What it saw so far."""
    found = []
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recv(1 << 17))
    return found
