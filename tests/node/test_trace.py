"""`ciliate policy trace` against a running agent: verdict, reason, exit code, and refusals. Needs root."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_harness import new_lab

from ciliate import manifest
from ciliate.lab.lab import Lab

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "examples/demo/pods.yaml", ROOT / "examples/policies/deathstar.yaml"]
TO = ["--dst-k8s-pod", "default/deathstar"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("trace", manifest.load(FILES)) as made:
        yield made


def trace(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ciliate.cli.main", "-H", str(lab.directory.api_socket), "policy", "trace"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--src-k8s-pod", "default/tiefighter", *TO, "--dport", "80/TCP"], 0, "Final verdict: ALLOWED"),
        (["--src-k8s-pod", "default/xwing", *TO, "--dport", "80/TCP"], 1, "Found no allow rule"),
        (["--src-k8s-pod", "tiefighter", *TO, "--dport", "80"], 1, "Final verdict: DENIED"),
        (["--src-k8s-pod", "default/tiefighter", *TO], 1, "deathstar.yaml"),
        (["-s", "org=empire", "-s", "io.kubernetes.pod.namespace=default", *TO, "--dport", "80/tcp"], 0, "ALLOWED"),
        (["--src-identity", "2", *TO, "--dport", "80/TCP"], 1, "reserved:world"),
        (["--src-k8s-pod", "tiefighter", *TO, "--dport", "ICMP"], 1, "Ports: [8/ICMP]"),
        (["--src-k8s-pod", "tiefighter", *TO, "--dport", "80/TCP", "--dport", "81/TCP"], 1, "Ports: [81/TCP]"),
        (["--src-k8s-pod", "deathstar", "--dst-k8s-pod", "xwing", "-v"], 0, "not selected, its selector is {class="),
        (["-s", "org=empire", *TO], 1, "Note: the source has no label k8s:io.kubernetes.pod.namespace"),
        (["--src-k8s-pod", "xwing", *TO, "--dport", "80/TCP"], 1, "isolated by CiliumNetworkPolicy default/"),
        (["--src-identity", "1", *TO, "--dport", "80/TCP"], 0, "the node may reach its own pods"),
    ],
)
def test_it_explains(lab: Lab, arguments: list[str], code: int, told: str) -> None:
    done = trace(lab, *arguments)
    assert (done.returncode, done.stderr) == (code, "")
    assert told in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (TO, 2, "0 ways given to say one end"),
        (["--src-identity", "2", "-s", "a=b", *TO], 2, "2 ways given"),
        (["--src-k8s-pod", "default/nobody", *TO], 1, "from: no pod default/nobody on this node"),
        (["--src-identity", "77777", *TO], 1, "from: identity 77777 is not known"),
        (["--src-endpoint", "999", *TO], 1, "endpoint 999"),
        (["--src-identity", "2", *TO, "--dport", "0/TCP"], 2, "port: '0/TCP' given, expected 1 to 65535"),
        (["--src-identity", "2", *TO, "--dport", "80/QUIC"], 2, "port: '80/QUIC' given"),
        (["--src-identity", "2", *TO, "--dport", "http"], 2, "a named port of the destination: "),
        (["--src-identity", "2", *TO, "--dport", "256/ICMP"], 2, "port: '256/ICMP' given, expected 0 to 255"),
    ],
)
def test_bad_input_is_told(lab: Lab, arguments: list[str], code: int, told: str) -> None:
    done = trace(lab, *arguments)
    assert done.returncode == code
    assert told in done.stderr


def test_json_names_the_rule(lab: Lab) -> None:
    done = trace(lab, "--src-k8s-pod", "default/tiefighter", *TO, "--dport", "80/TCP", "-o", "json")
    (found,) = json.loads(done.stdout)["traces"]
    assert found["verdict"] == "allow"
    assert "CiliumNetworkPolicy default/deathstar-landing spec.ingress[0]" in found["rule"]
    assert "deathstar.yaml:" in found["rule"]
    egress, ingress = found["sides"]
    assert (egress["enforced"], egress["rule"]) == (False, None)
    rule = ingress["rule"]
    assert (rule["kind"], rule["namespace"], rule["name"]) == ("CiliumNetworkPolicy", "default", "deathstar-landing")
    assert rule["file"].endswith("deathstar.yaml") and rule["line"] > 1


def probe(lab: Lab, name: str) -> list[bool]:
    addresses = lab.state.pods["default/deathstar"].addresses
    lab.helper("default/deathstar").serve([("TCP", 80)], addresses)
    probes = [
        {"id": index, "protocol": "TCP", "address": address, "port": 80, "source": None, "timeout": 1.0}
        for index, address in enumerate(addresses)
    ]
    return [result["reached"] for result in lab.helper(f"default/{name}").probe(probes, 30)]


def test_the_monitor_names_the_rule_that_allowed_and_what_isolates_from_the_rest(lab: Lab) -> None:
    command = [sys.executable, "-m", "ciliate.cli.main", "-H", str(lab.directory.api_socket), "monitor"]
    wanted = ["-t", "drop", "-t", "policy-verdict", "-t", "agent"]
    with subprocess.Popen([*command, *wanted], stdout=subprocess.PIPE, text=True) as monitor:
        try:
            assert monitor.stdout is not None
            assert "listening" in monitor.stdout.readline()
            assert probe(lab, "tiefighter") == [True, True]
            assert probe(lab, "xwing") == [False, False]
            lines: list[str] = []
            while sum(line.startswith("xx drop") for line in lines) < 2:
                lines.append(monitor.stdout.readline())
        finally:
            monitor.terminate()
    origin = "CiliumNetworkPolicy default/deathstar-landing"
    allowed = [line for line in lines if line.startswith("Policy verdict: allow ingress")]
    assert allowed and all(f"by {origin} spec.ingress[0] (" in line and "deathstar.yaml:" in line for line in allowed)
    left = [line for line in lines if line.startswith("Policy verdict: allow egress")]
    assert left and all("(no policy isolates it)" in line for line in left)
    for line in (line for line in lines if line.startswith("xx drop (Policy denied)")):
        assert f"no rule allows it, isolated by {origin} (" in line and "deathstar.yaml:2)" in line


def test_counters_name_their_rule(lab: Lab) -> None:
    assert probe(lab, "tiefighter") == [True, True]
    command = [sys.executable, "-m", "ciliate.cli.main", "-H", str(lab.directory.api_socket), "policy", "counters"]
    rows = json.loads(subprocess.run([*command, "-o", "json"], capture_output=True, check=True).stdout)
    counted = [row for row in rows if row["packets"] and row["port"] == "80"]
    assert counted and all("deathstar-landing spec.ingress[0] (" in row["rule"] for row in counted)
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "80/TCP" in text and "the rule that a node may reach its own pods" in text
    wrong = subprocess.run([*command, "--endpoint", "999"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1 and "endpoint 999" in wrong.stderr


CHART = """
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: default}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: by-request, namespace: default}
spec:
  labels: [team=x]
  endpointSelector: {matchLabels: {class: xwing}}
  ingress:
  - fromEndpoints: [{matchLabels: {org: empire, io.kubernetes.pod.namespace.labels.a: b}}]
  - fromEndpoints: [{matchLabels: {org: empire}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{method: GET}]}}]
