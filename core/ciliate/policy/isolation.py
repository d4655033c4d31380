"""Which policies put an endpoint under enforcement: the reason why what no rule allows is dropped."""

from __future__ import annotations

from ciliate.policy.importer import PolicyObject
from ciliate.policy.repository import Repository
from ciliate.policy.resolve import SharedPolicy

NAMED = 3
"""How many policies are named before the rest is only counted."""


def origin(item: PolicyObject) -> str:
    """A policy object with its kind and, where known, file and line."""
    place = f" ({item.document.file}:{item.document.line})" if item.document.file else ""
    name = f"{item.namespace}/{item.name}" if item.namespace else item.name
    return f"{item.kind} {name}{place}"


def isolating(repository: Repository, policy: SharedPolicy, direction: int) -> list[str]:
    """The objects with a section for this direction (0 ingress, 1 egress) that select the policy's endpoints."""
    items: dict[str, PolicyObject] = {}
    for rule in policy.rules:
        if (rule.egress if direction else rule.ingress) is not None:
            item = repository.object_of(rule)
            items[item.ref] = item
    names = [origin(item) for item in items.values()]
    return names if len(names) <= NAMED else [*names[:NAMED], f"{len(names) - NAMED} more"]
