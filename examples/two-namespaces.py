"""Two namespaces joined by the datapath alone, without an agent: who may do what, and how `ciliate monitor` sees it.

Usage, as root: python examples/two-namespaces.py [shared|template]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

from ciliate.datapath import Datapath, DatapathConfig, EndpointConfig, devices, layout
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.pins import unmount
from ciliate.policy.mapstate import INGRESS, PolicyEntry, PolicyKey, Verdict
from ciliate_loader.shared_loader import SharedLoader
from ciliate_loader.template_loader import TemplateLoader

LOADERS = {"shared": SharedLoader, "template": TemplateLoader}
ROUTER = (IPv4Address("10.99.0.1"), IPv6Address("fd99::1"))
SERVER, CLIENT = 1, 2
IDENTITY = {SERVER: 3001, CLIENT: 3002}
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
# what the server lets the client do: TCP 80, UDP 53, and echo requests over IPv4 alone
POLICY = {
    PolicyKey(INGRESS, IDENTITY[CLIENT], TCP, 80, 16): PolicyEntry(Verdict.ALLOW),
    PolicyKey(INGRESS, IDENTITY[CLIENT], UDP, 53, 16): PolicyEntry(Verdict.ALLOW),
    PolicyKey(INGRESS, IDENTITY[CLIENT], ICMP, 8, 16): PolicyEntry(Verdict.ALLOW),
}


def address(number: int, family: int) -> str:
    """An endpoint's address."""
    return f"10.99.0.{number + 10}" if family == 4 else f"fd99::{number + 10:x}"


def connect(number: int, namespace: int, tag: str) -> EndpointConfig:
    """A veth pair into the namespace, with addresses and routes."""
    four, six = IPv4Address(address(number, 4)), IPv6Address(address(number, 6))
    name = f"lxc{tag}{number}"
    device = devices.create_endpoint_device(name, namespace, "eth0")
    devices.configure_container(namespace, "eth0", four, six, *ROUTER)
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


def serve(namespace: int, kind: socket.SocketKind, port: int) -> socket.socket:
    """A socket of the server on every address."""

    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        sock.settimeout(0.5)
        return sock

    made: socket.socket = in_netns(namespace, listen)
    return made


def tcp(namespace: int, target: str, port: int) -> bool:
    """Whether a connection comes about."""

    def dial() -> bool:
        try:
            socket.create_connection((target, port), 0.5).close()
        except TimeoutError:
            return False
        return True

    return bool(in_netns(namespace, dial))


def udp(namespace: int, server: socket.socket, target: str, port: int) -> bool:
    """Whether a datagram arrives."""

    def send() -> None:
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"hello", (target, port))

    in_netns(namespace, send)
    with contextlib.suppress(TimeoutError):
        return server.recv(100) == b"hello"
    return False


def ping(name: str, target: str) -> bool:
    """Whether an echo request is answered."""
    command = ["nsenter", f"--net=/run/netns/{name}", "ping", "-c1", "-W1", "-n", target]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Monitor:
    """`ciliate monitor` with nobody but the kernel to ask."""

    def __init__(self, root: Path) -> None:
        here = [sys.executable, "-m", "ciliate.cli.main", "-H", str(root / "no-agent"), "monitor"]
        command = [*here, "--bpf-root", str(root / "bpf"), "--instance", "example"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self._process.stderr.readline()  # it says that no agent answers, and begins

    def lines(self) -> list[str]:
        """End it and return what it printed."""
        self._process.terminate()
        return self._process.communicate()[0].splitlines()


async def run(loader: str, tag: str, root: Path, namespaces: dict[int, int]) -> bool:
    """Build it, send everything, print what happened; whether all was as expected."""
    config = DatapathConfig(
        state_dir=root, instance="example", bpf_root=root / "bpf", router4=ROUTER[0], router6=ROUTER[1], monitor="none"
    )
    datapath = Datapath(config, LOADERS[loader]())
    try:
        await datapath.start()
        endpoints = {number: await asyncio.to_thread(connect, number, namespaces[number], tag) for number in IDENTITY}
        prefixes = {ip_network(str(ip)): item.identity for item in endpoints.values() for ip in item.addresses}
        keys = {layout.ipcache_key(prefix): layout.ipcache_entry(number) for prefix, number in prefixes.items()}
        await datapath.change_ipcache(keys)
        for number, item in endpoints.items():
            await datapath.add_endpoint(item, POLICY if number == SERVER else {})
        monitor = await asyncio.to_thread(Monitor, root)
        good = await asyncio.to_thread(send_all, tag, namespaces)
        print("\nWhat `ciliate monitor` saw:")
        for line in await asyncio.to_thread(monitor.lines):
            print(f"  {line}")
        return good
    finally:
        await datapath.destroy()


def send_all(tag: str, namespaces: dict[int, int]) -> bool:
    """Every protocol and family, allowed and denied; prints a table."""
    server, client = namespaces[SERVER], namespaces[CLIENT]
    good = True
    with contextlib.ExitStack() as stack:
        sockets = {
            (kind, port): stack.enter_context(serve(server, kind, port))
            for kind, ports in ((socket.SOCK_STREAM, (80, 81)), (socket.SOCK_DGRAM, (53, 54)))
            for port in ports
        }
        for family in (4, 6):
            target = address(SERVER, family)
            cases: list[tuple[str, bool, Callable[[], Any]]] = [
                ("TCP 80", True, lambda target=target: tcp(client, target, 80)),
                ("TCP 81", False, lambda target=target: tcp(client, target, 81)),
                ("UDP 53", True, lambda t=target: udp(client, sockets[socket.SOCK_DGRAM, 53], t, 53)),
                ("UDP 54", False, lambda t=target: udp(client, sockets[socket.SOCK_DGRAM, 54], t, 54)),
                ("ping", family == 4, lambda target=target: ping(f"{tag}p{CLIENT}", target)),
            ]
            for what, expected, check in cases:
                found = check()
                good = good and found == expected
                print(
                    f"  {'ok' if found == expected else 'NO'}  IPv{family} {what:7} {'passes' if found else 'dropped'}"
                )
    return good


def main() -> int:
    """Make the namespaces, run, remove everything."""
    loader = sys.argv[1] if len(sys.argv) > 1 else "shared"
    if loader not in LOADERS or os.geteuid():
        print(__doc__, file=sys.stderr)
        return 2
    if "CILIATE_EXAMPLE" not in os.environ:
        # this process is the node: it gets a network namespace of its own
        os.environ["CILIATE_EXAMPLE"] = f"x{uuid.uuid4().hex[:5]}"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    tag = os.environ["CILIATE_EXAMPLE"]
    names = {number: f"{tag}p{number}" for number in IDENTITY}
    with tempfile.TemporaryDirectory(prefix="ciliate-example-") as text, contextlib.ExitStack() as stack:
        root = Path(text)
        stack.callback(unmount, root / "bpf")
        namespaces = {}
        for number, name in names.items():
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            namespaces[number] = os.open(f"/run/netns/{name}", os.O_RDONLY)
            stack.callback(os.close, namespaces[number])
        print(f"Loader {loader}:")
        return 0 if asyncio.run(run(loader, tag, root, namespaces)) else 1


if __name__ == "__main__":
    sys.exit(main())
