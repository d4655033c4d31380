"""Policies are shown and deleted by labels, rule by rule, as 1.5 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ciliate.agent.policy_service import PolicyService
from ciliate.labels import SOURCE_ANY, parse_label
from ciliate.manifest import loads
from ciliate.policy.repository import Repository

TEXT = """
[{"labels": [{"key": "name", "value": "a"}, {"key": "team", "value": "x"}], "endpointSelector": {}, "ingress": [{}]},
 {"labels": ["k8s:name=b", "team=x"], "endpointSelector": {}, "egress": [{}]},
 {"endpointSelector": {"matchLabels": {"q": "q"}}, "egress": [{}]}]
"""
OBJECTS = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: several, namespace: shop, uid: 12-34}
spec: {labels: [team=x, only], endpointSelector: {}, ingress: [{}]}
specs:
- {labels: [team=y], endpointSelector: {}, egress: [{}]}
- {labels: [team=x], endpointSelector: {matchLabels: {app: z}}, egress: [{toEntities: [world]}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: empty, namespace: shop}
spec: null
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: kube, namespace: shop}
spec: {podSelector: {}}
"""
GENERATED = "io.cilium.k8s.policy."
CASES: list[tuple[list[str], int]] = [
    (["name=a"], 1),
    (["unspec:name=a"], 1),
    (["k8s:name=a"], 0),
    (["name=b"], 1),
    (["any:name=b"], 1),
    (["k8s:name=b"], 1),
    (["container:name=b"], 0),
    (["name"], 0),
    (["only"], 1),
    (["team=x"], 4),
    (["team=x", "name=a"], 1),
    (["team=x", "name=c"], 0),
    (["team=y"], 1),
    ([f"{GENERATED}name=several"], 3),
    ([f"k8s:{GENERATED}name=several", "team=x"], 2),
    ([f"{GENERATED}uid=12-34"], 3),
    ([f"{GENERATED}namespace=shop"], 5),
    ([f"{GENERATED}derived-from=NetworkPolicy"], 1),
    ([f"{GENERATED}name=empty"], 1),
]


class Kernel:
    """Stands where the realizer is."""

    async def realize(self) -> None:
        pass


def service(directory: Path) -> tuple[PolicyService, Repository]:
    repository = Repository()
    policies = PolicyService(repository, Kernel(), directory)  # type: ignore[arg-type]
    return policies, repository


def rules(repository: Repository) -> int:
    """How many rules there are; an object without any counts as one."""
    return sum(max(len(item.rules), 1) for item in repository.objects())


def wanted(texts: list[str]) -> list[Any]:
    return [parse_label(text, SOURCE_ANY) for text in texts]


@pytest.mark.parametrize(("texts", "count"), CASES)
async def test_exactly_the_rules_with_the_labels_go(texts: list[str], count: int, tmp_path: Path) -> None:
    policies, repository = service(tmp_path)
    await policies.import_documents([*loads(TEXT, "rules.json"), *loads(OBJECTS, "objects.yaml")])
    before, revision = rules(repository), repository.revision
    assert before == 8
    found = repository.labelled(wanted(texts))
    assert sum(max(len(paths), 1) for _, paths in found) == count
    gone, _ = await policies.delete_labelled(wanted(texts))
    assert (gone, before - rules(repository)) == (count, count)
    assert (repository.revision > revision) == bool(count)
    assert not repository.labelled(wanted(texts))
    # the same is there after a restart
    again, restored = service(tmp_path)
    again.restore()
    assert [item.ref for item in restored.objects()] == [item.ref for item in repository.objects()]
    assert rules(restored) == before - count


async def test_what_stays_of_an_object_keeps_its_place(tmp_path: Path) -> None:
    policies, repository = service(tmp_path)
    await policies.import_documents(loads(OBJECTS, "objects.yaml"))
    await policies.delete_labelled(wanted(["only"]))
    await policies.delete_labelled(wanted(["team=y"]))
    (item,) = [item for item in repository.objects() if item.name == "several"]
    assert item.document.object["specs"][0]["labels"] == ["team=x"]
    assert "spec" not in item.document.object
    (rule,) = item.rules
    assert rule.egress is not None
    assert item.document.line_of(rule.egress[0].path) == 8
