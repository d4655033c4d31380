"""How long policy takes, from import to the kernel's policy map, and how that grows. Run: python benchmarks/policy.py

The kernel part needs root: it writes to maps of its own, pinned in a BPF file system of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
from clusters import Cluster, documents
from kernelmaps import KernelDatapath, pinned_maps, unpinned_maps
from report import Figure, Panel, seconds, table, write_svg
from timing import Rounds, memory

from ciliate.agent.policy_service import PolicyService
from ciliate.datapath import Datapath
from ciliate.datapath.bpf import Map
from ciliate.endpoint.model import Endpoint, EndpointRequest
from ciliate.endpoint.realize import Realizer
from ciliate.identity.local import LocalIdentities
from ciliate.ipcache import Ipcache
from ciliate.labels import LabelSet
from ciliate.manifest import Document
from ciliate.policy.repository import Repository
from ciliate.policy.simulate import Simulation
from ciliate.scenario.model import parse_flow

OUT = Path(__file__).parent / "out" / "policy.svg"
Maps = Mapping[str, Map] | None
MB = 1 << 20


class Size(NamedTuple):
    """How large a cluster is, and its policy."""

    rules: int
    identities: int
    endpoints: int

    @property
    def cluster(self) -> Cluster:
        """The cluster of this size."""
        return Cluster(self.endpoints, self.identities)

    def documents(self, shared: bool = False) -> list[Document]:
        """Its rules as read from a file."""
        return documents(self.cluster.rules(self.rules, shared))


class Measured(NamedTuple):
    """What some rounds cost, and a word on how much work that was."""

    rounds: Rounds
    work: str = ""


class Node:
    """The agent's policy part: repository, realizer and policy file, above ``maps`` or above nothing."""

    def __init__(self, cluster: Cluster, maps: Maps, folder: Path) -> None:
        self.cluster = cluster
        self.repository = Repository()
        self.datapath = KernelDatapath(maps)
        self.realizer = Realizer(cast(Datapath, self.datapath), self.repository, Ipcache(), LocalIdentities(), folder)
        self.service = PolicyService(self.repository, self.realizer, folder)

    async def attach(self) -> None:
        """Learn the identities and connect the local endpoints."""
        self.repository.upsert_identities(self.cluster.every_identity())
        endpoints = [self._endpoint(index) for index in range(self.cluster.endpoints)]
        self.realizer.endpoints = {endpoint.id: endpoint for endpoint in endpoints}
        for endpoint in endpoints:
            await self.realizer.attach(endpoint)

    def _endpoint(self, index: int) -> Endpoint:
        request = EndpointRequest(
            container_id=str(index),
            container_ifname="eth0",
            host_ifname="none",
            host_ifindex=1,
            host_mac=bytes(6),
            mac=bytes(6),
        )
        endpoint = Endpoint(index + 1, request, LabelSet())
        endpoint.identity = self.cluster.number(index)
        return endpoint

    async def import_rules(self, rules: Sequence[Document]) -> None:
        """From documents to the kernel's policy map."""
        self.repository.import_documents(rules)
        await self.realizer.realize()

    async def learn(self, index: int) -> None:
        """From one identity's arrival to the kernel's policy map."""
        self.repository.upsert_identities([self.cluster.identity(index)])
        await self.realizer.realize()

    async def withdraw(self, rules: Sequence[Document]) -> None:
        """Delete rules again."""
        names = {rule.object["metadata"]["name"] for rule in rules}
        self.repository.delete([item.ref for item in self.repository.objects() if item.name in names])
        await self.realizer.realize()

    def entries(self) -> int:
        """Entries of every endpoint together."""
        return sum(len(self.repository.resolve(number).map_state) for number in self.realizer.endpoints)

    def check(self) -> None:
        """What the kernel has is what the policies say, or the figures mean nothing."""
        for endpoint, entries in self.datapath.in_kernel().items():
            if entries != self.repository.resolve(endpoint).map_state:
                raise SystemExit(f"endpoint {endpoint}: the kernel's entries are not those of its policy")


@contextlib.asynccontextmanager
async def running(cluster: Cluster, maps: Maps) -> AsyncIterator[Node]:
    """A node with its identities and endpoints, and without policies."""
    with tempfile.TemporaryDirectory(prefix="ciliate-benchmark-") as folder:
        node = Node(cluster, maps, Path(folder))
        try:
            await node.attach()
            yield node
        finally:
            node.datapath.close()


# what is measured


async def import_all(size: Size, maps: Maps, rounds: int, shared: bool = False, stored: bool = False) -> Measured:
    """Import every rule at once; ``stored``: as the agent does it, with its policy file written on the way."""
    found, entries = Rounds(), 0
    for number in range(rounds):
        rules = size.documents(shared)
        async with running(size.cluster, maps) as node:
            with found.one():
                await (node.service.import_documents(rules) if stored else node.import_rules(rules))
            if number == 0:
                node.check()
                entries = node.entries()
    return Measured(found, f"{entries:,} entries")


