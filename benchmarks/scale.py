"""One agent in a large cluster: a real agent and operator, a real etcd, and as many nodes and pods as wished.

Usage: python benchmarks/scale.py [--nodes 5000] [--pods 100000] [--services 20000]    (root, etcd; 10 minutes)

Real are the agent, the operator, the etcd and the kernel's maps, in a lab of one node without pods. An etcd older than
3.5 waits for its disk at each write: where others write there too, its part of a pod's way to the map grows.
Simulated is everybody else: one process (`clusterload.py`) writes the keys and documents of all other agents; nobody
sends their packets and probes. It keeps to one processor and gives way there; the processor time that it takes itself
stands beside what was measured meanwhile. The agent's is that of its process alone, as the kernel counts it. Services
come by the agent's API, from no reflector.

`out/scale.svg` shows how much each node asks of the store while nothing happens, over the size of the cluster (agents
as coroutines in simulated time, `storeload.py`), and what following 100 pods/s costs over the number of addresses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from ipaddress import IPv4Address
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from clusterload import SPARE, host_key
from report import Figure, Panel, seconds, table, write_svg
from storeload import by_formula, per_node_and_minute

from ciliate.datapath.bpf import Map
from ciliate.lab import etcd, netns, underlay
from ciliate.lab.lab import Lab
from ciliate.lab.placement import Shape

HERE = Path(__file__).parent
PATIENCE = 120.0
POLL = 0.01
SAMPLE = 64
CHURN, CHURN_SECONDS, ROUNDS = 100.0, 15.0, 3
GROWTH = (0.1, 0.5)
"""Shares of the pods with which churn is measured besides."""
FLAT = 1.25
"""How much more following may cost with all pods than with the fewest: it should not depend on them."""
SINGLE = 30_000
LIMIT = 600.0
BACKENDS, SERVICES_AT_ONCE = 3, 2000
LIVE_RATE = 20_000.0
SIZES = (1, 3, 10, 30, 100, 300, 1000, 3000, 5000)
TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """What the kernel says of a process."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}")

    def cpu(self) -> float:
        """Processor time in seconds, of all its threads."""
        fields = (self._path / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self, which: str = "VmRSS") -> float:
        """Resident bytes; VmHWM is the most that there were."""
        line = next(line for line in (self._path / "status").read_text().splitlines() if line.startswith(which))
        return int(line.split()[1]) * 1024


