"""`ciliate policy trace` against a running agent: verdict, reason, exit code, and refusals. Needs root."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciliate import manifest
from ciliate.lab.lab import Lab
from ciliate.lab.scenario import populate

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "examples/demo/pods.yaml", ROOT / "examples/policies/deathstar.yaml"]
TO = ["--dst-k8s-pod", "default/deathstar"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    made = Lab.create(f"trace-{uuid.uuid4().hex[:8]}")
    try:
        populate(made, manifest.load(FILES))
        yield made
    finally:
        assert made.destroy() == []


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
        (["--src-identity", "2", *TO, "--dport", "0/TCP"], 1, "port: '0/TCP' given, expected 1 to 65535"),
        (["--src-identity", "2", *TO, "--dport", "80/QUIC"], 1, "port: '80/QUIC' given"),
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