async def import_one(size: Size, maps: Maps, rounds: int, stored: bool = False) -> Measured:
    """Import one rule for one endpoint beside those that are there."""
    found = Rounds()
    async with running(size.cluster, maps) as node:
        await node.import_rules(size.documents())
        for number in range(rounds):
            rule = documents([node.cluster.rule(10 * (size.rules + number), number % size.endpoints)])
            with found.one():
                await (node.service.import_documents(rule) if stored else node.import_rules(rule))
            await node.withdraw(rule)
        node.check()
    return Measured(found)


async def arrive(size: Size, maps: Maps, rounds: int) -> Measured:
    """One identity comes, to the kernel."""
    found = Rounds()
    async with running(size.cluster, maps) as node:
        await node.import_rules(size.documents())
        before = node.repository.counters.endpoints_touched
        for number in range(rounds):
            with found.one():
                await node.learn(size.identities + number)
        touched = node.repository.counters.endpoints_touched - before
        node.check()
    return Measured(found, f"{touched / rounds:.0f} endpoints change")


def loaded(size: Size, shared: bool) -> Repository:
    """A repository with its identities, rules and prefixes, and with no endpoint yet."""
    repository = Repository()
    repository.upsert_identities(size.cluster.every_identity())
    repository.import_documents(size.documents(shared))
    local = LocalIdentities()
    repository.upsert_identities([local.acquire(prefix) for prefix in repository.cidrs()])
    return repository


def arrive_in_memory(size: Size, rounds: int) -> Measured:
    """One identity comes, until the endpoints' deltas are known."""
    found, repository, cluster = Rounds(), loaded(size, shared=False), size.cluster
    for index in range(size.endpoints):
        repository.register_endpoint(index + 1, cluster.number(index))
    repository.drain_changes()
    entries = 0
    for number in range(rounds):
        identity = cluster.identity(size.identities + number)
        with found.one():
            repository.upsert_identities([identity])
            deltas = repository.drain_changes()
        entries += sum(len(delta.upserts) for delta in deltas)
    return Measured(found, f"{entries / rounds:.0f} entries")


def resolve_cold(size: Size, rounds: int) -> Measured:
    """Resolve one endpoint that every rule selects; without endpoints no peer selector is cached."""
    found, entries, repository = Rounds(), 0, loaded(size, shared=True)
    for _ in range(rounds):
        with found.one():
            repository.register_endpoint(1, size.cluster.number(0))
            entries = len(repository.resolve(1).map_state)
        repository.unregister_endpoint(1)
    return Measured(found, f"{entries:,} entries")


def simulate(size: Size, flows: int, rounds: int) -> Measured:
    """Decide flows, of which most meet a policy; the figures are those of all flows of a round together."""
    cluster = size.cluster
    simulation = Simulation([*cluster.pods(), *cluster.rules(size.rules)])
    wanted = [parse_flow(flow) for flow in cluster.flows(flows, size.rules)]
    verdicts = [simulation.verdict(flow).verdict for flow in wanted]
    found = Rounds()
    for _ in range(rounds):
        with found.one():
            for flow in wanted:
                simulation.verdict(flow)
    return Measured(found, f"{verdicts.count('allow') * 100 // flows}% allowed")


def memory_of(size: Size) -> tuple[int, int]:
    """Resident memory of a process of its own that holds all of it: at the end and at its peak, in bytes."""
    command = [sys.executable, __file__, "--hold", *map(str, size)]
    rss, peak = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return rss, peak


async def hold(size: Size) -> None:
    """Take everything in as the agent does, then tell this process's memory."""
    with unpinned_maps() if os.geteuid() == 0 else contextlib.nullcontext() as maps:
        async with running(size.cluster, maps) as node:
            objects = size.cluster.rules(size.rules)
            for start in range(0, len(objects), 1000):
                # texts of their own, as documents have them that came over the socket
                body = msgspec.json.encode(documents(objects[start : start + 1000]))
                objects[start : start + 1000] = [{}] * len(objects[start : start + 1000])
                await node.import_rules(msgspec.json.decode(body, type=list[Document]))
            del objects
            print(json.dumps(memory()))


# the figures


