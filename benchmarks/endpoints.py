"""What a new endpoint costs under each loader: time until it is ready, and kernel memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import memory
from harness import Node, live_harness, node
from report import Figure, seconds
from transactions import policy

from ciliate.datapath import EndpointConfig, devices, layout
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.libbpf import read
from ciliate.datapath.loader import Loader, LoadPlan, load_object
from ciliate.policy.mapstate import MapState
from ciliate_loader.shared_loader import SharedLoader
from ciliate_loader.template_loader import DEFINES, TemplateLoader, _with_constant

FASTER = {"template": 25, "shared": 100}
READY, MEMORY = 0.002, 16 * 1024
ENTRIES = 50
POLICIES = (30, 150)


class Size(NamedTuple):
    """How many endpoints are made per loader, how many by clang each, and how many to weigh."""

    loaded: int
    compiled: int
    weighed: int


FULL, QUICK = Size(100, 9, 1000), Size(20, 3, 200)


class CompileLoader(TemplateLoader):
    """What a loader would do that runs clang for each endpoint: the baseline, of use for nothing else."""

    def prepare(self, plan: LoadPlan) -> None:
        """As for loader `template`."""
        super().prepare(plan)
        self._plan = plan

    def attach(self, ifindex: int, endpoint: int) -> None:
        """Compile, load, attach."""
        elf = read(Compiler(self._plan.cache).compile("endpoint", (*DEFINES, f"CILIATE_ENDPOINT={endpoint}")))
        programs = load_object(elf, "endpoint", _with_constant(self._plan, self._constant_of(ifindex, endpoint)))
        for name, egress in (("to_container", True), ("from_container", False)):
            devices.attach_filter(ifindex, egress, programs.program_fd(name), endpoint, f"ciliate_{name}")
        programs.close()


LOADERS: dict[str, Callable[[], Loader]] = {
    "compile": CompileLoader,
    "template": TemplateLoader,
    "shared": SharedLoader,
}


class Parts(NamedTuple):
    """Seconds: the device pair made, maps filled, programs attached, device up with routes."""

    device: float
    maps: float
    programs: float
    routes: float

    @property
    def ready(self) -> float:
        """What counts as the endpoint's being ready."""
        return self.maps + self.programs


def new_device(joined: Node, number: int) -> EndpointConfig:
    """A pair of devices, the pod's side in a namespace that all of them share."""
    name = f"lxcb{number}"
    pair = devices.create_endpoint_device(name, joined.net.descriptors["pods"], f"p{number}")
    return EndpointConfig(
        id=number,
        ifindex=pair.host_ifindex,
        ifname=name,
        identity=10000 + number,
        mac=pair.container_mac,
        node_mac=pair.host_mac,
        ipv4=IPv4Address(f"10.78.{number // 256}.{number % 256}"),
        ipv6=IPv6Address(f"fd78::{number:x}"),
        enforce_ingress=True,
    )


def fill(joined: Node, config: EndpointConfig, state: MapState) -> None:
    """An endpoint's entries in every map."""
    datapath = joined.datapath
    datapath._endpoints[config.id] = config
    datapath._entries.sync(config, state, None)
    datapath._entries.write_addresses(config)
    prefixes = {ip_network(str(address)): config.identity for address in config.addresses}
    pairs = [(layout.ipcache_key(prefix), layout.ipcache_entry(number)) for prefix, number in prefixes.items()]
    datapath._maps["ciliate_ipcache"].update_many(pairs)


def connect(joined: Node, loader: Loader, number: int, state: MapState) -> Parts:
    """A whole new endpoint, step by step. Runs in the datapath's thread."""
    times = [time.perf_counter()]
    config = new_device(joined, number)
    times.append(time.perf_counter())
    fill(joined, config, state)
    times.append(time.perf_counter())
    loader.attach(config.ifindex, config.id)
    times.append(time.perf_counter())
    routers = live_harness.ROUTER4, live_harness.ROUTER6
    devices.connect_host(config.ifindex, config.mac, config.ipv4, config.ipv6, *routers)
    times.append(time.perf_counter())
    return Parts(*(after - before for before, after in pairwise(times)))


def series(joined: Node, plan: LoadPlan, name: str, first: int, count: int) -> Parts:
    """Medians over ``count`` endpoints under one loader."""
    loader, state = LOADERS[name](), policy(ENTRIES)
    loader.prepare(plan)
    try:
        parts = [connect(joined, loader, number, state) for number in range(first, first + count)]
    finally:
        loader.close()
    return Parts(*map(median, zip(*parts, strict=True)))


def ready_figures(found: dict[str, Parts]) -> Iterator[Figure]:
    """Each loader against the compiler."""
    base = found["compile"].ready
    yield Figure("endpoint ready, clang for each", seconds(base), "", 0.0, "programs attached, maps filled")
    for name, aim in FASTER.items():
        parts = found[name]
        gain = base / parts.ready
        beside = f"maps {seconds(parts.maps)}, programs {seconds(parts.programs)}; {gain:,.0f} times faster"
        yield Figure(f"endpoint ready, loader {name}", seconds(parts.ready), f"clang/{aim}", aim / gain, beside)
    shared = found["shared"]
    whole = sum(shared)
    yield Figure("the same in time, loader shared", seconds(shared.ready), "< 2 ms", shared.ready / READY)
    beside = f"device pair with its settings {seconds(shared.device)}, device up and routes {seconds(shared.routes)}"
    yield Figure("its whole device, loader shared", seconds(whole), "", 0.0, beside)


def weigh(joined: Node, plan: LoadPlan, first: int, count: int, entries: int) -> memory.Weight:
    """Kernel memory per endpoint of the shared loader."""
    configs: list[EndpointConfig] = []
    loader, state = SharedLoader(), policy(entries)
    loader.prepare(plan)
    try:
        weights = memory.weigh(
            [
                lambda: configs.extend(new_device(joined, number) for number in range(first, first + count)),
                lambda: [devices.ensure_clsact(config.ifindex) for config in configs],
                lambda: [loader.attach(config.ifindex, config.id) for config in configs],
                lambda: [fill(joined, config, state) for config in configs],
            ],
            count,
        )
    finally:
        loader.close()
    return memory.Weight(*weights)


def memory_figures(joined: Node, plan: LoadPlan, size: Size) -> Iterator[Figure]:
    """What endpoints with a small and with a large policy take."""
    for number, entries in enumerate(POLICIES):
        weight = weigh(joined, plan, 3001 + number * size.weighed, size.weighed, entries)
        kib = [f"{part / 1024:.1f}" for part in weight]
        beside = (
            f"maps {kib[3]} KiB, two filters {kib[2]}, the kernel's clsact {kib[1]}; the veth pair beside it {kib[0]}"
        )
        title = f"kernel memory per endpoint, {size.weighed:,} with {entries} policy entries"
        yield Figure(title, f"{weight.all / 1024:.1f} KiB", "< 16 KiB", weight.all / MEMORY, beside)


async def measure(size: Size) -> list[Figure]:
    """Every figure of new endpoints."""
    async with node("shared", "pods") as joined:
        plan = joined.datapath._plan()

        def work() -> list[Figure]:
            counts = {"shared": size.loaded, "template": size.loaded, "compile": size.compiled}
            firsts = {"shared": 1, "template": 1001, "compile": 2001}
            found = {name: series(joined, plan, name, firsts[name], count) for name, count in counts.items()}
            return [*ready_figures(found), *memory_figures(joined, plan, size)]

        return await joined.run(work)
