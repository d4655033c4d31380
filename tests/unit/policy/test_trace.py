"""The explanation agrees with the engine and names rule, object, file and line."""

from __future__ import annotations

from pathlib import Path

from ciliate.labels import LabelSet
from ciliate.manifest import load
from ciliate.policy.importer import is_policy
from ciliate.policy.repository import Repository
from ciliate.policy.trace import trace

STARWARS = Path(__file__).parents[3] / "examples" / "scenarios" / "starwars.yaml"


def _ship(org: str, kind: str) -> LabelSet:
    labels = {"org": org, "class": kind, "io.kubernetes.pod.namespace": "default"}
    return LabelSet.from_mapping(labels)


def _repository() -> Repository:
    repository = Repository()
    repository.import_documents([item for item in load([STARWARS]) if is_policy(item.object)])
    return repository


def test_the_xwing_is_told_why() -> None:
    repository = _repository()
    known = set(repository.cache.members)
    found = trace(repository, _ship("alliance", "xwing"), _ship("empire", "deathstar"), "TCP", 80)
    assert found.verdict == "deny"
    text = "\n".join(found.lines)
    assert "CiliumNetworkPolicy default/rule1 spec.ingress[0]" in text
    assert "starwars.yaml:39): selected" in text
    assert "does not match" in text
    assert "Found no allow rule" in text
    assert found.lines[-1] == "Final verdict: DENIED"
    assert set(repository.cache.members) == known, "trial identities do not stay"


def test_the_tiefighter_is_told_which_rule_lets_it_land() -> None:
    repository = _repository()
    found = trace(repository, _ship("empire", "tiefighter"), _ship("empire", "deathstar"), "TCP", 80)
    assert found.verdict == "allow"
    assert str(repository.rule(found.rule)).startswith("CiliumNetworkPolicy default/rule1 spec.ingress[0]")
    assert "  1/1 rules selected" in found.lines
    assert found.lines[-1] == "Final verdict: ALLOWED"
    assert trace(repository, _ship("empire", "tiefighter"), _ship("empire", "deathstar"), "TCP", 81).verdict == "deny"
    assert trace(repository, _ship("empire", "deathstar"), _ship("alliance", "xwing")).verdict == "allow"
