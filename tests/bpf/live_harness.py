"""A node and its pods as namespaces joined by the datapath alone, under any loader."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

from ciliate.datapath import Datapath, DatapathConfig, EndpointConfig, devices, layout
from ciliate.datapath.events import EventReader, MonitorEvent, decode
from ciliate.datapath.loader import Loader
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.pins import unmount
from ciliate.identity import HOST
from ciliate.policy.mapstate import INGRESS, PolicyEntry, PolicyKey, Verdict
from ciliate_loader.shared_loader import SharedLoader
from ciliate_loader.template_loader import TemplateLoader

LOADERS: dict[str, Callable[[], Loader]] = {"shared": SharedLoader, "template": TemplateLoader}
ROUTER4, ROUTER6 = IPv4Address("10.77.0.1"), IPv6Address("fd77::1")
ALLOW = PolicyEntry(Verdict.ALLOW, 0, 7)
SERVER, CLIENT, STRANGER = 1, 2, 3
IDENTITY = {SERVER: 301, CLIENT: 302, STRANGER: 303}
Ends = tuple[IPv4Address, IPv6Address]


class Net:
    """The node's and the pods' namespaces of one test."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.descriptors: dict[str, int] = {}

    def add(self, name: str) -> int:
        full = f"{self.tag}{name}"
        subprocess.run(["ip", "netns", "add", full], check=True)
        self.descriptors[name] = os.open(f"/run/netns/{full}", os.O_RDONLY | os.O_CLOEXEC)
        return self.descriptors[name]

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        return in_netns(self.descriptors[name], function)

    def remove(self) -> None:
        for name, descriptor in self.descriptors.items():
            os.close(descriptor)
            subprocess.run(["ip", "netns", "del", f"{self.tag}{name}"], check=False)


def address(number: int, family: int) -> str:
    return f"10.77.0.{number + 10}" if family == 4 else f"fd77::{number + 10:x}"


class InNode:
    """Runs a Datapath whose threads live in the node's namespace; ``cache`` has what other tests compiled."""

    def __init__(
        self, net: Net, root: Path, loader: str, cache: Path, build: str = "auto", debug: bool = False
    ) -> None:
        self.net, self.root, self.loader, self.build, self.debug = net, root, loader, build, debug
        (root / "templates").symlink_to(cache)
        self.datapath = self._make()

    def _make(self) -> Datapath:
        config = DatapathConfig(
            state_dir=self.root,
            instance="test",
            bpf_root=self.root / "bpffs",
            router4=ROUTER4,
            router6=ROUTER6,
            ct_tcp_max=4096,
            ct_any_max=4096,
            build=self.build,
            debug=self.debug,
        )
        datapath = Datapath(config, LOADERS[self.loader]())
        enter = self.net.descriptors["node"]
        for pool in (datapath._worker, datapath._sweeper):
            pool.submit(_setns, enter).result()
        return datapath

    async def restart(self) -> None:
        """What a new agent does after the old one was killed: nothing is closed in order."""
        await self.datapath.stop()
        self.datapath = self._make()
        await self.datapath.start()

    async def switch(self) -> None:
        """Let the other loader serve every endpoint."""
        self.loader = "shared" if self.loader == "template" else "template"
        await self.datapath.switch_loader(LOADERS[self.loader]())

    async def run(self, function: Callable[[], Any]) -> Any:
        """Run something where the loader runs: in the datapath's thread, in the node's namespace."""
        return await self.datapath._run(function)

    def programs(self, ifname: str) -> dict[str, int]:
        """Name -> number of every program that a filter of the device runs."""
        found = {}
        for direction in ("ingress", "egress"):
            enter = ["nsenter", f"--net=/run/netns/{self.net.tag}node"]
            command = [*enter, "tc", "-j", "filter", "show", "dev", ifname, direction]
            done = subprocess.run(command, capture_output=True, check=True)
            programs = [item["options"]["prog"] for item in json.loads(done.stdout or "[]") if "options" in item]
            found |= {program["name"]: program["id"] for program in programs}
        return found


@contextlib.asynccontextmanager
async def started(node: InNode) -> AsyncIterator[InNode]:
    """The node's datapath running; nothing of it is left afterwards."""
    try:
        await node.datapath.start()
        yield node
    finally:
        with contextlib.suppress(RuntimeError):
            await node.datapath.destroy()
        unmount(node.root / "bpffs")


