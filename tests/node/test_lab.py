"""The lab and its command: scenarios as packets, labs side by side, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciliate.lab import netns
from ciliate.lab.changes import populate
from ciliate.lab.describe import describe
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.scenario import run_files
from ciliate.lab.state import ROOT
from ciliate.manifest import loads

EXAMPLES = Path(__file__).parents[2] / "examples" / "scenarios"
SCENARIO = """
apiVersion: v1
kind: Namespace
metadata: {name: blue, labels: {team: blue}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: blue, labels: {app: web}}
spec: {containers: [{name: c, image: c, ports: [{name: http, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: daemon, namespace: blue, labels: {app: daemon}}
spec: {hostNetwork: true, containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, annotations: {ciliate.io/cluster: other}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: blue}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {team: blue}}
    - ipBlock: {cidr: 198.51.100.0/24, except: [198.51.100.128/25]}
    - ipBlock: {cidr: 2001:db8::/64}
    ports: [{port: http}]
  egress:
  - to: [{ipBlock: {cidr: 203.0.113.0/24}}]
    ports: [{port: 53, protocol: UDP}]
---
apiVersion: ciliate.io/v1alpha1
kind: Expectation
spec:
  flows:
  - {from: ip/198.51.100.7, to: blue/web, port: 8080, protocol: TCP, verdict: allow}
  - {from: ip/198.51.100.7, to: blue/web, port: 80, protocol: TCP, verdict: deny}
  - {from: ip/198.51.100.200, to: blue/web, port: 8080, protocol: TCP, verdict: deny}
  - {from: "ip/2001:db8::1", to: blue/web, port: 8080, protocol: TCP, verdict: allow}
  - {from: "ip/2001:db8:1::1", to: blue/web, port: 8080, protocol: TCP, verdict: deny}
  - {from: default/client, to: blue/web, port: 8080, protocol: TCP, verdict: deny}
  - {from: blue/web, to: ip/203.0.113.5, port: 53, protocol: UDP, verdict: allow}
  - {from: blue/web, to: ip/203.0.113.5, port: 53, protocol: TCP, verdict: deny}
  - {from: blue/web, to: entity/world, port: 53, protocol: UDP, verdict: deny}
  - {from: default/client, to: entity/world, port: 53, protocol: UDP, verdict: allow}
  - {from: default/client, to: entity/world, verdict: allow}
  - {from: default/client, to: entity/host, port: 22, protocol: TCP, verdict: allow}
  - {from: blue/web, to: entity/host, port: 22, protocol: TCP, verdict: deny}
  - {from: entity/world, to: default/client, port: 22, protocol: TCP, verdict: allow}
  - {from: blue/daemon, to: blue/web, port: 80, protocol: TCP, verdict: allow}
  - {from: default/client, to: blue/daemon, port: 80, protocol: TCP, verdict: allow}
  - {from: default/client, to: default/client, port: 80, protocol: TCP, verdict: allow}
  - {from: default/client, to: blue/web, port: 8080, protocol: TCP, direction: egress, verdict: allow}
  - {from: default/client, to: fqdn/example.org, port: 80, protocol: TCP, verdict: allow}
  - {from: default/client, to: default/far, port: 80, protocol: TCP, verdict: allow}
---
apiVersion: ciliate.io/v1alpha1
kind: Expectation
spec:
  enforcement: always
  flows:
  - {from: default/client, to: entity/world, port: 53, protocol: UDP, verdict: deny}
  - {from: ip/198.51.100.7, to: blue/web, port: 8080, protocol: TCP, verdict: allow}
---
apiVersion: ciliate.io/v1alpha1
kind: Expectation
spec:
  enforcement: never
  flows:
  - {from: default/client, to: blue/web, port: 8080, protocol: TCP, verdict: allow}
"""


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a lab that is gone after the test, whatever happened."""
    name = f"t{os.getpid()}-{uuid.uuid4().hex[:6]}"
    yield name
    assert Lab.take_down(name, force=True) == []
    assert netns.named(f"cl-{name}.") == []
    assert not (ROOT / name).exists()


def ciliate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ciliate.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_packets_and_engine_give_the_same_answers(name: str, tmp_path: Path) -> None:
    """Prefixes, named ports, host network, the world, enforcement modes; both address families."""
    file = tmp_path / "mixed.yaml"
    file.write_text(SCENARIO)
    report = run_files([file], name)
    assert [str(item) for result in report.results for item in result.flows if not item.good] == []
    assert sum(len(result.flows) for result in report.results) == 20
    reasons = [item.reason for item in report.skipped]
    assert len(reasons) == 3
    assert "cannot tell" in reasons[0] and "fqdn" in reasons[1] and "cluster 'other'" in reasons[2]
    assert "3 flows were skipped" in report.table()


def test_the_command_prints_what_simulate_prints(name: str) -> None:
    file = EXAMPLES / "starwars.yaml"
    lab, simulated = ciliate("lab", "run", "--name", name, file), ciliate("policy", "simulate", file)
    assert (lab.returncode, lab.stderr) == (0, "")
    assert lab.stdout == simulated.stdout
    assert not (ROOT / name).exists()


def test_an_expectation_turned_round_ends_with_1(name: str, tmp_path: Path) -> None:
    text = (EXAMPLES / "starwars.yaml").read_text()
    turned = tmp_path / "turned.yaml"
    turned.write_text(text.replace("verdict: deny", "verdict: allow", 1))
    assert turned.read_text() != text
    done = ciliate("lab", "run", "--name", name, "-o", "json", turned)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["failed"] == 1
    (wrong,) = [flow for flow in document["scenarios"][0]["flows"] if flow["expected"] != flow["actual"]]
    assert (wrong["expected"], wrong["actual"]) == ("allow", "deny")


def test_up_exec_status_run_down(name: str) -> None:
    file = EXAMPLES / "starwars.yaml"
    done = ciliate("lab", "up", "--name", name, file)
    assert done.returncode == 0, done.stderr
    assert "3 pods" in done.stdout

    status = json.loads(ciliate("lab", "status", "--name", name, "-o", "json").stdout)
    places = {place["name"]: place for place in status["labs"][0]["places"]}
    assert {place["state"] for place in places.values()} == {"up"}
    assert {"node1", "world", "default/deathstar", "default/xwing", "default/tiefighter"} == places.keys()

    assert {"172.31.255.2", "198.18.255.254"} <= set(places["world"]["addresses"])
    address = places["default/tiefighter"]["addresses"][0]
    assert ciliate("lab", "exec", "--name", name, "xwing", "--", "ping", "-c1", "-W5", address).returncode == 0
    denied = places["default/deathstar"]["addresses"][0]
    assert ciliate("lab", "exec", "--name", name, "xwing", "--", "ping", "-c1", "-W1", denied).returncode == 1

    again = ciliate("lab", "up", "--name", name)
    assert again.returncode == 2 and "exists already" in again.stderr
    assert ciliate("lab", "run", "--name", name, file).returncode == 0
    assert describe(name)["places"], "a lab that was up before stays up"
    assert ciliate("lab", "down", "--name", name).returncode == 0
    gone = ciliate("lab", "down", "--name", name)
    assert gone.returncode == 2 and name in gone.stderr
    assert ciliate("lab", "down", "--name", name, "--force").returncode == 0


def test_two_labs_side_by_side(name: str) -> None:
    other = f"{name}-b"
    documents = loads(SCENARIO, "scenario.yaml")[:3]
    first = Lab.create(name)
    try:
        second = Lab.create(other)
        for lab in (first, second):
            populate(lab, documents)
        for lab in (first, second):
            web = lab.state.pods["blue/web"].addresses
            lab.helper("blue/web").serve([("TCP", 8080)], web)
            probes = [
                {"id": 1, "protocol": "TCP", "address": address, "port": 8080, "source": None, "timeout": 5.0}
                for address in web
            ]
            assert {result["who"] for result in lab.helper("default/client").probe(probes, 30)} == {"blue/web"}
    finally:
        assert Lab.take_down(other, force=True) == []
        first.destroy()


def test_a_crash_is_cleaned_up(name: str) -> None:
    """The command is killed while it works; `down --force` finds everything."""
    command = [sys.executable, "-m", "ciliate.cli.main", "lab", "run", "--name", name, str(EXAMPLES / "starwars.yaml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + 60
        while not netns.named(f"cl-{name}.default.") and time.monotonic() < deadline:
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    processes = [process.pid for process in Lab.open(name).state.processes]
    assert processes
    assert ciliate("lab", "down", "--name", name, "--force").returncode == 0
    assert [pid for pid in processes if Path(f"/proc/{pid}").exists() and name in _command_line(pid)] == []


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_a_lab_in_use_is_not_touched(name: str) -> None:
    with Lab.lock(name), pytest.raises(LabError, match="another command"), Lab.lock(name):
        pass


@pytest.mark.parametrize("wrong", ["", "A", "a_b", "../x", "-a", "a" * 40])
def test_wrong_names_are_refused(wrong: str) -> None:
    done = ciliate("lab", "up", "--name", wrong)
    assert done.returncode == 2 and "--name" in done.stderr


def test_too_many_nodes_are_refused_with_a_reason(name: str) -> None:
    done = ciliate("lab", "up", "--name", name, "--nodes", "201")
    assert done.returncode == 2 and "--nodes" in done.stderr


def test_a_wrong_scenario_is_an_error_before_anything_is_built(name: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("apiVersion: ciliate.io/v1alpha1\nkind: Expectation\nspec: {flows: [{from: a, to: b/c}]}\n")
    done = ciliate("lab", "run", "--name", name, file)
    assert done.returncode == 2 and "spec.flows[0].from" in done.stderr and "wrong.yaml" in done.stderr


def test_what_a_scenario_may_say_of_packets_happens(name: str) -> None:
    """Steps on the living lab, workloads without orchestrator, the node held to policy, one family, raw SCTP."""
    files = ["steps", "workloads", "localhost", "families", "single-family", "k8s-ports-sctp"]
    report = run_files([EXAMPLES / f"{file}.yaml" for file in files], name, jobs=2)
    assert [str(item) for result in report.results for item in result.flows if not item.good] == []
    assert [str(item) for item in report.skipped] == []
    assert [len(result.flows) for result in report.results] == [7, 5, 4, 3, 3, 4]
