"""CNI ADD to ready against Debian's bridge and host-local in the same run, one by one and in bursts; the agent at rest.

    python benchmarks/cni.py [--sequential 30] [--burst 100] [--at-once 20] [--idle 20]

Each ADD runs the real executable for an empty network namespace on the node of a lab. Ours returns when policy is
enforced; bridge has no policy to enforce. The two take turns, so that a busy moment of the machine meets both. Needs
root and the package containernetworking-plugins. At rest means: without pods, after all of them have come and gone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from report import Figure, seconds, table

from ciliate.lab import netns
from ciliate.lab.command import ip_batch, run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE

DEBIAN = Path("/usr/lib/cni")
TARGET = 1.0
WARM_UP = 3
START, MEMORY, IDLE = 1.5, 70e6, 0.002
STARTS = 3


class Plugin:
    """One way to connect containers: an executable and its configuration."""

    def __init__(self, name: str, executable: Path, config: dict[str, Any], prefix: Sequence[str]) -> None:
        self.name = name
        self._command = [*prefix, str(executable)]
        self._config = json.dumps({"cniVersion": "1.0.0", "name": f"bench-{name}", **config}).encode()

    def call(self, command: str, container: str) -> float:
        """One call; its wall time in seconds. Raises RuntimeError with the plugin's words where it refuses."""
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": str(netns.path(container)),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(DEBIAN),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        start = time.perf_counter()
        done = subprocess.run(
            self._command, input=self._config, env=environment, capture_output=True, timeout=120, check=False
        )
        spent = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"{self.name} {command}: {(done.stdout or done.stderr).decode()}")
        return spent


@contextmanager
def containers(count: int) -> Iterator[list[str]]:
    """Empty network namespaces, gone afterwards."""
    names = [f"cb-{os.getpid()}-{uuid.uuid4().hex[:8]}" for _ in range(count)]
    try:
        for name in names:
            run("ip", "netns", "add", name)
            ip_batch(name, ["link set lo up"])
        yield names
    finally:
        for name in names:
            netns.remove(name)


def sequential(plugins: Sequence[Plugin], count: int) -> dict[str, list[float]]:
    """Time of each ADD, one after the other, the plugins in turn."""
    spent: dict[str, list[float]] = {plugin.name: [] for plugin in plugins}
    with containers(len(plugins) * (count + WARM_UP)) as names:
        turns = [(plugin, names.pop()) for _ in range(count + WARM_UP) for plugin in plugins]
        try:
            for plugin, name in turns:
                spent[plugin.name].append(plugin.call("ADD", name))
        finally:
            for plugin, name in turns:
                plugin.call("DEL", name)
                netns.remove(name)
    return {name: values[WARM_UP:] for name, values in spent.items()}


def bursts(plugins: Sequence[Plugin], count: int, at_once: int) -> dict[str, list[float]]:
    """Time until a whole burst is connected, the plugins in turn, up to ``count`` containers each."""
    spent: dict[str, list[float]] = {plugin.name: [] for plugin in plugins}
    alive: list[tuple[Plugin, str]] = []
    rounds = max(count // at_once, 1)
    with containers(rounds * at_once * len(plugins)) as names, ThreadPoolExecutor(at_once) as pool:
        try:
            for _ in range(rounds):
                for plugin in plugins:
                    burst = [names.pop() for _ in range(at_once)]
                    alive += [(plugin, name) for name in burst]
                    start = time.perf_counter()
                    list(pool.map(plugin.call, ["ADD"] * at_once, burst))
                    spent[plugin.name].append(time.perf_counter() - start)
        finally:
            for plugin, name in alive:
                plugin.call("DEL", name)
                netns.remove(name)
    return spent


@contextmanager
def node() -> Iterator[tuple[Lab, list[Plugin]]]:
    """A lab's node with our agent on it, and both plugins."""
    root = Path(tempfile.mkdtemp(prefix="ciliate-bench-", dir="/run"))
    lab = Lab.create(f"bench-{uuid.uuid4().hex[:6]}", root)
    try:
        inside = netns.inside(lab.directory.namespace(NODE))
        ipam = {"type": "host-local", "subnet": "10.210.0.0/16", "dataDir": str(root / "host-local")}
        bridge = {"type": "bridge", "bridge": "cb0", "isGateway": True, "ipam": ipam}
        executable = lab.directory.path / "cni-bin" / "ciliate-cni"
        # both in the node's namespace and both started through nsenter, although ours needs neither
        yield (
            lab,
            [
                Plugin("ciliate", executable, {"type": "ciliate-cni"}, inside),
                Plugin("bridge", DEBIAN / "bridge", bridge, inside),
            ],
        )
    finally:
        problems = lab.destroy()
        shutil.rmtree(root, ignore_errors=True)
        if problems:
            raise RuntimeError("; ".join(problems))


def at_rest(lab: Lab, idle: float) -> list[Figure]:
    """What the agent costs that has nothing to do: memory, processor, and the time that it takes to start again."""
    pid = lab.agent_process().pid
    before = processor_time(pid)
    time.sleep(idle)
    share = (processor_time(pid) - before) / idle
    memory = resident(pid)
    starts = []
    for _ in range(STARTS):
        lab.stop_agent()
        begin = time.perf_counter()
        lab.start_agent()
        starts.append(time.perf_counter() - begin)
    fresh = resident(lab.agent_process().pid)
    beside = f"after the burst; {fresh / 1e6:.0f} MB after a start"
    return [
        Figure("start to ready, template cached", seconds(median(starts)), "< 1.5 s", median(starts) / START),
        Figure("resident memory at rest", f"{memory / 1e6:.0f} MB", "< 70 MB", memory / MEMORY, beside),
        Figure("processor at rest", f"{share:.2%}", "< 0.2 %", share / IDLE, f"over {idle:.0f} s, in ticks of 10 ms"),
    ]


def processor_time(pid: int) -> float:
    """Seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def figures(what: str, times: dict[str, list[float]], each: int = 1) -> list[Figure]:
    """The median with its ratio, and the 95th percentile beside it."""
    ours, theirs = median(times["ciliate"]), median(times["bridge"])
    worst = {name: quantiles(values, n=20)[-1] if len(values) > 1 else values[0] for name, values in times.items()}
    beside = f"bridge {seconds(theirs)}; p95 {seconds(worst['ciliate'])} against {seconds(worst['bridge'])}"
    if each > 1:
        beside += f"; {each / ours:.0f} pods/s against {each / theirs:.0f}"
    return [Figure(what, seconds(ours), f"<= {TARGET:.2f}", ours / theirs, beside)]


def main() -> int:
    """Measure and print; exit code 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sequential", type=int, default=30, help="ADDs one after the other")
    parser.add_argument("--burst", type=int, default=100, help="ADDs in bursts, in all")
    parser.add_argument("--at-once", type=int, default=20, help="ADDs in one burst")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds to look at the agent at rest")
    options = parser.parse_args()
    if not (DEBIAN / "bridge").exists():
        parser.error(f"{DEBIAN}/bridge: not there, expected the package containernetworking-plugins")
    with node() as (lab, plugins):
        one_by_one = sequential(plugins, options.sequential)
        together = bursts(plugins, options.burst, options.at_once)
        rest = at_rest(lab, options.idle)
    found = figures("ADD, one by one (median)", one_by_one)
    found += figures(f"burst of {options.at_once} ADDs (median)", together, options.at_once)
    found += rest
    print(table(found))
    return int(any(item.ratio > TARGET for item in found))


if __name__ == "__main__":
    sys.exit(main())