def _setns(descriptor: int) -> None:
    import ctypes

    assert ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) == 0


def connect_pod(net: Net, node: str, number: int, addresses: Ends, routers: Ends, **more: Any) -> EndpointConfig:
    """A veth pair between a node and a pod, as an endpoint. ``more``: its identity, mtu, enforcement."""
    fd, name, mtu = net.descriptors[f"pod{number}"], f"lxc{net.tag}{number}", more.pop("mtu", 0)
    device = net.run(node, lambda: devices.create_endpoint_device(name, fd, "eth0", mtu))
    devices.configure_container(fd, "eth0", *addresses, *routers)
    return EndpointConfig(
        id=number,
        ifindex=device.host_ifindex,
        ifname=name,
        mac=device.container_mac,
        node_mac=device.host_mac,
        ipv4=addresses[0],
        ipv6=addresses[1],
        **more,
    )


def endpoint_config(node: InNode, number: int) -> EndpointConfig:
    own = IPv4Address(address(number, 4)), IPv6Address(address(number, 6))
    more = {"identity": IDENTITY[number], "enforce_ingress": number == SERVER}
    return connect_pod(node.net, "node", number, own, (ROUTER4, ROUTER6), **more)


def server_policy() -> dict[PolicyKey, PolicyEntry]:
    client = IDENTITY[CLIENT]
    return {
        PolicyKey(INGRESS, client, 6, 80, 16): ALLOW,
        PolicyKey(INGRESS, client, 17, 53, 16): ALLOW,
        PolicyKey(INGRESS, client, 1, 8, 16): ALLOW,
        PolicyKey(INGRESS, client, 58, 128, 16): ALLOW,
        PolicyKey(INGRESS, HOST): ALLOW,
    }


async def connect_all(node: InNode) -> dict[int, EndpointConfig]:
    configs = {number: endpoint_config(node, number) for number in IDENTITY}
    node_addresses = {ip_network(ROUTER4): HOST, ip_network(ROUTER6): HOST}
    pods = {ip_network(str(item)): IDENTITY[number] for number, config in configs.items() for item in config.addresses}
    entries = {**node_addresses, **pods}.items()
    await node.datapath.change_ipcache(
        {layout.ipcache_key(prefix): layout.ipcache_entry(number) for prefix, number in entries}
    )
    for number, config in configs.items():
        await node.datapath.add_endpoint(config, server_policy() if number == SERVER else {})
    return configs


def family_of(text: str) -> socket.AddressFamily:
    return socket.AF_INET if ip_address(text).version == 4 else socket.AF_INET6


def listen(net: Net, kind: socket.SocketKind, text: str, port: int) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(family_of(text), kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((text, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(8)
        return sock

    made: socket.socket = net.run(f"pod{SERVER}", make)
    return made


def tcp(net: Net, source: str, target: str, port: int, timeout: float = 0.4) -> bool:
    def connect() -> bool:
        with socket.socket(family_of(target)) as sock:
            sock.settimeout(timeout)
            try:
                sock.connect((target, port))
            except TimeoutError:
                return False
            return True

    return bool(net.run(source, connect))


def udp(net: Net, server: socket.socket, source: str, target: str, port: int) -> bool:
    server.settimeout(0.4)

    def send() -> bool:
        with socket.socket(family_of(target), socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.4)
            sock.sendto(b"ping", (target, port))
            try:
                data, peer = server.recvfrom(100)
            except TimeoutError:
                return False
            server.sendto(data, peer)
            return sock.recv(100) == b"ping"

    return bool(net.run(source, send))


def ping_once(net: Net, source: str, target: str, options: list[str]) -> str:
    enter = ["nsenter", f"--net=/run/netns/{net.tag}{source}"]
    command = [*enter, "ping", "-c1", "-W1", "-n", *options, target]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def ping(net: Net, source: str, target: str) -> bool:
    return " 0% packet loss" in ping_once(net, source, target, [])


def wait_linked(net: Net, source: str, target: str) -> None:
    """Return once packets pass: the kernel takes a new link into service by a worker of its own, a moment later."""
    assert any(ping(net, source, target) for _ in range(10))


def read_drops(reader: EventReader) -> list[MonitorEvent]:
    return [event for event in map(decode, reader.read()) if event.type == "drop"]
