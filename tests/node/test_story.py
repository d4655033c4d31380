"""The story of `make demo`, both families, with real packets; and that it fails when a step differs. Tier node."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EVERYBODY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: everybody, namespace: default}
spec:
  endpointSelector: {matchLabels: {class: deathstar}}
  ingress: [{fromEntities: [all]}]
"""


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ciliate.lab.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_story_is_true() -> None:
    done = demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO " not in done.stdout
    for family in ("10.200.", "fd00:"):
        assert f"xwing -> deathstar [{family}" in done.stdout
    assert "nothing stays behind" in done.stdout


def test_a_step_that_differs_makes_it_fail(tmp_path: Path) -> None:
    policy = tmp_path / "everybody.yaml"
    policy.write_text(EVERYBODY)
    done = demo("--policy", str(policy))
    assert done.returncode == 1
    assert "NO  xwing -> deathstar" in done.stdout
    assert "step 7" in done.stderr
