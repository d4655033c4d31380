"""Objects in the form of 1.5's published examples are taken, and mean what their titles say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.unit.policy.published import BARE, BARE_FLOWS, PODS, PUBLISHED, Published

from ciliate.manifest import loads
from ciliate.policy.importer import is_policy
from ciliate.policy.repository import Repository
from ciliate.policy.simulate import Simulation

IN_ONE_NAMESPACE = ["l3-l4-policy", "l7-policy", "kafka-role", "cidr", "entity-world", "l4", "cidr-l4-combined"]


def _check(text: str, flows: list[tuple[Any, ...]]) -> None:
    simulation = Simulation(loads(f"{PODS}\n---\n{text}", "published.yaml"))
    for source, target, port, protocol, request, allowed in flows:
        flow = {"from": source, "to": target, "port": port, "protocol": protocol, **request}
        found = simulation.verdict(flow)
        assert (found.verdict == "allow") == allowed, (flow, found.why)


@pytest.mark.parametrize("item", PUBLISHED, ids=[item.name for item in PUBLISHED])
def test_published(item: Published) -> None:
    _check(item.text, item.flows)


@pytest.mark.parametrize("name", IN_ONE_NAMESPACE)
def test_the_same_as_bare_rules(name: str) -> None:
    (item,) = [item for item in PUBLISHED if item.name == name]
    (document,) = [found for found in loads(item.text) if is_policy(found.object)]
    rule = {**document.object["spec"], "labels": [{"key": "name", "value": name}]}
    simulation = Simulation([*loads(PODS), *loads(json.dumps([rule]), "rules.json")])
    for source, target, port, protocol, request, allowed in item.flows:
        flow = {"from": source, "to": target, "port": port, "protocol": protocol, **request}
        assert (simulation.verdict(flow).verdict == "allow") == allowed, flow


def test_bare_rules() -> None:
    simulation = Simulation([*loads(PODS), *loads(BARE, "rules.json")])
    for source, target, port, protocol, request, allowed in BARE_FLOWS:
        flow = {"from": source, "to": target, "port": port, "protocol": protocol, **request}
        assert (simulation.verdict(flow).verdict == "allow") == allowed, flow


HEAD = "apiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {{name: p, namespace: default}}\n"
RULE = "{endpointSelector: {}, ingress: [{}]}"


@pytest.mark.parametrize("kind", ["CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"])
@pytest.mark.parametrize("before", [f"spec: {RULE}", f"specs: [{RULE}, {RULE}]"])
@pytest.mark.parametrize("after", ["spec: null", "spec:", "specs: null", "specs: []", "", "spec: null\nspecs: []"])
def test_an_object_that_lost_its_rules_lifts_them(kind: str, before: str, after: str) -> None:
    repository, head = Repository(), HEAD.format(kind=kind)
    repository.import_documents(loads(head + before))
    assert sum(len(item.rules) for item in repository.objects()) > 0
    result = repository.import_documents(loads(head + after))
    assert (result.replaced, sum(len(item.rules) for item in repository.objects())) == (1, 0)
    # and it may get new ones
    repository.import_documents(loads(head + before))
    assert sum(len(item.rules) for item in repository.objects()) > 0


@pytest.mark.parametrize("after", ["spec: {}", "spec: []", "specs: {}", "specs: [null]", "spec: ''"])
def test_rules_that_cannot_be_read_lift_nothing(after: str) -> None:
    repository, head = Repository(), HEAD.format(kind="CiliumNetworkPolicy")
    repository.import_documents(loads(f"{head}spec: {RULE}"))
    with pytest.raises(ValueError, match="expected"):
        repository.import_documents(loads(head + after))
    assert len(repository.objects()[0].rules) == 1
