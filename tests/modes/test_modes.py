"""Every scenario as packets on several nodes, in each routing mode. Tier modes, which `make test` leaves out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from nodeport_matrix import ENGINES, lost, nodeport_lab, switch

SCENARIOS = Path(__file__).parents[2] / "examples" / "scenarios"
LIMIT = 600
JOBS = 2


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("tunnel", ["disabled", "vxlan", "geneve"])
def test_every_scenario_passes(nodes: int, tunnel: str) -> None:
    name = f"all{os.getpid()}-{uuid.uuid4().hex[:4]}"
    shape = ["--nodes", str(nodes), "--kvstore", "etcd", "--tunnel", tunnel, "--jobs", str(JOBS)]
    command = [sys.executable, "-m", "ciliate.cli.main", "lab", "run", "--name", name, *shape, "-o", "json"]
    done = subprocess.run([*command, str(SCENARIOS)], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode in (0, 1), done.stderr
    flows = [flow for scenario in json.loads(done.stdout)["scenarios"] for flow in scenario["flows"]]
    assert [flow for flow in flows if flow["expected"] != flow["actual"]] == []
    assert done.returncode == 0
    assert len(flows) > 400


@pytest.mark.parametrize("tunnel", ["disabled", "vxlan", "geneve"])
def test_node_ports_serve_everybody_in_every_mode(tunnel: str) -> None:
    """Under each engine of masquerading."""
    with nodeport_lab(tunnel) as lab:
        for engine in ENGINES:
            switch(lab, engine)
            assert not lost(lab), engine
