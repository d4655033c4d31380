"""The scale benchmark, small: a simulated cluster in a real etcd, a real agent and operator that follow it. Tier scale.

Figures of time mean nothing on a machine that does other things beside; that everything arrives, goes, and is asked for
as seldom as the formulas say, always holds.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scale
from storeload import by_formula, per_node_and_minute

from ciliate.lab import netns


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("etcd") is None, reason="needs root and etcd")
def test_a_cluster_comes_goes_and_changes() -> None:
    figures = {
        figure.what: figure
        for figure in scale.main(scale.Size(nodes=40, pods=3000, services=500, length=1.5, rounds=1))
    }
    assert "deleting all 3,000" in figures
    assert "cold start: 3,000 in the kernel" in figures
    assert figures["500 services of 3 backends"].beside.endswith("MB resident then")
    for pods in ("300", "1,500", "3,000"):
        assert "pods/s replaced" in figures[f"churn, {pods} addresses: share of one core"].beside
    # the time until a sampled pod is in the map is 5 s where it never comes
    assert figures["churn, 3,000 addresses: new pod in the map, p50"].ratio * 0.02 < 4.0
    assert "load" in figures["live, each a revision of its own"].beside
    assert netns.named(f"cl-scale-{os.getpid()}.") == []


@pytest.mark.parametrize("nodes", [1, 10, 100])
def test_what_agents_ask_of_the_store_grows_as_the_formulas_say(nodes: int) -> None:
    assert per_node_and_minute(nodes) == pytest.approx(by_formula(nodes), rel=0.1)


def test_a_cluster_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SystemExit, match="--pods"):
        scale.main(scale.Size(nodes=1, pods=1000, services=0))
