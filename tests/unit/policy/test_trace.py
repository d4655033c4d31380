"""The explanation agrees with the engine and names rule, object, file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciliate.identity import Identity
from ciliate.labels import LabelSet
from ciliate.manifest import load, loads
from ciliate.policy.importer import is_policy
from ciliate.policy.repository import PolicySettings, Repository
from ciliate.policy.trace import End, Explanation, trace

STARWARS = Path(__file__).parents[3] / "examples" / "scenarios" / "starwars.yaml"
ORIGIN = "CiliumNetworkPolicy default/rule1 spec.ingress[0]"
MANY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: many, namespace: default}}
spec:
  endpointSelector: {{matchLabels: {{class: deathstar}}}}
  ingress:
{sections}
"""


def _ship(org: str, kind: str, **more: str) -> LabelSet:
    labels = {"org": org, "class": kind, "io.kubernetes.pod.namespace": "default", **more}
    return LabelSet.from_mapping(labels)


XWING, TIEFIGHTER, DEATHSTAR = (
    End(_ship(*pair)) for pair in (("alliance", "xwing"), ("empire", "tiefighter"), ("empire", "deathstar"))
)


def _repository(settings: PolicySettings | None = None) -> Repository:
    repository = Repository(settings)
    repository.import_documents([item for item in load([STARWARS]) if is_policy(item.object)])
    return repository


def _side(found: Explanation, direction: str) -> str:
    (side,) = [side for side in found.sides if side.direction == direction]
    return "\n".join(side.lines)


def test_the_xwing_is_told_why() -> None:
    repository = _repository()
    known = set(repository.cache.members)
    found = trace(repository, XWING, DEATHSTAR, "TCP", 80)
    assert found.verdict == "deny"
    ingress = _side(found, "ingress")
    assert f"{ORIGIN} ({STARWARS}:39): selected" in ingress
    assert "Allows {org=empire, k8s:io.kubernetes.pod.namespace=default}: does not match" in ingress
    assert "Allows ports [80/TCP]: matches" in ingress
    assert "Label verdict: undecided" in ingress
    assert f"Found no allow rule; isolated by CiliumNetworkPolicy default/rule1 ({STARWARS}:31)" in ingress
    assert "no rule with an egress section selects it" in _side(found, "egress")
    assert found.lines[-1] == "Final verdict: DENIED"
    assert set(repository.cache.members) == known, "trial identities do not stay"


def test_the_tiefighter_is_told_which_rule_lets_it_land() -> None:
    repository = _repository()
    found = trace(repository, TIEFIGHTER, DEATHSTAR, "TCP", 80)
    assert found.verdict == "allow"
    assert str(repository.rule(found.rule)).startswith(ORIGIN)
    assert "  1/1 rules selected" in found.lines
    assert found.lines[-1] == "Final verdict: ALLOWED"
    rules = [side.rule for side in found.sides]
    assert rules[0] is None and rules[1] is not None and (rules[1].file, rules[1].line) == (str(STARWARS), 39)
    assert trace(repository, TIEFIGHTER, DEATHSTAR, "TCP", 81).verdict == "deny"
    assert trace(repository, DEATHSTAR, XWING).verdict == "allow"


def test_layer_3_is_asked_without_a_port() -> None:
    found = trace(_repository(), TIEFIGHTER, DEATHSTAR)
    assert found.verdict == "deny"
    assert "L4 ingress policies skipped" in _side(found, "ingress")


def test_verbose_shows_rules_that_do_not_select() -> None:
    text = "\n".join(trace(_repository(), DEATHSTAR, XWING, verbose=True).lines)
    assert f"CiliumNetworkPolicy default/rule1 ({STARWARS}:31): not selected, its selector is" in text


def test_of_many_sections_those_that_match_are_shown_first() -> None:
    sections = [f"  - fromEndpoints: [{{matchLabels: {{number: '{index}'}}}}]" for index in range(30)]
    repository = Repository()
    repository.import_documents(loads(MANY.format(sections="\n".join(sections)), "many.yaml"))
    source = End(_ship("empire", "ship", number="29"))
    text = _side(trace(repository, source, DEATHSTAR), "ingress")
    assert text.splitlines()[0].startswith("  * CiliumNetworkPolicy default/many spec.ingress[29] (many.yaml:")
    assert "18 more sections that select it" in text
    assert text.count(": selected") == 12
    whole = _side(trace(repository, source, DEATHSTAR, verbose=True), "ingress")
    assert whole.count(": selected") == 30


def test_labels_without_a_namespace_get_a_note() -> None:
    found = trace(_repository(), End(LabelSet.parse(["k8s:org=alliance"])), DEATHSTAR, "TCP", 80)
    assert "Note: the source has no label k8s:io.kubernetes.pod.namespace" in "\n".join(found.lines)
    assert "Note:" not in "\n".join(trace(_repository(), End(LabelSet.parse(["reserved:world"])), DEATHSTAR).lines)


@pytest.mark.parametrize(
    ("mode", "verdict", "told"),
    [("never", "allow", "the enforcement mode is never"), ("always", "deny", "isolated by the enforcement mode")],
)
def test_enforcement_modes_are_told(mode: str, verdict: str, told: str) -> None:
    found = trace(_repository(PolicySettings(enforcement=mode)), XWING, TIEFIGHTER, "TCP", 80)
    assert found.verdict == verdict
    assert told in "\n".join(found.lines)


def test_an_endpoint_is_asked_for_the_policy_that_it_has() -> None:
    """No resolution of its own, and nothing that endpoints are told of."""
    repository = _repository()
    repository.upsert_identities([Identity(300, DEATHSTAR.labels), Identity(301, XWING.labels)])
    repository.register_endpoint(1, 300)
    repository.register_endpoint(2, 301)
    repository.drain_changes()
    before = repository.counters.policies_rebuilt
    for _ in range(3):
        assert trace(repository, End(XWING.labels, 301), End(DEATHSTAR.labels, 300), "TCP", 80).verdict == "deny"
        assert trace(repository, TIEFIGHTER, End(DEATHSTAR.labels, 300), "TCP", 80).verdict == "allow"
    assert repository.counters.policies_rebuilt == before
    assert repository.drain_changes() == []


def test_requires_that_are_not_met_are_told() -> None:
    repository = Repository()
    section = "  - {fromRequires: [{matchLabels: {env: prod}}]}\n  - {fromEndpoints: [{}]}"
    repository.import_documents(loads(MANY.format(sections=section), "requires.yaml"))
    text = _side(trace(repository, XWING, DEATHSTAR), "ingress")
    assert "Found unsatisfied FromRequires constraint {env=prod, " in text
    assert "Label verdict: denied" in text
