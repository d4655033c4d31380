"""TCP transactions between two pods of a node, against the kernel's own routing between the same two namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from harness import Node, live_harness, node
from report import Figure

from ciliate.datapath import EndpointConfig, bpf, devices
from ciliate.datapath.compiler import find_clang
from ciliate.identity import HOST
from ciliate.policy.mapstate import INGRESS, MapState, PolicyEntry, PolicyKey, Verdict

SOURCE = Path(__file__).with_suffix(".c")
CLIENT, SERVER, PORT = live_harness.CLIENT, live_harness.SERVER, 80
LOADER = "shared"
TIMEOUT = 60
ROUTERS = live_harness.ROUTER4, live_harness.ROUTER6
KINDS = {"rr": "request/response", "crr": "connect/request/close"}
CPU_TARGET = {"rr": 0.97, "crr": 1.02}
BPF_TARGET = {"rr": 1500, "crr": 7000}


class Size(NamedTuple):
    """Transactions of each kind per round, and how many rounds."""

    rr: int
    crr: int
    rounds: int
    families: tuple[int, ...]


FULL, QUICK = Size(8000, 2000, 11, (4, 6)), Size(3000, 800, 5, (4,))


class Cost(NamedTuple):
    """Of one transaction, in nanoseconds: median latency, and processor time of both ends."""

    latency: float
    cpu: float


class Ends:
    """A server and its clients, which share one processor."""

    def __init__(
        self, program: Path, tag: str, address: str, client: int = CLIENT, server: int = SERVER, serve: str = "serve"
    ) -> None:
        self._address, self._client = address, f"/run/netns/{tag}pod{client}"
        self._program, self._cpu = str(program), str(max(os.sched_getaffinity(0)))
        command = [self._program, f"/run/netns/{tag}pod{server}", self._cpu, serve, address, str(PORT)]
        self._server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        """Wait until the server listens."""
        assert self._server.stdout is not None
        if self._server.stdout.readline() != "ready\n":
            raise RuntimeError(f"the server at {self._address} did not start")

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.communicate()

    def run(self, kind: str, count: int) -> Cost:
        """One round."""
        before = self._spent()
        command = [self._program, self._client, self._cpu, kind, self._address, str(PORT), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"{kind} to {self._address}: {done.stderr.strip()}")
        latency, _, cpu = (int(word) for word in done.stdout.split())
        return Cost(latency, (cpu + self._spent() - before) / count)

    def _spent(self) -> int:
        return int(Path(f"/proc/{self._server.pid}/schedstat").read_text().split()[0])


@contextlib.contextmanager
def program() -> Iterator[Path]:
    """The compiled client and server."""
    with tempfile.TemporaryDirectory(prefix="ciliate-benchmark-") as directory:
        target = Path(directory) / "transactions"
        subprocess.run([find_clang()[0], "-O2", "-o", str(target), str(SOURCE)], check=True)
        yield target


def endpoint(joined: Node, number: int) -> EndpointConfig:
    """A pod's device on both sides, not yet connected to the datapath."""
    return live_harness.endpoint_config(joined, number)


def policy(entries: int = 100) -> MapState:
    """What a server allows: the client on its port, others on theirs, a range, the node; the rest is denied."""
    allow = PolicyEntry(Verdict.ALLOW, 0, 1)
    peers = {PolicyKey(INGRESS, 1000 + number, 6, 1024 + number, 16): allow for number in range(entries - 3)}
    return {
        **peers,
        PolicyKey(INGRESS, live_harness.IDENTITY[CLIENT], 6, PORT, 16): allow,
        PolicyKey(INGRESS, 999, 6, 8192, 4): allow,
        PolicyKey(INGRESS, HOST): allow,
    }


async def connect(joined: Node) -> None:
    """Two pods by the datapath, with conntrack, and policy at the server."""
    await live_harness.connect_all(joined)
    await joined.datapath.sync_policy(SERVER, policy(), True, False)


