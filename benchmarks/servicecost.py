"""What a connection through a service costs: packet by packet, at sockets, by kube-proxy's rules, against no service.

One pod connects to another of the same node, over and over, to the last of N services, whose five backends are five
ports of the other pod. Rounds of all ways are interleaved, both ends run on one processor, and processor time counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import kubeproxy
from harness import Node, live_harness, node
from kubeproxy import Service
from report import Figure, Panel, write_svg
from transactions import LOADER, SERVER, Cost, Ends, connect, program, route, widen_ports

from ciliate.datapath import socketlb
from ciliate.datapath.loadbalancer import Entry, LoadBalancer
from ciliate.service.model import BackendSpec, FrontendSpec, ServiceSpec
from ciliate.service.table import ServiceTable

BACKENDS, PORT = 5, 80
OUT = Path(__file__).with_name("out")
DIRECT, PACKETS, SOCKETS, IPTABLES, NFTABLES = (
    "no service",
    "packets",
    "sockets",
    "kube-proxy iptables",
    "kube-proxy nftables",
)
TARGETS = {PACKETS: 1.10, SOCKETS: 1.02}
NFT_LIMIT = 10000
"""More services than this take nft minutes to load."""


class Size(NamedTuple):
    """Numbers of services, connections per round, rounds."""

    counts: tuple[int, ...]
    connections: int
    rounds: int


FULL, QUICK = Size((1, 1000, 10000, 20000), 1500, 15), Size((1, 1000, 20000), 500, 11)


class Server(Ends):
    """One process that answers on all backends' ports; its clients say which address they connect to."""

    def __init__(self, binary: Path, tag: str, address: str, target: str, cgroup: Path | None = None) -> None:
        super().__init__(binary, tag, address)
        self.close()
        command = [self._program, f"/run/netns/{tag}pod{SERVER}", self._cpu, "serve", address, str(PORT), str(BACKENDS)]
        self._server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._target, self._cgroup = target, cgroup

    def run(self, kind: str, count: int) -> Cost:
        """One round."""
        before = self._spent()
        command = [self._program, self._client, self._cpu, kind, self._target, str(PORT), str(count)]
        if self._cgroup is not None:
            command = ["sh", "-c", f'echo $$ > {self._cgroup}/cgroup.procs && exec "$@"', "sh", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{kind} to {self._target}: {done.stderr.strip()}")
        latency, _, cpu = (int(word) for word in done.stdout.split())
        return Cost(latency, (cpu + self._spent() - before) / count)


def services(count: int, server: str) -> list[Service]:
    """So many; the last is the one that is connected to."""
    others = [
        Service(
            f"10.96.{number >> 8}.{number & 255}",
            PORT,
            [
                (f"172.{16 + (number >> 14)}.{number >> 6 & 255}.{number % 64 * 4 + index % 4}", 8000 + index)
                for index in range(BACKENDS)
            ],
        )
        for number in range(count - 1)
    ]
    return [*others, Service("10.97.255.1", PORT, [(server, PORT + index) for index in range(BACKENDS)])]


def fill(balancer: LoadBalancer, wanted: Sequence[Service]) -> None:
    """Make the maps so."""
    table = ServiceTable()
    specs = [
        ServiceSpec(
            frontend_address=FrontendSpec(item.ip, item.port),
            backend_addresses=[BackendSpec(*backend) for backend in item.backends],
        )
        for item in wanted
    ]
    table.plan(specs)
    entries = [Entry(record.id, record.frontend, record.backends) for record in table.records.values()]
    balancer.adopt(entries, table.backends)


@contextlib.contextmanager
def cgroup(tag: str) -> Iterator[Path | None]:
    """A cgroup for clients whose sockets meet services; None where there is no cgroup2."""
    mount = socketlb.cgroup2_mount()
    if mount is None:
        yield None
        return
    path = mount / f"ciliate-benchmark-{tag}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


def available() -> dict[str, Callable[[str, Sequence[Service]], None]]:
    """The modes of kube-proxy whose tools are here."""
    found = {}
    if shutil.which("iptables-legacy-restore"):
        found[IPTABLES] = kubeproxy.load_iptables
    if shutil.which("nft"):
        found[NFTABLES] = kubeproxy.load_nftables
    return found


def rounds(ways: dict[str, Server], size: Size) -> dict[str, list[Cost]]:
    """Interleaved rounds of all ways; the first of each is not counted."""
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(size.rounds + 1):
        order = list(ways) if number % 2 else list(ways)[::-1]
        for name in order:
            cost = ways[name].run("crr", size.connections)
            if number:
                found[name].append(cost)
    return found


class Way(NamedTuple):
    """Medians of the rounds of one way: nanoseconds, and what its processor time was of no service's in the same round.

    A round takes a tenth of a second, in which the machine is what it is for all ways.
    """

    latency: float
    cpu: float
    ratio: float


def way_of(own: Sequence[Cost], direct: Sequence[Cost]) -> Way:
    """The medians."""
    ratios = [mine.cpu / plain.cpu for mine, plain in zip(own, direct, strict=True)]
    return Way(median(item.latency for item in own), median(item.cpu for item in own), median(ratios))


Costs = dict[str, dict[int, Way]]


async def measure(size: Size) -> tuple[list[Figure], Costs]:
    """All figures, and the costs by way and number of services."""
    pods = [f"pod{number}" for number in live_harness.IDENTITY]
    modes, costs = available(), Costs()
    async with contextlib.AsyncExitStack() as stack:
        joined = await stack.enter_async_context(node(LOADER, *pods))
        plain = {name: await stack.enter_async_context(node(LOADER, *pods)) for name in (DIRECT, *modes)}
        await connect(joined)
        await joined.datapath.apply_policy(SERVER, {}, [], False, False)
        for each in plain.values():
            route(each)
        for each in (joined, *plain.values()):
            widen_ports(each)
        binary, server = stack.enter_context(program()), live_harness.address(SERVER, 4)
        group = stack.enter_context(cgroup(joined.net.tag))
        if group is not None:
            await joined.datapath.balance_sockets(group)
        ways = servers(stack, binary, joined, plain, server, group)
        balancer = LoadBalancer.open(joined.datapath.pins)
        stack.callback(balancer.close)
        for count in size.counts:
            wanted = services(count, server)
            await asyncio.to_thread(fill, balancer, wanted)
            now = dict(ways)
            for name, load in modes.items():
                if name == NFTABLES and count > NFT_LIMIT:
                    now.pop(name)
                    continue
                await asyncio.to_thread(load, f"{plain[name].net.tag}node", wanted)
            found = await asyncio.to_thread(rounds, now, size)
            for name, each in found.items():
                costs.setdefault(name, {})[count] = way_of(each, found[DIRECT])
    return list(figures(costs)), costs


def servers(
    stack: contextlib.AsyncExitStack,
    binary: Path,
    joined: Node,
    plain: dict[str, Node],
    server: str,
    group: Path | None,
) -> dict[str, Server]:
    """The ends of every way, ready."""
    vip = services(1, server)[0].ip
    wanted = {PACKETS: (joined, vip, None), **{name: (each, vip, None) for name, each in plain.items()}}
    wanted[DIRECT] = (plain[DIRECT], server, None)
    made: dict[str, Server] = {}
    for name, (each, target, where) in wanted.items():
        made[name] = Server(binary, each.net.tag, server, target, where)
    for ends in made.values():
        stack.callback(ends.close)
        ends.ready()
    if group is not None:
        made[SOCKETS] = Shared(made[PACKETS], group)
    return made


class Shared(Server):
    """The server of another way, with clients in a cgroup."""

    def __init__(self, other: Server, cgroup: Path) -> None:
        self.__dict__.update(other.__dict__)
        self._cgroup = cgroup


def figures(costs: Costs) -> Iterator[Figure]:
    """Ratios to no service, and how flat they are."""
    base = costs[DIRECT]
    for name, found in costs.items():
        if name == DIRECT:
            continue
        for count, cost in found.items():
            ratio, target = cost.ratio, TARGETS.get(name)
            ours, plain = cost.cpu / 1e3, base[count].cpu / 1e3
            beside = f"{ours:.1f} µs against {plain:.1f} µs of CPU; p50 {cost.latency / 1e3:.1f} µs"
            aim = target if count == max(base) else None
            yield Figure(
                f"{name}, {count:,} services",
                f"{ratio:.3f}",
                f"<= {aim}" if aim else "",
                ratio / aim if aim else 0,
                beside,
            )
        if name in TARGETS:
            relative = [cost.ratio for cost in found.values()]
            growth = relative[-1] / relative[0]
            yield Figure(f"{name}, most services against one", f"{growth:.3f}", "<= 1.05", growth / 1.05)


def plot(costs: Costs) -> Path:
    """Microseconds of processor time per connection over the number of services."""
    series = {name: [(count, cost.cpu / 1e3) for count, cost in found.items()] for name, found in costs.items()}
    path = OUT / "services.svg"
    write_svg(path, "New connections through a service", [[Panel("CPU per connection", "services", "µs", series)]])
    return path
