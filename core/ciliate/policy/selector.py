"""Label selectors: what Kubernetes calls LabelSelector, with label sources (inventory PO-S02, PO-L01)."""

from __future__ import annotations

from typing import NamedTuple

from ciliate.labels import SOURCE_ANY, SOURCE_RESERVED, LabelSet

IN = "In"
NOT_IN = "NotIn"
EXISTS = "Exists"
DOES_NOT_EXIST = "DoesNotExist"
OPERATORS = (IN, NOT_IN, EXISTS, DOES_NOT_EXIST)
_ALL = "all"
"""The reserved label that every identity is said to have, though none carries it."""


class Requirement(NamedTuple):
    """One condition on the labels named ``key``; ``source`` ``any`` looks at every source."""

    source: str
    key: str
    operator: str
    values: tuple[str, ...] = ()

    @property
    def asks(self) -> bool:
        """True where labels without the key do not meet the condition."""
        return self.operator in (IN, EXISTS)

    def matches(self, labels: LabelSet) -> bool:
        """True where the labels meet the condition. An absent key meets NotIn, as Kubernetes says."""
        values = [
            label.value for label in labels if label.key == self.key and self.source in (SOURCE_ANY, label.source)
        ]
        if self.operator == EXISTS:
            return bool(values)
        if self.operator == DOES_NOT_EXIST:
            return not values
        found = any(value in self.values for value in values)
        return found if self.operator == IN else not found

    def __str__(self) -> str:
        name = self.key if self.source == SOURCE_ANY else f"{self.source}:{self.key}"
        if self.operator == IN and len(self.values) == 1:
            return f"{name}={self.values[0]}" if self.values[0] else name
        if self.operator in (IN, NOT_IN):
            return f"{name} {self.operator} [{', '.join(self.values)}]"
        return name if self.operator == EXISTS else f"!{name}"


class Selector(NamedTuple):
    """Requirements that must all be met; none at all matches everything. Sorted, so equal ones compare equal."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: LabelSet) -> bool:
        """True where every requirement is met."""
        return all(requirement.matches(labels) for requirement in self.requirements)

    def extended(self, *more: Requirement) -> Selector:
        """The same selector with further requirements."""
        return selector((*self.requirements, *more))

    def names(self, source: str, key: str = "") -> bool:
        """True where a requirement asks for the label ``source:key``, or for any of this source.

        A requirement that rules the label out does not name it.
        """
        return any(item.source == source and key in ("", item.key) and item.asks for item in self.requirements)

    def without_all(self) -> Selector:
        """The same, with what it says of ``reserved:all`` answered: every identity has it."""
        if not any((item.source, item.key) == (SOURCE_RESERVED, _ALL) for item in self.requirements):
            return self
        kept = [item for item in self.requirements if (item.source, item.key) != (SOURCE_RESERVED, _ALL)]
        if any(not item.asks for item in self.requirements if item not in kept):
            # no identity carries the label: asking for it matches none
            kept.append(Requirement(SOURCE_RESERVED, _ALL, EXISTS))
        return selector(tuple(kept))

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.requirements)) + "}"


def selector(requirements: tuple[Requirement, ...]) -> Selector:
    """A selector in canonical order, without repetitions."""
    return Selector(tuple(sorted(set(requirements))))


def equals(source: str, key: str, value: str = "") -> Requirement:
    """The requirement that label ``source:key`` has this value."""
    return Requirement(source, key, IN, (value,))


def reserved(name: str) -> Selector:
    """The selector of one reserved label."""
    return Selector((equals(SOURCE_RESERVED, name),))
