"""The datapath on Linux 6.1 without BTF and JIT: the tests of tier bpf, and a whole agent with pods. Tier uml.

Each test boots a kernel of its own. What it prints is shown where it fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import uml

BIN = Path(sys.executable).parent
PYTEST = [str(BIN / "pytest"), "-q", "-p", "no:cacheprovider"]
CILIATE = str(BIN / "ciliate")
# the others of test_loaders.py measure under load, which an interpreter on one CPU has no room for
BRIEF = "not under_tcp and not without_filter"
FILES = {
    "packets": ["tests/bpf/test_packets.py", "tests/bpf/test_flows.py"],
    "pairs": ["tests/bpf/test_live_pair.py"],
    "tunnels": ["tests/bpf/test_tunnel_packets.py", "tests/bpf/test_geneve_packets.py"],
    "nodes": ["tests/bpf/test_live_nodes.py", "-k", "policy_decides"],
    "builds": ["tests/bpf/test_builds.py", "tests/bpf/test_features.py", "tests/bpf/test_loaders.py", "-k", BRIEF],
}


def test_the_kernel_gets_the_inline_build(inside: Callable[..., uml.Outcome]) -> None:
    outcome = inside([CILIATE, "bpf", "features", "-o", "json"])
    assert outcome.status == 0, outcome.explain()
    shown = json.loads(outcome.output)
    assert shown["build"] == "inline"
    found = {item["feature"]: item["available"] for item in shown["features"]}
    absent = {name for name, available in found.items() if not available}
    assert absent == {"global functions", "JIT", "kernel BTF", "tcx links"}


@pytest.mark.parametrize("what", FILES)
def test_tier_bpf(inside: Callable[..., uml.Outcome], what: str) -> None:
    outcome = inside([*PYTEST, *FILES[what]], limit=600)
    assert outcome.status == 0, outcome.explain()


def test_an_agent_connects_pods_and_enforces_policy(inside: Callable[..., uml.Outcome]) -> None:
    outcome = inside([CILIATE, "lab", "run", "examples/scenarios/starwars.yaml"])
    assert outcome.status == 0, outcome.explain()
    assert "13 flows, 13 as expected, 0 different" in outcome.output
