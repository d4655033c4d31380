"""kill -9 of the agent at random moments, under traffic: what is lost, let through, leaked or forgotten.

In a lab: pods that talk (a TCP stream, a UDP flow and new flows of both, over both families), a pod whose flows are
denied, and pods that come and go by real CNI calls. Each round does something (an ADD, a DEL, a policy import, a
start), kills the agent in the middle of it, starts it again and compares what the agent, its disk and the kernel know.
Every count should be zero; the exit code is 1 where one is not.

With ``--mode`` the flows go from a second node to the first one, in that routing mode (``disabled``: by routes). An
etcd joins them, and half of the rounds kill both agents. They may be away for longer than their leases.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from report import Figure, seconds, table

from ciliate.api_client import AgentUnavailable, ApiClient
from ciliate.datapath.bpf import Map
from ciliate.datapath.node import read_metrics
from ciliate.datapath.reasons import DIRECTIONS, reason_text
from ciliate.lab import audit, netns
from ciliate.lab.changes import populate
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.placement import ONE_NODE, Shape
from ciliate.lab.runtime import Runtime
from ciliate.lab.state import NODE
from ciliate.lab.traffic import Traffic
from ciliate.manifest import loads

PORT = 80
MOST_PODS = 8
START_TIME = 0.5
"""Seconds within which the agent is killed while it starts."""
MODES = ("disabled", "vxlan", "geneve")
LEASE = 2.0
"""Seconds: an agent that is away for longer is gone from the store, and must not be missed for it."""


def pods(other: str) -> str:
    """The server on the first node, those who talk to it on ``other``."""
    places = {"server": NODE, "friend": other, "stranger": other}
    return "".join(
        f"""
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: c}}]}}"""
        for name, node in places.items()
    )


POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: server, namespace: default}}
spec:
  endpointSelector: {{matchLabels: {{app: server}}}}
  ingress:
  - fromEndpoints: [{{matchLabels: {{app: friend}}}}]
    toPorts: [{{ports: [{{port: "{PORT}", protocol: TCP}}, {{port: "{PORT}", protocol: UDP}}]}}]
"""
OTHER_POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: other, namespace: default}}
spec:
  endpointSelector: {{matchLabels: {{app: server}}}}
  ingress:
  - fromCIDR: [203.0.113.{number}/32, "2001:db8:{number}::/48"]
  - fromEndpoints: [{{matchLabels: {{app: nobody{number}}}}}]
    toPorts: [{{ports: [{{port: "{port}", protocol: TCP}}]}}]
"""


class Pods:
    """Pods that come and go, and what became of each call."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._runtime = Runtime(lab.directory)
        self.alive: dict[str, tuple[str, str, set[str]]] = {}
        self.calls: Counter[str] = Counter()

    def plan(self) -> tuple[str, str, str]:
        """Container id, namespace and name of a new pod; its namespace is the lab's to remove."""
        container = uuid.uuid4().hex
        namespace = self._lab.directory.namespace(f"churn-{container[:8]}")
        self._lab.state.namespaces.append(namespace)
        self._lab.save()
        netns.create(namespace)
        return container, namespace, f"default/churn-{container[:8]}"

    def add(self, container: str, namespace: str, name: str) -> None:
        """ADD; a failed one is followed by DEL, as runtimes do."""
        try:
            result = self._runtime.add(container, namespace, name)
        except LabError:
            self.calls["ADD refused"] += 1
            self._remove(container, namespace, name)
            return
        self.calls["ADD"] += 1
        self.alive[container] = (namespace, name, {item["address"].partition("/")[0] for item in result["ips"]})

    def delete(self, container: str) -> None:
        """DEL, which succeeds whether or not there is an agent."""
        namespace, name, _ = self.alive.pop(container)
        self._remove(container, namespace, name)

    def _remove(self, container: str, namespace: str, name: str) -> None:
        self._runtime.delete(container, namespace, name)
        self.calls["DEL"] += 1
        netns.remove(namespace)