class Store:
    """The simulated rest of the cluster, in a process beside the etcd."""

    def __init__(self, lab: Lab) -> None:
        namespace = netns.inside(lab.directory.namespace(underlay.STORE))
        command = [*namespace, sys.executable, str(HERE / "clusterload.py"), f"http://127.0.0.1:{etcd.PORT}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, op: str, **options: Any) -> dict[str, Any]:
        self.begin(op, **options)
        return self.end()

    def begin(self, op: str, **options: Any) -> None:
        """Start a command; ``end`` waits for its answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"op": op, **options}) + "\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """The answer of the command that was begun."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the simulated cluster ended; its words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)


class Size(NamedTuple):
    """What is simulated, and how many seconds, how often, it is watched while pods come and go."""

    nodes: int
    pods: int
    services: int
    length: float = CHURN_SECONDS
    rounds: int = ROUNDS


class Churned(NamedTuple):
    """What one stretch of pods that come and go cost: share of a core, seconds until new ones are in the map."""

    share: float
    p50: float
    p99: float
    after50: float
    after99: float
    beside: str


class Scale:
    """The measurements, one after the other; each leaves what the next begins with."""

    def __init__(self, lab: Lab, store: Store, size: Size) -> None:
        self._lab, self._store = lab, store
        self._nodes, self._pods, self._services, self._length, self._rounds = size
        self._map = lab.directory.bpf_dir / "ciliate" / "default" / "ciliate_ipcache"
        self._own = self.entries()
        numbers = [*range(0, self._pods, self._pods // SAMPLE + 1), self._pods - 1]
        self._sample = [(number, host_key(number, self._nodes)) for number in numbers]
        self.figures: list[Figure] = []
        self.costs: dict[int, float] = {}
        """Share of a core that churn takes, by the number of addresses."""

    def entries(self) -> int:
        """How many prefixes the kernel's map has."""
        opened = Map.open(self._map)
        try:
            return sum(count for _, _, count in opened.batches())
        finally:
            opened.close()

    def agent(self) -> Process:
        """The agent's process."""
        return Process(self._lab.agent_process().pid)

    def add(self, what: str, value: float, target: float, shown: str, limit: str, beside: str = "") -> None:
        """Note a figure that should not be above its target."""
        self.figures.append(Figure(what, shown, limit, value / target, beside))

    def run(self) -> None:
        """Everything."""
        base = self.agent().memory()
        self._store("nodes", count=self._nodes)
        self.grow()
        self.live()
        self.single()
        self.delete_all()
        self.cold_start(base)
        self.load_services()
        self.churn()
        self.at_rest()

    def grow(self) -> None:
        """Pods come and go in smaller clusters."""
        operator = self._operator()
        try:
            for pods in (int(self._pods * share) for share in GROWTH):
                self._store("pods", count=pods, nodes=self._nodes)
                self._until(pods)
                found = self._churned(pods)
                self.costs[pods] = found.share
                what, beside = (
                    f"churn, {pods:,} addresses: share of one core",
                    f"p50 {seconds(found.p50)}, {found.beside}",
                )
                self.add(what, found.share, 0.05, f"{found.share:.1%}", "< 5 %", beside)
        finally:
            _end(operator)
        self._store("delete_pods")
        self._until(0)

    def live(self) -> None:
        """Pods are written while the agent follows."""
        before = self.agent().cpu()
        written = self._store("pods", count=self._pods, nodes=self._nodes, rate=LIVE_RATE)
        lag = max(self._until(self._pods) - written["ended"], 0.0)
        cost = (self.agent().cpu() - before) / self._pods
        beside = f"written at {self._pods / written['took']:,.0f}/s, 128 in a revision; {_load(written)}"
        self.add("live: lag behind the last write", lag, 1.0, seconds(lag), "< 1 s", beside)
        self.add("live: processor time of an entry", cost, 40e-6, seconds(cost), "< 40 µs")

    def single(self) -> None:
        """Each entry changes in a revision of its own, as fast as the store and this machine do that."""
        count, before = min(SINGLE, self._pods), self.agent().cpu()
        written = self._store("rewrite", count=count, nodes=self._nodes, map=str(self._map))
        cost = (self.agent().cpu() - before) / count
        beside = f"written at {count / written['took']:,.0f}/s; lag {seconds(written['lag'])}; {_load(written)}"
        self.add("live, each a revision of its own", cost, 40e-6, seconds(cost), "< 40 µs", beside)

    def _until(self, pods: int, all_alike: bool = True) -> float:
        """The time at which the map has the addresses of so many pods, and no others.

        Counting a large map takes a third of what is measured here: it begins once all of a sample is there. After
        churn it is not known which are (``all_alike`` False).
        """
        deadline = time.monotonic() + PATIENCE
        while all_alike and not self._sample_stands(pods) and time.monotonic() < deadline:
            time.sleep(POLL)
        reached = time.monotonic()
        while (found := self.entries() - self._own) != pods:
            if time.monotonic() > deadline:
                raise SystemExit(f"after {PATIENCE:g} s the map has the addresses of {found} pods, expected {pods}")
            time.sleep(POLL)
            reached = time.monotonic()
        return reached

    def _sample_stands(self, pods: int) -> bool:
        opened = Map.open(self._map)
        try:
            return all((opened.lookup(key) is not None) == (number < pods) for number, key in self._sample)
        finally:
            opened.close()

    def delete_all(self) -> None:
        """All pods go at once."""
        began = time.monotonic()
        self._store("delete_pods")
        took = self._until(0) - began
        self.add(f"deleting all {self._pods:,}", took, 5.0, seconds(took), "< 5 s")

    def cold_start(self, base: float) -> None:
        """The agent starts in a cluster that is there already."""
        self._lab.stop_agent()
        self._store("pods", count=self._pods, nodes=self._nodes)
        began = time.monotonic()
        self._lab.begin_agent()
        took = self._until(self._pods) - began
        self._lab.client()
        resident = self.agent().memory()
        self.add(f"cold start: {self._pods:,} in the kernel", took, 4.0, seconds(took), "< 4 s")
        beside = f"{base / 2**20:.0f} MB alone, at most {self.agent().memory('VmHWM') / 2**20:.0f} MB"
        limit, shown = 200 * 2**20, f"{resident / 2**20:.0f} MB"
        self.add("resident memory with all of them", resident, limit, shown, "< 200 MB", beside)

    def load_services(self) -> None:
        """Services by way of the agent's API; their backends are pods of the cluster."""
        began = time.monotonic()
        for start in range(0, self._services, SERVICES_AT_ONCE):
            some = range(start, min(start + SERVICES_AT_ONCE, self._services))
            self._lab.request("PUT", "/v1/service", {"services": [service(number) for number in some]})
        took = time.monotonic() - began
        resident = self.agent().memory() / 2**20
        beside = f"{resident:.0f} MB resident then"
        self.figures.append(Figure(f"{self._services:,} services of {BACKENDS} backends", seconds(took), "", 0, beside))

    def churn(self) -> None:
        """Pods come and go; medians of several rounds."""
        operator = self._operator()
        try:
            rounds = [self._churned(self._pods) for _ in range(self._rounds)]
            share, p50, p99, after50, after99 = (median(values) for values in list(zip(*rounds, strict=True))[:5])
            self.costs[self._pods] = share
            what, beside = f"churn, {self._pods:,} addresses", rounds[-1].beside
            self.add(f"{what}: share of one core", share, 0.05, f"{share:.1%}", "< 5 %", beside)
            worst = max(found.p50 for found in rounds), max(found.p99 for found in rounds)
            self.add(
                f"{what}: new pod in the map, p50", p50, 0.02, seconds(p50), "< 20 ms", f"worst {seconds(worst[0])}"
            )
            self.add(
                f"{what}: new pod in the map, p99", p99, 0.2, seconds(p99), "< 200 ms", f"worst {seconds(worst[1])}"
            )
            what = f"{what}: the same, after the store's answer"
            self.add(f"{what}, p50", after50, 0.02, seconds(after50), "< 20 ms")
            self.add(f"{what}, p99", after99, 0.2, seconds(after99), "< 200 ms")
            least = min(self.costs.values())
            times, limit = share / max(least, 0.001), f"< {FLAT:g} x"
            self.add("churn: cost with all over the least", times, FLAT, f"{times:.2f} x", limit)
            size = Process(operator.pid).memory()
            self.figures.append(Figure("operator's resident memory", f"{size / 2**20:.0f} MB", "", 0))
        finally:
            _end(operator)

    def _churned(self, pods: int) -> Churned:
        agent = self.agent()
        before, began = agent.cpu(), time.monotonic()
        options = {"rate": CHURN, "seconds": self._length, "pods": pods, "nodes": self._nodes, "map": str(self._map)}
        answer = self._store("churn", **options)
        share = (agent.cpu() - before) / (time.monotonic() - began)
        self._until(pods, all_alike=False)
        done = answer["replaced"] / answer["seconds"]
        beside = f"{done:.0f} pods/s replaced; the store takes {seconds(answer['acked'])}"
        times = (answer[name] for name in ("p50", "p99", "after50", "after99"))
        return Churned(share, *times, f"{beside}; {_load(answer, answer['seconds'])}")

    def _operator(self) -> subprocess.Popen[bytes]:
        state = self._lab.directory.path / "operator"
        command = [
            *netns.inside(self._lab.directory.namespace("node1")),
            *(sys.executable, "-m", "ciliate.operator.main"),
            f"--state-dir={state}",
            f"--run-dir={state}",
            "--kvstore=etcd",
            f"--kvstore-opt=etcd.address={etcd.ADDRESS}",
        ]
        log = (self._lab.directory.path / "operator.log").open("ab")
        with log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def at_rest(self) -> None:
        """Nothing happens."""
        agent = self.agent()
        before, began = agent.cpu(), time.monotonic()
        time.sleep(self._length / 2)
        share = (agent.cpu() - before) / (time.monotonic() - began)
        self.figures.append(Figure("at rest: share of one core", f"{share:.2%}", "", 0))


def _load(answer: dict[str, Any], took: float = 0.0) -> str:
    """What the simulated cluster itself took of the machine."""
    return f"load {answer['cpu'] / (took or answer['took']):.0%} of a core"


def _end(operator: subprocess.Popen[bytes]) -> None:
    operator.terminate()
    operator.wait(30)


def service(number: int) -> dict[str, Any]:
    """One service and its backends, as `PUT /v1/service` takes them."""
    backends = [IPv4Address("11.0.0.2") + (number * BACKENDS + index) * 64 for index in range(BACKENDS)]
    return {
        "frontend-address": {"ip": str(IPv4Address("10.96.0.0") + number), "port": 80},
        "backend-addresses": [{"ip": str(address), "port": 8080} for address in backends],
    }


def store_load(sizes: tuple[int, ...]) -> tuple[list[Figure], dict[str, list[tuple[float, float]]]]:
    """How much each node asks of the store while nothing happens: simulated agents, and the formula."""
    found = {size: per_node_and_minute(size) for size in sizes}
    one, most = sizes[0], sizes[-1]
    what = f"store operations of a node and minute, {most:,} nodes"
    beside = f"{found[one]:.2f} with {one} node; by the formula {by_formula(one):.2f} and {by_formula(most):.2f}"
    figure = Figure(what, f"{found[most]:.2f}", "< formula + 10 %", found[most] / by_formula(most) / 1.1, beside)
    series = {
        "simulated agents": [(size, found[size]) for size in sizes],
        "by the formula": [(size, by_formula(size)) for size in sizes],
    }
    return [figure], series


def _percent(shares: dict[int, float]) -> list[tuple[float, float]]:
    return [(count, max(share, 0.001) * 100) for count, share in sorted(shares.items())]


def main(size: Size) -> list[Figure]:
    """Measure all; returns the figures."""
    if size.pods + SPARE > 250 * size.nodes:
        most = max(250 * size.nodes - SPARE, 0)
        raise SystemExit(f"--pods: {size.pods} given, expected at most {most} with {size.nodes} nodes")
    began = time.monotonic()
    name = f"scale-{os.getpid()}"
    with ExitStack() as stack:
        stack.callback(Lab.take_down, name, True)
        # the probes of thousands of nodes that are not there are no part of this
        lab = Lab.create(
            name, options={"enable-health-checking": "false"}, shape=Shape(nodes=1, tunnel="vxlan", kvstore="etcd")
        )
        store = Store(lab)
        stack.callback(store.close)
        scale = Scale(lab, store, size)
        scale.run()
    sizes = tuple(nodes for nodes in SIZES if nodes <= size.nodes)
    figures, series = store_load(sizes)
    panels = [
        Panel("Store operations per node and minute at rest", "nodes", "", series),
        Panel("Following 100 pods/s, % of a core", "addresses", "", {"agent": _percent(scale.costs)}),
    ]
    write_svg(HERE / "out" / "scale.svg", "Cost of a large cluster", [panels])
    found = [*scale.figures, *figures]
    took = time.monotonic() - began
    found.append(Figure("all of this took", seconds(took), f"< {LIMIT:g} s", took / LIMIT))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--pods", type=int, default=100_000)
    parser.add_argument("--services", type=int, default=20_000)
    given = parser.parse_args()
    print(table(main(Size(given.nodes, given.pods, given.services))))
