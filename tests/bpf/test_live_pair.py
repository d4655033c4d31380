"""Two namespaces joined by the datapath alone: real packets, both families, allowed and denied.

Tier bpf: needs root, clang and a kernel with BPF.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from ciliate.datapath import Datapath, DatapathConfig, EndpointConfig, devices
from ciliate.datapath.events import EventReader, MonitorEvent, decode
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.pins import unmount
from ciliate.identity import HOST
from ciliate.policy.mapstate import INGRESS, PolicyEntry, PolicyKey, Verdict
from ciliate_loader.shared_loader import SharedLoader

ROUTER4, ROUTER6 = IPv4Address("10.77.0.1"), IPv6Address("fd77::1")
ALLOW = PolicyEntry(Verdict.ALLOW, 0, 7)
SERVER, CLIENT, STRANGER = 1, 2, 3
IDENTITY = {SERVER: 301, CLIENT: 302, STRANGER: 303}


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


@pytest.fixture
def net() -> Iterator[Net]:
    made = Net(f"ct{uuid.uuid4().hex[:6]}")
    try:
        made.add("node")
        for number in IDENTITY:
            made.add(f"pod{number}")
        yield made
    finally:
        made.remove()


class InNode:
    """Runs a Datapath whose threads live in the node's namespace."""

    def __init__(self, net: Net, root: Path) -> None:
        self.net, self.root = net, root
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
        )
        datapath = Datapath(config, SharedLoader())
        enter = self.net.descriptors["node"]
        for pool in (datapath._worker, datapath._sweeper):
            pool.submit(_setns, enter).result()
        return datapath

    async def restart(self) -> None:
        """What a new agent does after the old one was killed: nothing is closed in order."""
        await self.datapath.stop()
        self.datapath = self._make()
        await self.datapath.start()


def _setns(descriptor: int) -> None:
    import ctypes

    assert ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) == 0


@pytest.fixture
async def node(net: Net, tmp_path: Path) -> AsyncIterator[InNode]:
    made = InNode(net, tmp_path)
    try:
        await made.datapath.start()
        yield made
    finally:
        with contextlib.suppress(RuntimeError):
            await made.datapath.destroy()
        unmount(tmp_path / "bpffs")


def endpoint_config(node: InNode, number: int) -> EndpointConfig:
    net = node.net
    fd = net.descriptors[f"pod{number}"]
    four, six = IPv4Address(address(number, 4)), IPv6Address(address(number, 6))
    name = f"lxc{net.tag}{number}"
    device = net.run("node", lambda: devices.create_endpoint_device(name, fd, "eth0"))
    devices.configure_container(fd, "eth0", four, six, ROUTER4, ROUTER6)
    return EndpointConfig(
        id=number,
        ifindex=device.host_ifindex,
        ifname=name,
        identity=IDENTITY[number],
        mac=device.container_mac,
        node_mac=device.host_mac,
        ipv4=four,
        ipv6=six,
        enforce_ingress=number == SERVER,
    )


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
    await node.datapath.upsert_ipcache({**node_addresses, **pods})
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


def read_drops(reader: EventReader) -> list[MonitorEvent]:
    return [event for event in map(decode, reader.read()) if event.type == "drop"]


@pytest.mark.parametrize("family", [4, 6])
async def test_policy_decides_real_packets(net: Net, node: InNode, family: int) -> None:
    await connect_all(node)
    target = address(SERVER, family)
    reader = EventReader(node.datapath.events_path)
    with listen(net, socket.SOCK_STREAM, target, 80), listen(net, socket.SOCK_STREAM, target, 81):
        assert tcp(net, f"pod{CLIENT}", target, 80, 3)
        assert not tcp(net, f"pod{CLIENT}", target, 81)
        assert not tcp(net, f"pod{STRANGER}", target, 80)
        assert tcp(net, "node", target, 81, 3)
    drops = read_drops(reader)
    assert {(drop.src_identity, drop.destination_port, drop.reason) for drop in drops} == {
        (302, 81, 133),
        (303, 80, 133),
    }
    assert all((drop.dst_identity, drop.direction, drop.dst_endpoint) == (301, "ingress", SERVER) for drop in drops)
    assert all(drop.reason_text == "Policy denied" and "SYN" in drop.summary for drop in drops)
    with listen(net, socket.SOCK_DGRAM, target, 53) as server:
        assert udp(net, server, f"pod{CLIENT}", target, 53)
        assert not udp(net, server, f"pod{STRANGER}", target, 53)
    assert ping(net, f"pod{CLIENT}", target)
    assert not ping(net, f"pod{STRANGER}", target)
    assert ping(net, f"pod{STRANGER}", address(CLIENT, family))
    assert ping(net, f"pod{STRANGER}", str(ROUTER4 if family == 4 else ROUTER6))
    assert ping(net, "node", target)
    reader.close()