class Crash:
    """The lab with its traffic, and the counts."""

    def __init__(self, lab: Lab, chance: random.Random) -> None:
        self._lab = lab
        self._chance = chance
        self._pool = ThreadPoolExecutor(8, "crash")
        self.pods = Pods(lab)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._told: set[str] = set()
        self.restarts: list[float] = []
        self.drops: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()

    def run(self, rounds: int, tell: Callable[[str], None]) -> None:
        """All rounds, then the counts of the traffic."""
        populate(self._lab, loads(pods(self._lab.nodes[-1]) + "\n---" + POLICY, "crash"))
        found = self._lab.state.pods
        places = [netns.path(found[f"default/{name}"].netns) for name in ("server", "friend", "stranger")]
        before = self._drops()
        traffic = Traffic(places[0], places[1], places[2], found["default/server"].addresses, PORT)
        try:
            for number in range(rounds):
                self._round(number)
                tell(f"\rround {number + 1} of {rounds}, {len(self.problems)} problems")
        finally:
            lost, through = traffic.stop()
            tell("\n")
            self._pool.shutdown()
        self.drops = self._drops() - before
        self._count("allowed packets lost", [f"{name}: {count}" for name, count in lost.items()], sum(lost.values()))
        self._count(
            "denied packets through", [f"{name}: {count}" for name, count in through.items()], sum(through.values())
        )
        self.packets = sum(flow.records for flow in traffic.allowed), sum(flow.records for flow in traffic.denied)

    def _drops(self) -> Counter[str]:
        """Packets that the nodes' programs dropped so far, by node, reason and direction."""
        found: Counter[str] = Counter()
        for node in self._lab.nodes:
            table = Map.open(self._lab.directory.node(node).bpf_dir / "ciliate" / "default" / "ciliate_metrics")
            for (reason, direction), (packets, _) in read_metrics(table).items():
                if reason:
                    found[f"{node}: {reason_text(reason)} ({DIRECTIONS[direction]})"] = packets
            table.close()
        return found

    def _count(self, what: str, lines: Sequence[str], count: int) -> None:
        self.counts[what] += count
        if count:
            self.problems += [f"{what}: {line}" for line in lines]

    def _round(self, number: int) -> None:
        before = audit.endpoints(self._lab)
        self._drop_some()
        kind = self._chance.choice(("idle", "add", "add", "delete", "burst", "import", "import", "start", "start"))
        running = self._begin(kind, number)
        time.sleep(self._chance.uniform(0.0, 0.15))
        others = [node for node in self._lab.nodes[1:] if self._chance.random() < 0.5]
        self._lab.stop_agent(signal.SIGKILL)
        for node in others:
            self._lab.stop_agent(signal.SIGKILL, node)
            self.kills[f"with {node}"] += 1
        self.kills[kind] += 1
        if kind == "start":
            self._lab._start_agent(NODE)
            time.sleep(self._chance.uniform(0.0, START_TIME))
            self._lab.stop_agent(signal.SIGKILL)
        self._restart(others)
        for item in running:
            item.result()
        self._compare(number, kind, before)

    def _restart(self, others: Sequence[str]) -> None:
        begin = time.monotonic()
        for node in (*others, NODE):
            self._lab.begin_agent(node)
        self._lab.client()
        self.restarts.append(time.monotonic() - begin)
        for node in others:
            self._lab.client(node)

    def _drop_some(self) -> None:
        while len(self.pods.alive) > MOST_PODS:
            self.pods.delete(self._chance.choice(sorted(self.pods.alive)))

    def _begin(self, kind: str, number: int) -> list[Future[None]]:
        """Set going what the kill is to interrupt."""
        if kind in ("add", "burst"):
            plans = [self.pods.plan() for _ in range(1 if kind == "add" else 5)]
            return [self._pool.submit(self.pods.add, *plan) for plan in plans]
        if kind == "delete" and self.pods.alive:
            chosen = self._chance.sample(sorted(self.pods.alive), min(2, len(self.pods.alive)))
            return [self._pool.submit(self.pods.delete, container) for container in chosen]
        if kind == "import":
            return [self._pool.submit(self._import, ApiClient(self._lab.directory.api_socket), number)]
        return []

    def _import(self, client: ApiClient, number: int) -> None:
        text = OTHER_POLICY.format(number=number % 200 + 1, port=1000 + number)
        documents = [{"object": item.object} for item in loads(text, "crash")]
        try:
            client.request("PUT", "/v1/policy", {"documents": documents})
        except AgentUnavailable:
            return  # it was killed before it could answer: either policy is right

    def _compare(self, number: int, kind: str, before: dict[str, audit.Endpoint]) -> None:
        where = f"round {number + 1} ({kind})"
        known = audit.endpoints(self._lab)
        for container, (_, name, addresses) in self.pods.alive.items():
            endpoint = known.get(container)
            if endpoint is None or set(endpoint.addresses) != addresses:
                self._problem("endpoints lost", f"{where}: {name}: {endpoint}, expected {sorted(addresses)}")
        for container, endpoint in before.items():
            if container in known and known[container] != endpoint:
                self._problem("endpoints changed", f"{where}: {endpoint} became {known[container]}")
        found = audit.leftovers(self._lab)
        for text in sorted(set(found) - self._told):  # what stays is counted once
            what = "addresses leaked" if text.startswith("address ") else "stale or missing objects"
            self._problem(what, f"{where}: {text}")
        self._told = set(found)

    def _problem(self, what: str, text: str) -> None:
        self.counts[what] += 1
        self.problems.append(f"{what}: {text}")

    def figures(self) -> list[Figure]:
        """The counts, and how fast the agent was back."""
        zero = (
            "allowed packets lost",
            "denied packets through",
            "addresses leaked",
            "endpoints lost",
            "endpoints changed",
            "stale or missing objects",
        )
        beside = {zero[0]: f"of {self.packets[0]} records and flows", zero[1]: f"of {self.packets[1]} datagrams"}
        beside[zero[3]] = ", ".join(f"{count} {name}" for name, count in sorted(self.pods.calls.items()))
        rows = [Figure(what, str(self.counts[what]), "0", 0, beside.get(what, "")) for what in zero]
        middle, worst = median(self.restarts), max(self.restarts)
        kills = ", ".join(f"{count} during {kind}" for kind, count in sorted(self.kills.items()))
        return [
            *rows,
            Figure("restart to ready", seconds(middle), "< 1.5 s", middle / 1.5, f"worst {seconds(worst)}; {kills}"),
        ]


