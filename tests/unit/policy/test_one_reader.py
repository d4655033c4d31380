"""Validate and import read alike: what one refuses or leaves, the other refuses or leaves, in the same words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ciliate import manifest
from ciliate.cli.policy_offline import validate
from ciliate.policy.problems import PolicyError
from ciliate.policy.simulate import Simulation

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec: {endpointSelector: {}, ingress: [{}]}
"""
CHART = f"""
apiVersion: v1
kind: ConfigMap
metadata: {{name: settings, namespace: shop}}
data: {{a: b}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: shop}}
spec: {{replicas: 1}}
---
apiVersion: example.com/v1alpha1
kind: Whatever
metadata: {{name: thing}}
---
# nothing of a pod concerns policies, not even its mistakes
apiVersion: v1
kind: Pod
metadata: {{name: pod, namespace: shop}}
spec: {{containers: [{{ports: [{{containerPort: none}}]}}]}}
---
apiVersion: example.com/v1
kind: Rule
metadata: {{name: someone-elses}}
---
{POLICY}"""
LEFT = ["ConfigMap shop/settings", "Deployment shop/web", "Whatever thing", "Pod shop/pod", "Rule someone-elses"]
NEARLY = [
    "CiliumNetworkPolicies",
    "CiliumNetworkPolcy",
    "ciliumnetworkpolicy",
    "NetworkPolicys",
    "NetworkPolices",
    "networkpolicy",
    "CiliumClusterWideNetworkPolicy",
    "CiliumNetworkPolicyV2",
]


def run(directory: Path, text: str, *options: str) -> Result:
    file = directory / "chart.yaml"
    file.write_text(text)
    return CliRunner().invoke(validate, [*options, str(file)])


def test_validate_names_what_is_left(tmp_path: Path) -> None:
    answer = json.loads(run(tmp_path, CHART, "-o", "json").output)
    assert [item["object"] for item in answer["left"]] == LEFT
    assert (answer["problems"], answer["objects"]) == ([], 1)
    done = run(tmp_path, CHART)
    assert done.exit_code == 0
    assert all(name in done.output for name in LEFT)


def test_files_without_any_policy_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "kind: ConfigMap\napiVersion: v1\nmetadata: {name: settings}")
    assert done.exit_code == 1
    assert "ConfigMap settings: kind: expected a policy: none of the 1 objects is one" in done.output


@pytest.mark.parametrize("kind", NEARLY)
def test_nearly_a_policy_is_not_left_but_refused(kind: str, tmp_path: Path) -> None:
    done = run(tmp_path, POLICY.replace("CiliumNetworkPolicy", kind))
    assert done.exit_code == 1
    assert f"kind: '{kind}' given" in done.output


@pytest.mark.parametrize(
    "text",
    [
        "metadata: {name: x}\nspec: {endpointSelector: {}}",
        "kind:\napiVersion: cilium.io/v2",
        "kind: 7",
        POLICY.replace("cilium.io/v2", "cilium.io/v3"),
        POLICY.replace("CiliumNetworkPolicy", "NetworkPolicy"),
        POLICY.replace("CiliumNetworkPolicy", "CiliumSomethingPolicy"),
    ],
)
def test_what_may_have_been_meant_as_a_policy_is_refused(text: str, tmp_path: Path) -> None:
    assert run(tmp_path, text).exit_code == 1


def test_simulate_leaves_other_kinds_as_well() -> None:
    simulation = Simulation(
        [item for item in manifest.loads(CHART, "chart.yaml") if item.object["kind"] != "Pod"]
        + manifest.loads("kind: Pod\napiVersion: v1\nmetadata: {name: pod, namespace: shop}\n")
    )
    assert simulation.verdict({"from": "entity/world", "to": "shop/pod", "port": 80}).verdict == "deny"
    with pytest.raises(PolicyError, match="Servce"):
        Simulation(manifest.loads("kind: Servce\napiVersion: v1\nmetadata: {name: s}\n"))


def test_one_name_in_two_files(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text(POLICY)
    done = CliRunner().invoke(validate, list(map(str, files)))
    assert done.exit_code == 1
    assert "expected one object of this name" in done.output


def test_scenarios_are_read_each_for_itself(tmp_path: Path) -> None:
    """Each has its own cluster, and there the mistakes of pods count."""
    scenario = f"{POLICY}---\napiVersion: ciliate.io/v1alpha1\nkind: Expectation\nspec: {{flows: []}}\n"
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text(scenario)
    assert CliRunner().invoke(validate, list(map(str, files))).exit_code == 0
    files[0].write_text(f"{scenario}---\nkind: Pod\napiVersion: v1\nmetadata: {{name: X}}\n")
    done = CliRunner().invoke(validate, list(map(str, files)))
    assert done.exit_code == 1
    assert "metadata.name" in done.output
