"""One pod, client or tenant against all others, at full rate: who lost what, and whether the agent says who it was.

In a lab of two nodes, pods, a node and the world talk to each other by connections that last and by new ones.
Meanwhile one hostile party does one thing as fast as it can. Each attack has a row for each group of bystanders.
The exit code is 1 where somebody lost an established connection, or more than 1 % of the new ones failed. It is also 1
where the API answered late, the agent grew, or `status` or a metric does not name the offender.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report import Figure, seconds, table

from ciliate.api_client import AgentUnavailable, ApiClient, ApiError
from ciliate.datapath.compiler import find_clang
from ciliate.lab import netns
from ciliate.lab.changes import populate
from ciliate.lab.command import run
from ciliate.lab.helper import interpreter
from ciliate.lab.lab import Lab
from ciliate.lab.placement import Shape
from ciliate.lab.state import WORLD
from ciliate.lab.underlay import addresses
from ciliate.lab.world import WORLD_ADDRESSES
from ciliate.manifest import loads

HERE = Path(__file__).parent
PORT, NODE_PORT = 8080, 30080
NEW_LOST, API_LIMIT, GROWTH_LIMIT = 0.01, 0.25, 100.0
API_PACE = 0.02
"""Seconds between two requests to the API."""
SMALL = {"bpf-ct-global-tcp-max": "32768", "bpf-ct-global-any-max": "32768", "bpf-lb-flows-max": "32768"}
"""Tables that a quick run fills as a long one fills those of the usual size."""
LEAST = 70_000
"""Packets of a flood, also on a slow machine: more than there are ports."""
OFFENDER = "attacker"
EVIL = "198.18.255.66"
"""The address of the hostile client in the world."""
PLACES = {"attacker": "node1", "mule": "node1", "client": "node1", "server": "node1", "far": "node2"}
POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: c}}]}}"""
SERVICE = f"""
apiVersion: v1
kind: Service
metadata: {{name: far, namespace: good}}
spec:
  type: NodePort
  selector: {{app: far}}
  ports: [{{port: {PORT}, targetPort: {PORT}, nodePort: {NODE_PORT}}}]"""


def namespace_of(pod: str) -> str:
    """The tenant of a pod."""
    return "evil" if pod in ("attacker", "mule") else "good"


def manifests() -> str:
    """Everybody's objects."""
    pods = [POD.format(name=name, namespace=namespace_of(name), node=node) for name, node in PLACES.items()]
    return "\n---".join([*pods, SERVICE])


class Group(NamedTuple):
    """Bystanders: who talks to whom, of the lab's places."""

    name: str
    place: str
    address: str
    port: int


class Outcome(NamedTuple):
    """What one group lost."""

    group: str
    established: int
    broken: int
    opened: int
    failed: int
    why: dict[str, int]


class Talk:
    """All groups while one attack goes on."""

    def __init__(self, lab: Lab, groups: Sequence[Group], lasting: int) -> None:
        self._running = [
            (group, _program(lab, group.place, "talk", lasting, group.address, group.port)) for group in groups
        ]
        for group, process in self._running:
            _ready(process, group.name)

    def end(self) -> list[Outcome]:
        """What became of them."""
        for _, process in self._running:
            assert process.stdin is not None
            process.stdin.close()
        return [self._outcome(group, process) for group, process in self._running]

    def _outcome(self, group: Group, process: subprocess.Popen[str]) -> Outcome:
        assert process.stdout is not None
        text = process.stdout.read()
        if process.wait():
            raise RuntimeError(f"{group.name}: the bystanders ended with {process.returncode}")
        found = json.loads(text)
        counts = [found[name] for name in ("established", "broken", "opened", "failed")]
        return Outcome(group.name, *counts, found["why"])


