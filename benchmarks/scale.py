"""One agent in a large cluster: a real agent and operator, a real etcd, and as many nodes and pods as wished.

Usage: python benchmarks/scale.py [--nodes 5000] [--pods 100000] [--services 20000]    (root, etcd; 10 minutes)

The agent runs in a lab of one node, whose etcd holds the simulated rest of the cluster. Figures stand beside the
targets; `out/scale.svg` shows how much each node asks of the store while nothing happens, over the size of the cluster.
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
from typing import Any, NamedTuple

from report import Figure, Panel, seconds, table, write_svg
from storeload import by_formula, per_node_and_minute

from ciliate.datapath.bpf import Map
from ciliate.lab import etcd, netns, underlay
from ciliate.lab.lab import Lab
from ciliate.lab.placement import Shape

HERE = Path(__file__).parent
PATIENCE = 120.0
POLL = 0.05
CHURN, CHURN_SECONDS = 100.0, 20.0
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
    """What is simulated, and how many seconds it is watched while pods come and go."""

    nodes: int
    pods: int
    services: int
    length: float = CHURN_SECONDS


class Scale:
    """The measurements, one after the other; each leaves what the next begins with."""

    def __init__(self, lab: Lab, store: Store, size: Size) -> None:
        self._lab, self._store = lab, store
        self._nodes, self._pods, self._services, self._length = size
        self._map = lab.directory.bpf_dir / "ciliate" / "default" / "ciliate_ipcache"
        self.figures: list[Figure] = []

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
        own = self.entries()
        base = self.agent().memory()
        self._store("nodes", count=self._nodes)
        self.live(own)
        self.delete_all(own)
        self.cold_start(own, base)
        self.load_services()
        self.churn()
        self.at_rest()

    def live(self, own: int) -> None:
        """Pods are written while the agent follows."""
        before = self.agent().cpu()
        written = self._store("pods", count=self._pods, nodes=self._nodes, rate=LIVE_RATE)
        lag = max(self._until(own + self._pods) - written["ended"], 0.0)
        cost = (self.agent().cpu() - before) / self._pods
        rate = f"written at {self._pods / written['took']:,.0f}/s"
        self.add("live: lag behind the last write", lag, 1.0, seconds(lag), "< 1 s", rate)
        self.add("live: processor time of an entry", cost, 40e-6, seconds(cost), "< 40 µs")

    def _until(self, count: int) -> float:
        """The time at which the map has that many entries."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.entries()) != count:
            if time.monotonic() > deadline:
                raise SystemExit(f"after {PATIENCE:g} s the map has {found} entries, expected {count}")
            time.sleep(POLL)
        return time.monotonic()

    def delete_all(self, own: int) -> None:
        """All pods go at once."""
        began = time.monotonic()
        self._store("delete_pods")
        took = self._until(own) - began
        self.add(f"deleting all {self._pods:,}", took, 5.0, seconds(took), "< 5 s")

    def cold_start(self, own: int, base: float) -> None:
        """The agent starts in a cluster that is there already."""
        self._lab.stop_agent()
        self._store("pods", count=self._pods, nodes=self._nodes)
        began = time.monotonic()
        self._lab.begin_agent()
        took = self._until(own + self._pods) - began
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
        """Pods come and go."""
        agent, operator = self.agent(), self._operator()
        try:
            before, began = agent.cpu(), time.monotonic()
            answer = self._store(
                "churn", rate=CHURN, seconds=self._length, pods=self._pods, nodes=self._nodes, map=str(self._map)
            )
            share = (agent.cpu() - before) / (time.monotonic() - began)
            done = answer["replaced"] / answer["seconds"]
            self.add("churn: share of one core", share, 0.05, f"{share:.1%}", "< 5 %", f"{done:.0f} pods/s replaced")
            self.add("churn: new pod in the map, p50", answer["p50"], 0.02, seconds(answer["p50"]), "< 20 ms")
            self.add("churn: new pod in the map, p99", answer["p99"], 0.2, seconds(answer["p99"]), "< 200 ms")
            size = Process(operator.pid).memory()
            self.figures.append(Figure("operator's resident memory", f"{size / 2**20:.0f} MB", "", 0))
        finally:
            operator.terminate()
            operator.wait(30)

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


def main(size: Size) -> list[Figure]:
    """Measure all; returns the figures."""
    if size.pods > 250 * size.nodes:
        raise SystemExit(f"--pods: {size.pods} given, expected at most 250 for each of {size.nodes} nodes")
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
    panel = Panel("Store operations per node and minute at rest", "nodes", "", series)
    write_svg(HERE / "out" / "scale.svg", "Load on the store", [[panel]])
    found = [*scale.figures, *figures]
    took = time.monotonic() - began
    found.append(Figure("all of this took", seconds(took), "< 600 s", took / 600))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--pods", type=int, default=100_000)
    parser.add_argument("--services", type=int, default=20_000)
    given = parser.parse_args()
    print(table(main(Size(given.nodes, given.pods, given.services))))
