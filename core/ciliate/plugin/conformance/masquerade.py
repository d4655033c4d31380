"""What every engine of masquerading must do: a pod, a node, a world with no way back to the pod. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import MappingProxyType

import msgspec

from ciliate.datapath import Datapath, DatapathConfig
from ciliate.datapath.loader import Loader
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.nodeprograms import NodePrograms
from ciliate.datapath.pins import unmount
from ciliate.masquerade import Masquerade, MasqueradePlan, nobody
from ciliate.plugin.conformance import Case, Stage

POD, INNER = {4: "10.200.0.10", 6: "fd00:9::a"}, {4: "10.200.0.1", 6: "fd00:9::1"}
SECOND, THIRD = {4: "10.200.0.11", 6: "fd00:9::b"}, {4: "10.200.0.12", 6: "fd00:9::c"}
"""More pods, which stand in the same namespace."""
NODE, WORLD = {4: "192.0.2.1", 6: "2001:db8::1"}, {4: "192.0.2.2", 6: "2001:db8::2"}
SOURCES = tuple(ip_network(text) for text in ("10.200.0.0/24", "fd00:9::/64"))
PLAN = MasqueradePlan(
    sources=SOURCES,
    direct=SOURCES,
    devices={"out": tuple(ip_address(NODE[version]) for version in (4, 6))},
    entries=4096,
)
PORT = 7000
WAIT, ATTEMPTS = 1.0, 5
"""Seconds without an answer that count as none, and how often a question is put."""
_CLONE_NEWNET = 0x40000000
_ACCEPT_DAD = Path("/proc/sys/net/ipv6/conf/default/accept_dad")
_OF_IPTABLES = {f"table {word} {name}" for word in ("ip", "ip6") for name in ("nat", "filter", "mangle", "raw")}


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _enter(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "network namespace: cannot be entered")


class Site:
    """Three namespaces in a row. Their names end with pod, node and world."""

    def __init__(self) -> None:
        self._tag = f"ck{uuid.uuid4().hex[:8]}"
        self._open: dict[str, int] = {}
        for name in ("pod", "node", "world"):
            _run("ip", "netns", "add", self._tag + name)
            self._open[name] = os.open(f"/run/netns/{self._tag}{name}", os.O_RDONLY | os.O_CLOEXEC)
            # a device that looks for a duplicate of its link-local address asks nobody where a forwarded packet goes
            in_netns(self._open[name], lambda: _ACCEPT_DAD.write_text("0"))
        self._join()

    def _join(self) -> None:
        # with the same index at both ends the kernel takes a link for no pair, and tells of its carrier a second late
        for device, name, index in (("in", "pod", "1001"), ("out", "world", "1002")):
            veth = ["type", "veth", "peer", "name", "eth0", "netns", self._tag + name]
            _run("ip", "-n", f"{self._tag}node", "link", "add", device, "index", index, *veth)
        ends = (
            *(("pod", "eth0", item) for item in (POD, SECOND, THIRD)),
            ("node", "in", INNER),
            ("node", "out", NODE),
            ("world", "eth0", WORLD),
        )
        for name, device, addresses in ends:
            for version, address in addresses.items():
                rest = ["/24"] if version == 4 else ["/64"]
                nodad = [] if version == 4 else ["nodad"]
                _run("ip", "-n", self._tag + name, "address", "add", address + rest[0], "dev", device, *nodad)
            _run("ip", "-n", self._tag + name, "link", "set", device, "up")
        for address in INNER.values():
            _run("ip", "-n", f"{self._tag}pod", "route", "add", "default", "via", address)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and what it starts, in the node's namespace."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(self._open["node"])
            yield
        finally:
            _enter(before)
            os.close(before)

    def close(self) -> None:
        """Remove the namespaces."""
        for name, descriptor in self._open.items():
            os.close(descriptor)
            _run("ip", "netns", "del", self._tag + name)

    def state(self) -> str:
        """Rules and tables, and filters of the device to the world, as the node has them."""
        enter = ["nsenter", f"--net=/run/netns/{self._tag}node"]
        shown = [_run(*enter, "tc", "filter", "show", "dev", "out", side) for side in ("ingress", "egress")]
        for program in ("iptables", "ip6tables"):
            if shutil.which(program):
                shown.append(_run(*enter, program, "-t", "nat", "-S"))
        if shutil.which("nft"):
            # those that iptables makes, and leaves empty, are shown above
            tables = _run(*enter, "nft", "list", "tables").splitlines()
            shown += [_run(*enter, "nft", "list", *line.split()) for line in tables if line not in _OF_IPTABLES]
        return "\n".join(shown)

    def make(self, name: str, version: int, kind: socket.SocketKind, address: str, port: int) -> socket.socket:
        """A bound socket in one of the namespaces."""

        def bound() -> socket.socket:
            made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.settimeout(WAIT)
            made.bind((address, port))
            return made

        return in_netns(self._open[name], bound)

    def seen(self, version: int, port: int) -> tuple[str, bool]:
        """Whom the world sees behind a datagram of the pod, and whether its answer arrives."""
        with (
            self.make("world", version, socket.SOCK_DGRAM, WORLD[version], PORT) as server,
            self.make("pod", version, socket.SOCK_DGRAM, POD[version], port) as client,
        ):
            client.connect((WORLD[version], PORT))
            peer = _asked(client, server)
            try:
                server.sendto(b"answer", peer)
                return peer[0], client.recv(16) == b"answer"
            except (TimeoutError, OSError):
                return peer[0], False

    def connection(
        self, version: int, port: int, pod: Mapping[int, str] = MappingProxyType(POD)
    ) -> tuple[socket.socket, socket.socket, str]:
        """A TCP connection of a pod to the world: both ends, and whom the world sees."""
        with self.make("world", version, socket.SOCK_STREAM, WORLD[version], PORT) as server:
            server.listen()
            client = self.make("pod", version, socket.SOCK_STREAM, pod[version], port)
            for end in (server, client):
                end.settimeout(WAIT * ATTEMPTS)
            try:
                client.connect((WORLD[version], PORT))
                accepted, peer = server.accept()
            except BaseException:
                client.close()
                raise
        accepted.settimeout(WAIT * ATTEMPTS)
        return client, accepted, peer[0]

    def ping(self, version: int, pod: Mapping[int, str]) -> bool:
        """Whether one ping of a pod is answered; the kernel would choose any of the namespace's addresses."""
        options = ["-c1", f"-W{WAIT * ATTEMPTS:g}", "-n", "-I", pod[version]]
        command = ["nsenter", f"--net=/run/netns/{self._tag}pod", "ping", *options, WORLD[version]]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _asked(client: socket.socket, server: socket.socket) -> tuple[str, int]:
    """Whom a server sees behind a datagram, which is sent again while nothing comes: links may have just come up."""
    for _ in range(ATTEMPTS):
        client.send(b"ask")
        with contextlib.suppress(TimeoutError):
            peer: tuple[str, int] = server.recvfrom(16)[1]
            return peer
    raise AssertionError(f"no datagram reached the world in {ATTEMPTS} attempts")