@pytest.mark.parametrize("family", [4, 6])
async def test_an_established_connection_lives_through_a_restart_and_ends_with_its_rule(
    net: Net, node: InNode, family: int
) -> None:
    configs = await connect_all(node)
    target = address(SERVER, family)
    with listen(net, socket.SOCK_STREAM, target, 80) as server:
        client = net.run(f"pod{CLIENT}", lambda: socket.create_connection((target, 80), 3))
        accepted, _ = server.accept()
        accepted.settimeout(1)
        with client, accepted:
            client.sendall(b"before")
            assert accepted.recv(100) == b"before"
            await node.restart()
            client.sendall(b"during")
            assert accepted.recv(100) == b"during"
            for number, config in configs.items():
                await node.datapath.add_endpoint(config, server_policy() if number == SERVER else {})
            client.sendall(b"after")
            assert accepted.recv(100) == b"after"
            gone = PolicyKey(INGRESS, IDENTITY[CLIENT], 6, 80, 16)
            await node.datapath.apply_policy(SERVER, {}, [gone], True, False)
            client.sendall(b"never")
            with pytest.raises(TimeoutError):
                accepted.recv(100)


async def test_a_removed_endpoint_is_cut_off_and_its_flows_go(net: Net, node: InNode) -> None:
    await connect_all(node)
    target = address(SERVER, 4)
    with listen(net, socket.SOCK_STREAM, target, 80):
        assert tcp(net, f"pod{CLIENT}", target, 80, 3)
        assert {flow.endpoint for flow in await node.datapath.conntrack()} >= {SERVER, CLIENT}
        await node.datapath.remove_endpoint(CLIENT)
        assert not tcp(net, f"pod{CLIENT}", target, 80)
    assert all(flow.endpoint != CLIENT for flow in await node.datapath.conntrack())
    assert not await node.datapath.policy_entries(CLIENT)
    metrics = await node.datapath.metrics()
    assert metrics[165, 1][0] >= 1


async def test_a_pod_cannot_use_another_address(net: Net, node: InNode) -> None:
    await connect_all(node)
    reader = EventReader(node.datapath.events_path)

    def spoof() -> None:
        subprocess.run(["ip", "addr", "add", f"{address(CLIENT, 4)}/32", "dev", "eth0"], check=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((address(CLIENT, 4), 0))
            sock.sendto(b"x", (address(SERVER, 4), 53))

    net.run(f"pod{STRANGER}", spoof)
    assert [drop.reason_text for drop in read_drops(reader)] == ["Invalid source ip"]
    reader.close()


@pytest.mark.parametrize("family", [4, 6])
async def test_an_icmp_error_comes_back_for_udp_and_expired_packets_are_answered(
    net: Net, node: InNode, family: int
) -> None:
    await connect_all(node)
    target = address(SERVER, family)

    def refused() -> bool:
        with socket.socket(family_of(target), socket.SOCK_DGRAM) as sock:
            sock.settimeout(2)
            sock.connect((target, 53))
            sock.send(b"x")
            with contextlib.suppress(ConnectionRefusedError):
                sock.recv(10)
                return False
            return True

    assert net.run(f"pod{CLIENT}", refused)
    answer = ping_once(net, f"pod{CLIENT}", target, ["-t", "1"])
    assert str(ROUTER4 if family == 4 else ROUTER6) in answer
    assert "exceeded" in answer.lower()
