"""How long policy takes, from import to the kernel's policy map, and how that grows. Run: python benchmarks/policy.py

The kernel part needs root: it writes to maps of its own, pinned in a BPF file system of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
from clusters import GROUP, Cluster, documents
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
NOTE = """Medians of wall time, CPU of all threads; a ratio of 1 or less meets the target. 1,000 identities unless said,
a tenth of every size with --quick. Import is from manifests in memory to the kernel's policy map and ipcache, with the
file of prefix identities; memory is that of a process of its own, with the kernel's maps and 100 endpoints."""


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
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    rss, peak = json.loads(result.stdout)
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
    """``shrink`` divides every size, and targets hold for full sizes alone; ``points`` is how many a curve has."""

    maps: Maps
    rounds: int
    shrink: int
    points: int

    def size(self, rules: int, identities: int, endpoints: int) -> Size:
        """A size, shrunk."""
        return Size(rules // self.shrink, identities // self.shrink, max(endpoints // self.shrink, min(endpoints, 2)))

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
    """Every figure that has a target, as it is measured."""
    maps, rounds = plan.maps, plan.rounds
    ten, hundred = plan.size(5_000, 1_000, 10), plan.size(5_000, 1_000, 100)
    what = f"import {ten.rules:,} rules over {ten.endpoints} endpoints"
    yield plan.time(what, await import_all(ten, maps, rounds), 0.5)
    yield plan.time("  with the agent's policy file", await import_all(ten, maps, rounds, stored=True), 0.5)
    what = f"import {hundred.rules:,} rules over {hundred.endpoints} endpoints"
    yield plan.time(what, await import_all(hundred, maps, rounds), 1)
    every = plan.size(1_000, 1_000, 10)
    what = f"import {every.rules:,} rules that select {every.endpoints} endpoints each"
    yield plan.time(what, await import_all(every, maps, rounds, shared=True), 0.5)
    what = f"import 1 rule that selects 1 of {hundred.endpoints} endpoints"
    yield plan.time(what, await import_one(hundred, maps, 4 * rounds), 0.03)
    yield plan.time("  with the agent's policy file", await import_one(hundred, maps, rounds, stored=True), 0.03)
    async for figure in _arrivals(plan):
        yield figure
    cold = plan.size(10_000, 10_000, 1)
    what = f"resolve 1 endpoint cold, {cold.rules:,} rules select it, {cold.identities:,} identities"
    yield plan.time(what, resolve_cold(cold, rounds), 1)
    held = plan.size(10_000, 100_000, 100)
    what = f"resident memory, {held.rules:,} rules, {held.identities:,} identities"
    yield plan.memory(what, held, 400 * MB)
    flows = 20_000 // plan.shrink
    what = f"simulated flows, {hundred.rules:,} rules, {hundred.identities:,} pods"
    yield plan.rate(what, simulate(hundred, flows, rounds), flows, 20_000)


async def _arrivals(plan: Plan) -> AsyncIterator[Figure]:
    """One identity comes: until every endpoint's delta is known, and until the kernel has it."""
    few, many = plan.size(10_000, 1_000, 10), plan.size(10_000, 1_000, 100)
    what = f"1 identity arrives, {many.rules:,} rules over {many.endpoints} endpoints: deltas"
    yield plan.time(what, arrive_in_memory(many, 4 * plan.rounds), 0.005)
    for size in (few, many):
        what = f"  and in the kernel, {size.endpoints} endpoints"
        yield plan.time(what, await arrive(size, plan.maps, 4 * plan.rounds), 0.005)


# growth

AXES: dict[str, tuple[int, ...]] = {
    "rules": (500, 1_000, 2_000, 5_000, 10_000),
    "identities": (300, 1_000, 3_000, 10_000, 30_000),
    "endpoints": (1, 3, 10, 30, 100, 300),
}
BASE = Size(rules=5_000, identities=1_000, endpoints=10)


async def growth(plan: Plan) -> tuple[list[Panel], list[Panel]]:
    """How times and memory grow along each axis, the other two as in BASE."""
    times, memories = [], []
    base = plan.size(*BASE)
    for axis, values in AXES.items():
        found: dict[str, list[tuple[float, float]]] = {}
        memory_series = []
        for value in values[: plan.points]:
            size = base._replace(**{axis: value})
            for name, cost in (await _costs(plan, size, axis)).items():
                found.setdefault(name, []).append((value, cost))
            memory_series.append((value, memory_of(size)[0] / MB))
        fixed = ", ".join(f"{count:,} {name}" for name, count in base._asdict().items() if name != axis)
        times.append(Panel(f"time, {fixed}", axis, "s", dict(found)))
        memories.append(Panel(f"resident memory, {fixed}", axis, "MB", {"resident memory": memory_series}))
    return times, memories


async def _costs(plan: Plan, size: Size, axis: str) -> dict[str, float]:
    """Seconds of each operation at one size."""
    maps, flows = plan.maps, 2_000
    found = {
        "import of every rule": (await import_all(size, maps, 3)).rounds.median,
        "one rule more": (await import_one(size, maps, 5)).rounds.median,
        "one identity more": (await arrive(size, maps, 5)).rounds.median,
        "one simulated flow": simulate(size, flows, 3).rounds.median / flows,
    }
    if axis != "endpoints":
        found["one endpoint that every rule selects, resolved cold"] = resolve_cold(size, 3).rounds.median
    return found


# the program


async def run(plan: Plan) -> None:
    """Measure, print the table and write the plot."""
    found = []
    async for figure in figures(plan):
        found.append(figure)
    print(table(found))
    print(f"\n{NOTE}")
    times, memories = await growth(plan)
    write_svg(OUT, f"Policy: how cost grows ({GROUP} identities behind each peer selector)", [times, memories])
    print(f"Growth: {OUT}")


def main() -> None:
    """Parse arguments and run; the kernel part only as root."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a tenth of every size and fewer rounds, without targets")
    parser.add_argument("--hold", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        asyncio.run(hold(Size(*arguments.hold)))
        return
    # what was made is removed on the way out, so a signal has to go that way too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="ciliate-benchmark-") as folder:
        tempfile.tempdir = folder  # also of the processes whose memory is measured, which may be killed
        with pinned_maps() if os.geteuid() == 0 else contextlib.nullcontext() as maps:
            if maps is None:
                print("not root: the kernel part is left out, import ends where the kernel would be written to")
            asyncio.run(run(Plan(maps, 2, 10, 2) if arguments.quick else Plan(maps, 5, 1, 6)))


if __name__ == "__main__":
    main()