def talks(client: socket.socket, server: socket.socket) -> bool:
    """Whether a connection carries data both ways."""
    try:
        client.sendall(b"ask")
        there = server.recv(16)
        server.sendall(b"answer")
        return (there, client.recv(16)) == (b"ask", b"answer")
    except OSError:
        return False


@functools.cache
def _compiled() -> tempfile.TemporaryDirectory[str]:
    """What the cases compile, which is the same for all of them; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="ciliate-check-compiled-")


@contextlib.asynccontextmanager
async def _site(stage: Stage) -> AsyncIterator[Site]:
    _expect(os.geteuid() == 0, "the kit needs root, for namespaces")
    loader = await stage.provide("loader", Loader)
    site = Site()
    root = stage.context().state_dir
    (root / "templates").symlink_to(_compiled().name)
    try:
        with site.inside():
            datapath = Datapath(DatapathConfig(state_dir=root, bpf_root=root / "bpffs", ct_tcp_max=4096), loader)
            try:
                await datapath.start()
                await datapath.programs.start()
                stage.offer(Datapath, datapath)
                stage.offer(NodePrograms, datapath.programs)
                yield site
            finally:
                await datapath.destroy()
                unmount(Path(root) / "bpffs")
    finally:
        site.close()


async def every_protocol_gets_the_nodes_address(stage: Stage) -> None:
    """UDP, TCP and pings of both families reach the world from the node's address, and are answered."""
    async with _site(stage) as site:
        engine: Masquerade = await stage.make()
        await engine.engage(PLAN, nobody)
        for version in (4, 6):
            peer, answered = site.seen(version, 40000)
            _expect(peer == NODE[version], f"UDP came from {peer}, expected {NODE[version]}")
            _expect(answered, f"the answer to UDP over IPv{version} did not arrive")
            client, server, peer = site.connection(version, 40001)
            with client, server:
                _expect(peer == NODE[version], f"TCP came from {peer}, expected {NODE[version]}")
                _expect(talks(client, server), f"TCP over IPv{version} carries no data")
            for pod in (POD, SECOND, THIRD):
                _expect(site.ping(version, pod), f"a ping of {pod[version]} over IPv{version} was not answered")
        await engine.remove()


async def other_destinations_see_the_pod(stage: Stage) -> None:
    """What goes to a direct prefix keeps the pod's address."""
    async with _site(stage) as site:
        engine: Masquerade = await stage.make()
        direct = (*SOURCES, *(ip_network(address) for address in WORLD.values()))
        await engine.engage(msgspec.structs.replace(PLAN, direct=direct), nobody)
        for version in (4, 6):
            peer, _ = site.seen(version, 40000)
            _expect(peer == POD[version], f"a datagram came from {peer}, expected {POD[version]}")
        await engine.remove()