"""


def ciliate(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ciliate.cli.main", "-H", str(lab.directory.api_socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def reached(lab: Lab, source: str, target: str) -> list[bool]:
    addresses = lab.state.pods[target].addresses
    lab.helper(target).serve([("TCP", 80)], addresses)
    probes = [
        {"id": index, "protocol": "TCP", "address": address, "port": 80, "source": None, "timeout": 1.0}
        for index, address in enumerate(addresses)
    ]
    return [result["reached"] for result in lab.helper(source).probe(probes, 30)]


def test_rules_that_no_proxy_serves_are_told_everywhere_and_dropped(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "chart.yaml"
    file.write_text(CHART)
    flow = ["--src-k8s-pod", "default/tiefighter", "--dst-k8s-pod", "default/xwing", "--dport", "80/TCP"]
    assert trace(lab, *flow).returncode == 0
    assert reached(lab, "default/tiefighter", "default/xwing") == [True, True]
    imported, validated = ciliate(lab, "policy", "import", str(file)), ciliate(lab, "policy", "validate", str(file))
    assert (imported.returncode, validated.returncode) == (0, 0)
    warned = [line.partition("warning: ")[2] for line in imported.stderr.splitlines() if "warning: " in line]
    assert warned == [line.removeprefix("warning: ") for line in validated.stdout.splitlines() if "warning: " in line]
    assert [text.split(": ")[2] for text in warned] == ["spec.ingress[0].fromEndpoints[0]", "spec.ingress[1]"]
    assert f"left alone: {file}:2: ConfigMap default/settings" in imported.stderr
    try:
        told = trace(lab, *flow)
        assert (told.returncode, told.stdout.splitlines()[-1]) == (1, "Final verdict: DENIED")
        assert "no proxy for http is active: dropped (191)" in told.stdout
        assert reached(lab, "default/tiefighter", "default/xwing") == [False, False]
        assert "no proxy for http is active" in ciliate(lab, "status").stdout
        assert "by-request" in ciliate(lab, "policy", "get", "team=x").stdout
        assert ciliate(lab, "policy", "get", "team=y").returncode == 1
        assert ciliate(lab, "policy", "delete", "team=y").returncode == 1
        assert ciliate(lab, "policy", "delete", "team=x", "by-request").returncode == 2
    finally:
        gone = ciliate(lab, "policy", "delete", "-l", "team=x")
    assert (gone.returncode, "deleted 1" in gone.stdout) == (0, True)
    assert trace(lab, *flow).returncode == 0
    assert reached(lab, "default/tiefighter", "default/xwing") == [True, True]