def _program(lab: Lab, place: str, *words: Any) -> subprocess.Popen[str]:
    command = [*netns.inside(lab.namespace_of(place)), interpreter(), "-IS", str(HERE / "bystanders.py")]
    return subprocess.Popen([*command, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ready(process: subprocess.Popen[str], name: str) -> None:
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise RuntimeError(f"{name}: the bystanders did not start")


class Watch:
    """The agent while one attack goes on: how fast its API answers, how much it grows."""

    def __init__(self, lab: Lab) -> None:
        self._pid = lab.agent_process("node1").pid
        self._socket = lab.directory.node("node1").api_socket
        self._ending = threading.Event()
        self.before = self.most = _resident(self._pid)
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client = ApiClient(self._socket)
        while not self._ending.wait(API_PACE):
            begin = time.monotonic()
            try:
                client.request("GET", "/v1/healthz")
            except (ApiError, AgentUnavailable):
                self.times.append(60.0)
                continue
            self.times.append(time.monotonic() - begin)
            self.most = max(self.most, _resident(self._pid))

    def end(self) -> None:
        """Stop."""
        self._ending.set()
        self._thread.join()

    @property
    def p99(self) -> float:
        """Seconds within which 99 of 100 requests were answered."""
        return sorted(self.times)[len(self.times) * 99 // 100]

    @property
    def growth(self) -> float:
        """MB."""
        return (self.most - self.before) / 1e6


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Attack(NamedTuple):
    """What the offender does for some seconds. ``names``: what it may be called, ``by`` whom it has to be named."""

    name: str
    run: Callable[[float], str]
    names: Sequence[str]
    by: Sequence[str] = ("status", "metrics")


class Abuse:
    """The lab, its bystanders and its attacks."""

    def __init__(self, lab: Lab, flood: Path, duration: float, lasting: int) -> None:
        self._lab, self._flood, self._duration, self._lasting = lab, flood, duration, lasting
        populate(lab, loads(manifests(), "abuse"))
        lab.add_world_addresses([EVIL])
        pods = lab.state.pods
        self._address = {name: pods[f"{namespace_of(name)}/{name}"].addresses[0] for name in PLACES}
        self._number = {
            item["status"]["external-identifiers"]["pod-name"].rpartition("/")[2]: item["id"]
            for item in lab.request("GET", "/v1/endpoint", node="node1")
        }
        self._servers = [
            _program(lab, place, "serve", PORT) for place in ("good/server", "good/far", "evil/mule", WORLD)
        ]
        for server in self._servers:
            _ready(server, "server")
        # whoever attacks does not tidy up: its kernel must not reset what others answer
        for place in (f"evil/{OFFENDER}", WORLD):
            match = ["--source", EVIL] if place == WORLD else []
            rule = [*match, "-p", "tcp", "--tcp-flags", "RST", "RST", "-j", "DROP"]
            run(*netns.inside(lab.namespace_of(place)), "iptables", "-I", "OUTPUT", *rule)
        world = WORLD_ADDRESSES[0]
        self._groups = [
            Group("pod to pod", "good/client", self._address["server"], PORT),
            Group("pod to world", "good/client", world, PORT),
            Group("node to world", "node1", world, PORT),
            Group("world to node port", WORLD, addresses("node1")[0], NODE_PORT),
        ]

    def close(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.kill()
            server.communicate()

    def attacks(self) -> list[Attack]:
        """Everything that is tried."""
        world, mule, node = WORLD_ADDRESSES[0], self._address["mule"], addresses("node1")[0]
        pod = [f"evil/{OFFENDER}", f'endpoint="{self._number[OFFENDER]}"', f"endpoint {self._number[OFFENDER]}"]
        tenant = ["namespace evil", "evil/greedy", '"namespace": "evil"']
        floods = [
            Attack(f"{where}: {kind}", self._flooding(kind, OFFENDER, target, ports), pod)
            for where, target, ports in (("conntrack", mule, "60000"), ("SNAT", world, f"={PORT}"))
            for kind in ("udp", "syn", "ack")
        ]
        return [
            Attack("nothing", self._idle, []),
            *floods,
            Attack("node port: syn of a pod", self._flooding("syn", OFFENDER, node, f"={NODE_PORT}"), pod),
            Attack("node port: syn of a client", self._flooding("syn", WORLD, node, f"={NODE_PORT}"), [EVIL]),
            # what takes a tenth of a share and less is no news for `status`
            Attack("policy: 1,500 blocks x 600 ports", self._wide, tenant, ("metrics",)),
            Attack("policy: 17,001 prefixes for nobody", self._many, tenant, ()),
            Attack("policy: 12,000 prefixes", self._greedy, tenant),
            Attack("health port: idle connections", self._hold, [*pod, self._address[OFFENDER]]),
        ]

    def _idle(self, duration: float) -> str:
        time.sleep(duration)
        return ""

    def _flooding(self, kind: str, place: str, target: str, ports: str) -> Callable[[float], str]:
        source = EVIL if place == WORLD else self._address[place]
        namespace = self._lab.namespace_of(place if place == WORLD else f"evil/{place}")

        def send(duration: float) -> str:
            words = [self._flood, netns.path(namespace), kind, source, target, 1024, 65535, ports, duration, LEAST]
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
            sent, _, passed = map(float, done.stdout.split())
            return f"{sent:,.0f} packets in {seconds(passed)}"

        return send

    def _import(self, document: dict[str, Any]) -> str:
        client = ApiClient(self._lab.directory.node("node1").api_socket)
        begin = time.monotonic()
        try:
            client.request("PUT", "/v1/policy", {"documents": [{"object": document}]})
        except AgentUnavailable:
            return f"no answer for {seconds(time.monotonic() - begin)}"
        except ApiError as error:
            return f"refused in {seconds(time.monotonic() - begin)}: {str(error)[:60]}"
        return f"taken in {seconds(time.monotonic() - begin)}"

    def _policy(self, name: str, selector: dict[str, Any], ingress: list[Any]) -> dict[str, Any]:
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "evil"},
            "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": ingress},
        }

    def _wide(self, duration: float) -> str:
        blocks = [{"ipBlock": {"cidr": f"203.{1 + n // 256}.{n % 256}.1/32"}} for n in range(1500)]
        ports = [{"port": 1000 + 20 * n, "endPort": 1006 + 20 * n, "protocol": "TCP"} for n in range(600)]
        end = time.monotonic() + duration
        said = self._import(
            self._policy("wide", {"matchLabels": {"app": OFFENDER}}, [{"from": blocks, "ports": ports}])
        )
        time.sleep(max(0.0, end - time.monotonic()))
        return said

    def _many(self, duration: float) -> str:
        blocks = [{"ipBlock": {"cidr": f"11.{n // 256}.{n % 256}.0/24"}} for n in range(17001)]
        end = time.monotonic() + duration
        said = self._import(self._policy("many", {"matchLabels": {"app": "nobody"}}, [{"from": blocks}]))
        good = self._policy(
            "good",
            {"matchLabels": {"app": "server"}},
            [
                {
                    "from": [
                        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["192.168.0.0/16"]}},
                        {"podSelector": {}},
                    ]
                }
            ],
        )
        good["metadata"]["namespace"] = "good"
        theirs = self._import(good)
        time.sleep(max(0.0, end - time.monotonic()))
        return f"{said}; another tenant's policy {theirs}"

    def _greedy(self, duration: float) -> str:
        """Most of the prefixes that a tenant may name, which take no room from others."""
        blocks = [{"ipBlock": {"cidr": f"12.{n // 128}.{2 * (n % 128)}.0/24"}} for n in range(12000)]
        end = time.monotonic() + duration
        said = self._import(self._policy("greedy", {"matchLabels": {"app": OFFENDER}}, [{"from": blocks}]))
        time.sleep(max(0.0, end - time.monotonic()))
        return said

    def _hold(self, duration: float) -> str:
        """Open connections to the node's health port until none can be opened, and keep them."""
        program = (
            "import resource, socket, sys, time\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))\n"
            "end, held = time.monotonic() + float(sys.argv[2]), []\n"
            "while time.monotonic() < end:\n"
            "    try:\n"
            "        if len(held) < 15000:\n"
            "            held.append(socket.create_connection((sys.argv[1], 4240), 0.2))\n"
            "        else:\n"
            "            time.sleep(0.01)\n"
            "    except OSError:\n"
            "        time.sleep(0.01)\n"
            "print(len(held))\n"
        )
        command = [*netns.inside(self._lab.namespace_of(f"evil/{OFFENDER}")), interpreter(), "-c", program]
        words = [*command, addresses("node1")[0], str(duration)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return f"{done.stdout.strip()} connections opened"

    def measure(self, attack: Attack) -> Iterator[Figure]:
        """One attack: the rows of its bystanders, of the agent, and of what names the offender."""
        talk, watch = Talk(self._lab, self._groups, self._lasting), Watch(self._lab)
        said = attack.run(self._duration)
        named = self._named(attack.names) if attack.names and attack.by else {}
        watch.end()
        for outcome in talk.end():
            lost = outcome.failed / max(1, outcome.opened)
            figure = f"{outcome.broken} of {outcome.established} broken, {lost:.1%} of {outcome.opened} new failed"
            ratio = max(lost / NEW_LOST, 2.0 if outcome.broken else 0.01)
            why = ", ".join(f"{count} {text}" for text, count in outcome.why.items())
            yield Figure(f"{attack.name} | {outcome.group}", figure, "0, 1 %", ratio, why or said)
        yield Figure(
            f"{attack.name} | API p99",
            seconds(watch.p99),
            "250 ms",
            watch.p99 / API_LIMIT,
            f"{len(watch.times)} requests",
        )
        yield Figure(
            f"{attack.name} | agent grew", f"{watch.growth:.0f} MB", "100 MB", max(0.01, watch.growth / GROWTH_LIMIT)
        )
        for where, text in ((where, named[where]) for where in attack.by if named):
            yield Figure(f"{attack.name} | named by {where}", text or "NOT NAMED", "named", 0.5 if text else 2.0)

    def _named(self, names: Sequence[str]) -> dict[str, str]:
        """The line of `status` and the sample of a metric that names the offender, where one comes in time."""
        found = {"status": "", "metrics": ""}
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not all(found.values()):
            status = self._lab.request("GET", "/v1/healthz?detail=true", node="node1")
            found["status"] = found["status"] or _first(_texts(status), names)
            metrics = self._lab.request("GET", "/v1/metrics", node="node1")
            lines = [json.dumps(item) for item in metrics] if isinstance(metrics, list) else str(metrics).splitlines()
            share = [line for line in lines if "share" in line or "refused" in line or "used" in line]
            found["metrics"] = found["metrics"] or _first(share, names)
            time.sleep(0.2)
        return {where: text[:110] for where, text in found.items()}


def _texts(document: Any) -> Iterator[str]:
    """Every text within a document."""
    if isinstance(document, dict):
        for value in document.values():
            yield from _texts(value)
    elif isinstance(document, list):
        for value in document:
            yield from _texts(value)
    elif isinstance(document, str):
        yield document


def _first(lines: Iterator[str] | Sequence[str], names: Sequence[str]) -> str:
    return next((line for line in lines if any(name in line or name in line.replace('\\"', '"') for name in names)), "")


@contextlib.contextmanager
def flood_program() -> Iterator[Path]:
    """The compiled sender."""
    with tempfile.TemporaryDirectory(prefix="ciliate-benchmark-") as directory:
        target = Path(directory) / "flood"
        subprocess.run([find_clang()[0], "-O2", "-o", str(target), str(HERE / "flood.c")], check=True)
        yield target


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 s an attack and 20 connections a group, not 20 and 100")
    parser.add_argument("--only", metavar="TEXT", help="only the attacks whose name has this text in it")
    options = parser.parse_args(arguments)
    if os.geteuid():
        sys.exit(f"{parser.prog}: needs root, for namespaces and BPF programs")
    root = Path(f"/run/ciliate-abuse-{os.getpid()}")
    figures: list[Figure] = []
    with flood_program() as flood:
        shape, options_of_agents = Shape(nodes=2), {"masquerade": "bpf", **(SMALL if options.quick else {})}
        lab = Lab.create(f"abuse-{uuid.uuid4().hex[:8]}", root, options=options_of_agents, shape=shape)
        try:
            abuse = Abuse(lab, flood, 2.0 if options.quick else 20.0, 20 if options.quick else 100)
            try:
                for attack in abuse.attacks():
                    if not options.only or options.only in attack.name:
                        figures += abuse.measure(attack)
            finally:
                abuse.close()
        finally:
            for problem in lab.destroy():
                print(f"left behind: {problem}", file=sys.stderr)
            root.rmdir()
    print(table(figures))
    return int(any(figure.ratio > 1 for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