def route(plain: Node) -> None:
    """The same devices, addresses and routes, with no program on any device."""
    for number in (SERVER, CLIENT):
        config = endpoint(plain, number)

        def connect_host(config: EndpointConfig = config) -> None:
            devices.connect_host(config.ifindex, config.mac, config.ipv4, config.ipv6, *ROUTERS)

        plain.net.run("node", connect_host)
        # a solicitation for an address of another device gets no answer, so the pod knows its router beforehand
        neighbour = ["neigh", "replace", str(ROUTERS[1]), "lladdr", config.node_mac.hex(":"), "dev", "eth0"]
        subprocess.run(["ip", "-n", f"{plain.net.tag}pod{number}", *neighbour], check=True)


def widen_ports(joined: Node) -> None:
    """Room for the closed connections of all rounds."""
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    joined.net.run(f"pod{CLIENT}", lambda: path.write_text("1024 65535"))


def statistics(joined: Node) -> int:
    """Nanoseconds spent in the programs of every device so far."""
    spent = 0
    for name in ("entry_from", "entry_to"):
        descriptor = bpf.get_pinned(joined.datapath.pins / name)
        spent += bpf.ProgramInfo(descriptor).run_time
        os.close(descriptor)
    return spent


def timed(joined: Node, ends: Ends, kind: str, count: int, rounds: int) -> float:
    """Nanoseconds in BPF per transaction by the kernel's statistics, which cost time themselves."""
    found = []
    descriptor = bpf.enable_statistics()
    try:
        for _ in range(rounds):
            before = statistics(joined)
            ends.run(kind, count)
            found.append((statistics(joined) - before) / count)
    finally:
        os.close(descriptor)
    return median(found)


def compare(joined: Node, with_bpf: Ends, without: Ends, size: Size, family: int) -> list[Figure]:
    """Interleaved rounds of both, and then the time in BPF."""
    return [figure for kind in KINDS for figure in compare_kind(joined, with_bpf, without, size, family, kind)]


def compare_kind(joined: Node, with_bpf: Ends, without: Ends, size: Size, family: int, kind: str) -> Iterator[Figure]:
    """The figures of one kind of transaction."""
    title = KINDS[kind]
    count = getattr(size, kind)
    costs: dict[Ends, list[Cost]] = {with_bpf: [], without: []}
    for ends in costs:
        ends.run(kind, count // 4)
    for number in range(size.rounds):
        for ends in (with_bpf, without) if number % 2 else (without, with_bpf):
            costs[ends].append(ends.run(kind, count))
    ours, theirs = (Cost(*map(median, zip(*rounds, strict=True))) for rounds in costs.values())
    name, aim = f"pod to pod, IPv{family}, {title}", CPU_TARGET[kind]
    ratio = ours.cpu / theirs.cpu
    beside = f"{ours.cpu / 1e3:.2f} µs against {theirs.cpu / 1e3:.2f} µs of veth routing"
    yield Figure(f"{name}: CPU", f"{ratio:.3f} of veth", f"<= {aim}", ratio / aim, beside)
    ratio = ours.latency / theirs.latency
    beside = f"{ours.latency / 1e3:.2f} µs against {theirs.latency / 1e3:.2f} µs"
    yield Figure(f"{name}: p50", f"{ratio:.3f} of veth", "", 0.0, beside)
    spent, aim = timed(joined, with_bpf, kind, count, max(3, size.rounds // 3)), BPF_TARGET[kind]
    yield Figure(f"{name}: in BPF", f"{spent:,.0f} ns", f"< {aim:,} ns", spent / aim)


async def measure(size: Size) -> list[Figure]:
    """Every figure of pod to pod."""
    pods = [f"pod{number}" for number in live_harness.IDENTITY]
    figures: list[Figure] = []
    async with node(LOADER, *pods) as joined, node(LOADER, *pods) as plain:
        await connect(joined)
        route(plain)
        for each in (joined, plain):
            widen_ports(each)
        for family in size.families:
            with program() as binary, contextlib.ExitStack() as stack:
                address = live_harness.address(SERVER, family)
                pair = [Ends(binary, each.net.tag, address) for each in (joined, plain)]
                for ends in pair:
                    stack.callback(ends.close)
                    ends.ready()
                figures += await asyncio.to_thread(compare, joined, *pair, size, family)
    return figures