class Plan(NamedTuple):
    """``shrink`` divides every size; targets hold for the full sizes alone."""

    maps: Maps
    rounds: int
    shrink: int

    def size(self, rules: int, identities: int, endpoints: int) -> Size:
        """A size, shrunk; endpoints less so, for there are few of them."""
        return Size(rules // self.shrink, identities // self.shrink, max(endpoints // self.shrink, 2))

    def time(self, what: str, found: Measured, target: float) -> Figure:
        """A figure in seconds."""
        rounds = found.rounds
        beside = [f"worst {seconds(rounds.worst)}", f"CPU {seconds(rounds.median_cpu)}", found.work]
        ratio = rounds.median / target
        return self._figure(what, seconds(rounds.median), f"< {seconds(target)}", ratio, beside)

    def rate(self, what: str, found: Measured, count: int, target: float) -> Figure:
        """A figure in things a second."""
        rate = count / found.rounds.median
        beside = [f"worst {count / found.rounds.worst:,.0f}/s", found.work]
        return self._figure(what, f"{rate:,.0f}/s", f"> {target:,.0f}/s", target / rate, beside)

    def memory(self, what: str, size: Size, target: int) -> Figure:
        """A figure in MB (2 to the power of 20 bytes)."""
        rss, peak = memory_of(size)
        beside = [f"peak {peak / MB:.0f} MB"]
        return self._figure(what, f"{rss / MB:.0f} MB", f"< {target / MB:.0f} MB", rss / target, beside)

    def _figure(self, what: str, figure: str, target: str, ratio: float, beside: list[str]) -> Figure:
        text = ", ".join(item for item in beside if item)
        return Figure(what, figure, target, ratio, text) if self.shrink == 1 else Figure(what, figure, "", 0, text)


async def figures(plan: Plan) -> AsyncIterator[Figure]:
    """Every figure that has a target."""
    size, maps, rounds = plan.size, plan.maps, plan.rounds
    spread = await import_all(size(5_000, 1_000, 10), maps, rounds)
    yield plan.time("import 5,000 rules over 10 endpoints, 1,000 identities", spread, 0.5)
    wide = await import_all(size(5_000, 1_000, 100), maps, rounds)
    yield plan.time("import 5,000 rules over 100 endpoints, 1,000 identities", wide, 1.0)
    shared = await import_all(size(1_000, 1_000, 10), maps, rounds, shared=True)
    yield plan.time("import 1,000 rules that all select 10 endpoints", shared, 0.5)
    stored = await import_all(size(5_000, 1_000, 10), maps, rounds, stored=True)
    yield plan.time("the first, with the agent's policy file written", stored, 0.5)
    one = await import_one(size(1_000, 1_000, 100), maps, 5 * rounds)
    yield plan.time("import one rule that selects 1 of 100 endpoints", one, 0.03)
    yield plan.time("an identity arrives, 10,000 rules", await arrive(size(10_000, 1_000, 10), maps, 5 * rounds), 0.005)
    cold = resolve_cold(size(10_000, 10_000, 1), rounds)
    yield plan.time("cold resolution, 10,000 rules and identities", cold, 1.0)
    flows = 20_000 // plan.shrink
    rate = simulate(size(1_000, 1_000, 10), flows, rounds)
    yield plan.rate("flows that simulate decides", rate, flows, 20_000)
    held = size(10_000, 100_000, 100)
    yield plan.memory("memory of 100,000 identities and 10,000 rules", held, 400 * MB)


async def growth(maps: Maps, shrink: int) -> list[Panel]:
    """How the first figures grow with each dimension, the others held."""
    base, names = Size(1_000 // shrink, 1_000 // shrink, 10), ("import of all rules", "one rule", "one identity")
    steps = {
        "rules": [base._replace(rules=base.rules * factor) for factor in (1, 2, 5, 10)],
        "identities": [base._replace(identities=base.identities * factor) for factor in (1, 2, 5, 10)],
        "endpoints": [base._replace(endpoints=count) for count in (10, 20, 50, 100)],
    }
    panels = []
    for dimension, sizes in steps.items():
        series: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for size in sizes:
            across = float(getattr(size, dimension))
            found = (await import_all(size, maps, 1), await import_one(size, maps, 5), await arrive(size, maps, 5))
            for name, measured in zip(names, found, strict=True):
                series[name].append((across, measured.rounds.median))
        panels.append(Panel(f"time by {dimension}", dimension, "s", dict(series)))
    return panels


async def measure(quick: bool) -> None:
    """Print the table and write the plot."""
    shrink = 10 if quick else 1
    root = os.geteuid() == 0
    if not root:
        print("not root: without the kernel's maps")
    with pinned_maps() if root else contextlib.nullcontext() as maps:
        plan = Plan(maps, 3, shrink)
        print(table([figure async for figure in figures(plan)]))
        write_svg(OUT, "Policy, from import to the kernel's map", [await growth(maps, shrink)])
    print(f"growth: {OUT}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of every size")
    parser.add_argument("--hold", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        asyncio.run(hold(Size(*arguments.hold)))
    else:
        asyncio.run(measure(arguments.quick))


if __name__ == "__main__":
    main()