def measure(rounds: int, seed: int, tell: Callable[[str], None], mode: str = "") -> Crash:
    """Run all rounds in a lab of their own; ``mode``: between two nodes in this routing mode."""
    root = Path(f"/run/ciliate-crash-{os.getpid()}")
    shape = Shape(nodes=2, kvstore="etcd", tunnel=mode) if mode else ONE_NODE
    # the node's own endpoint for probes is made anew by each agent, which is no leftover
    options = {"kvstore-lease-ttl": f"{LEASE}s", "enable-health-checking": "false"} if mode else None
    lab = Lab.create(f"crash-{uuid.uuid4().hex[:8]}", root, options=options, shape=shape)
    try:
        crash = Crash(lab, random.Random(seed))
        crash.run(rounds, tell)
        return crash
    finally:
        for problem in lab.destroy():
            print(f"left behind: {problem}", file=sys.stderr)
        root.rmdir()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where any count is not zero."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="how often the agent is killed (default 50)")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments (default: another each time)")
    parser.add_argument("--mode", choices=MODES, default="", help="between two nodes, in this routing mode")
    options: Any = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    quiet = not sys.stderr.isatty()
    tell = (lambda text: None) if quiet else lambda text: print(text, end="", file=sys.stderr)
    crash = measure(options.rounds, seed, tell, options.mode)
    where = f"between two nodes, tunnel {options.mode}" if options.mode else "one node"
    print(f"kill -9, {where}, {options.rounds} rounds, seed {seed}\n")
    print(table(crash.figures()))
    for problem in crash.problems[:40]:
        print(f"  {problem}")
    if crash.problems:
        print("dropped: " + "; ".join(f"{name}: {count}" for name, count in crash.drops.items()))
    return 1 if any(crash.counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
