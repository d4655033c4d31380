"""Selectors that ask for labels which no identity has: what they mean is seldom what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ciliate.labels import SOURCE_ANY, SOURCE_K8S, Label
from ciliate.policy.importer import PolicyObject
from ciliate.policy.model import Rule
from ciliate.policy.selector import Selector


def ignored_keys(item: PolicyObject, keeps: Callable[[Label], bool]) -> list[str]:
    """A line for each label key of the object's selectors that the identity filter (``keeps``) leaves out."""
    asked = {
        requirement.key
        for rule in item.rules
        for selector in _selectors(rule)
        for requirement in selector.requirements
        if requirement.source in (SOURCE_ANY, SOURCE_K8S)
    }
    title = f"{item.kind} {item.namespace}/{item.name}" if item.namespace else f"{item.kind} {item.name}"
    told = "is no part of identities (option labels): to policies no pod has it"
    return [f"{title}: label {key} {told}" for key in sorted(asked) if not keeps(Label(SOURCE_K8S, key))]


def _selectors(rule: Rule) -> Iterator[Selector]:
    yield rule.subject
    for section in (*(rule.ingress or ()), *(rule.egress or ())):
        yield from section.requires
        yield from (peer for peer in section.peers or () if isinstance(peer, Selector))