async def mappings_are_shown_and_flushed(stage: Stage) -> None:
    """Every mapping is listed with pod, node and peer, and goes by flush."""
    async with _site(stage) as site:
        engine: Masquerade = await stage.make()
        await engine.engage(PLAN, nobody)
        for version in (4, 6):
            site.seen(version, 40000)
        flows = {flow.source: flow for flow in await engine.flows() if flow.protocol == socket.IPPROTO_UDP}
        for version in (4, 6):
            flow = flows.get(ip_address(POD[version]))
            _expect(flow is not None, f"no mapping of {POD[version]} is listed")
            if flow is not None:
                found = (flow.source_port, str(flow.node), str(flow.remote), flow.remote_port)
                wanted = (40000, NODE[version], WORLD[version], PORT)
                _expect(found == wanted, f"the mapping is {found}, expected {wanted}")
        _expect(await engine.remaining() >= 2, "remaining gave fewer than the mappings that are listed")
        removed = await engine.flush(lambda flow: flow.source == ip_address(POD[4]))
        left = {flow.source for flow in await engine.flows()}
        _expect(removed >= 1 and ip_address(POD[4]) not in left, "a flushed mapping is still there")
        _expect(ip_address(POD[6]) in left, "flush removed what was not picked")
        _expect(0 <= await engine.pressure() <= 1, "pressure is not between 0 and 1")
        await engine.remove()


async def a_drained_engine_serves_its_flows(stage: Stage) -> None:
    """After drain open connections go on, new flows leave with the pod's address, and remaining counts what is left."""
    async with _site(stage) as site:
        engine: Masquerade = await stage.make()
        await engine.engage(PLAN, nobody)
        for version in (4, 6):
            client, server, _ = site.connection(version, 40001)
            with client, server:
                await engine.drain(PLAN, False)
                _expect(talks(client, server), f"a connection over IPv{version} ended with drain")
                peer, _ = site.seen(version, 40002)
                _expect(peer == POD[version], f"a new flow came from {peer} after drain, expected {POD[version]}")
                _expect(await engine.remaining() >= 1, "remaining gave 0 while a connection is open")
            await engine.engage(PLAN, nobody)
        await engine.remove()


async def a_new_instance_goes_on(stage: Stage) -> None:
    """Another instance that engages over what the first one left interrupts nothing."""
    async with _site(stage) as site:
        first: Masquerade = await stage.make()
        await first.engage(PLAN, nobody)
        client, server, _ = site.connection(4, 40001)
        with client, server:
            await stage.end(first)
            _expect(talks(client, server), "a connection ended with the instance that began it")
            second: Masquerade = await stage.make()
            await second.engage(PLAN, nobody)
            _expect(talks(client, server), "a connection ended when a new instance engaged")
            _expect(await second.mend() == [], "there was something to mend right after engage")
            await second.remove()


async def nothing_is_left(stage: Stage) -> None:
    """Remove takes away what engage put there, and does nothing where nothing is."""
    async with _site(stage) as site:
        engine: Masquerade = await stage.make()
        before = site.state()
        await engine.remove()
        await engine.engage(PLAN, nobody)
        _expect(site.state() != before, "engage left no trace in rules or filters")
        await engine.remove()
        _expect(site.state() == before, f"after remove there is:\n{site.state()}")


async def flows_of_another_engine_go_on(stage: Stage) -> None:
    """Connections that another engine serves go on through a switch, and so do its own when that one comes back.

    Two pods have the same port towards one server, so one of them has another port on the node. A third pod that takes
    the port after the switch gets none that is in use.
    """
    async with _site(stage) as site:
        engine: Masquerade = await stage.make()
        other: Masquerade = await stage.another()
        await other.engage(PLAN, nobody)
        with contextlib.ExitStack() as stack:

            def connect(pod: Mapping[int, str]) -> list[tuple[str, socket.socket, socket.socket]]:
                made = []
                for version in (4, 6):
                    client, server, peer = site.connection(version, 40000, pod)
                    for end in (client, server):
                        stack.enter_context(end)
                    _expect(peer == NODE[version], f"TCP of {pod[version]} came from {peer}, expected {NODE[version]}")
                    made.append((pod[version], client, server))
                return made

            def all_talk(when: str) -> None:
                for pod, client, server in connections:
                    _expect(talks(client, server), f"the connection of {pod} from port 40000 ended {when}")

            connections = [*connect(POD), *connect(SECOND)]
            all_talk("before any switch")
            await engine.engage(PLAN, other.flows)
            all_talk("when the engine came beside the one that serves it")
            await other.drain(PLAN, True)
            all_talk("when the engine that serves it began to drain")
            connections += connect(THIRD)
            all_talk("when a third pod took the same port")
            await other.engage(PLAN, engine.flows)
            await engine.drain(PLAN, True)
            all_talk("when the other engine came back")
        await engine.remove()
        await other.remove()


CASES: list[Case] = [
    every_protocol_gets_the_nodes_address,
    other_destinations_see_the_pod,
    mappings_are_shown_and_flushed,
    a_drained_engine_serves_its_flows,
    a_new_instance_goes_on,
    nothing_is_left,
    flows_of_another_engine_go_on,
]
