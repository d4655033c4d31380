"""The rulebook: policy objects, the numbers of their sections, and the prefixes and services that they name."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ciliate.labels import LabelSet
from ciliate.policy.importer import PolicyObject
from ciliate.policy.model import CidrPeer, Network, Rule, RuleOrigin, Section, ServicePeer
from ciliate.policy.shares import add


class Rulebook:
    """Every policy object in force. Sections have numbers, which map-state entries carry and which lead back here."""

    def __init__(self) -> None:
        self.objects: dict[str, PolicyObject] = {}
        self.services: dict[ServicePeer, int] = {}
        """How many sections name services so."""
        self.prefixes: dict[Network, int] = {}
        self.pod_prefixes: dict[Network, int] = {}
        """Prefixes of CIDRs and exceptions, and those of ipBlocks, with how many sections name them."""
        self._numbers: dict[tuple[str, object], int] = {}
        self._origins: dict[int, tuple[PolicyObject, Section]] = {}
        self._rule_objects: dict[Rule, PolicyObject] = {}
        self._next_number = 1

    def enter(self, item: PolicyObject, old: PolicyObject | None) -> None:
        """Take in an object, in place of ``old`` whose rules were withdrawn; its rules become numbered ones."""
        stale = {section.number for section in old.sections()} if old is not None else set()
        item.rules = tuple(self._numbered(item, rule) for rule in item.rules)
        for number in stale - {section.number for section in item.sections()}:
            self._drop_number(number)
        self.objects[item.ref] = item
        for rule in item.rules:
            self._rule_objects[rule] = item
            self._count(rule, 1)

    def withdraw(self, rule: Rule) -> None:
        """A rule of an object is no longer in force."""
        del self._rule_objects[rule]
        self._count(rule, -1)

    def forget(self, items: Iterable[PolicyObject]) -> None:
        """Let go of objects whose rules were withdrawn, and of the numbers of their sections."""
        for item in items:
            self.objects.pop(item.ref, None)
            for section in item.sections():
                self._drop_number(section.number)

    def object_of(self, rule: Rule) -> PolicyObject:
        """The object that a rule belongs to."""
        return self._rule_objects[rule]

    def rule(self, number: int) -> RuleOrigin | None:
        """Where the section of this number comes from; None for 0 and for numbers no longer in use."""
        found = self._origins.get(number)
        if found is None:
            return None
        item, section = found
        document = item.document
        line = document.line_of(section.path)
        labels = LabelSet(item.labels_of(section.path))
        return RuleOrigin(item.kind, item.namespace, item.name, section.path, document.file, line, labels)

    def _numbered(self, item: PolicyObject, rule: Rule) -> Rule:
        sides = [
            None if found is None else tuple(self._number(item, section) for section in found)
            for found in (rule.ingress, rule.egress)
        ]
        return Rule(rule.subject, sides[0], sides[1])

    def _number(self, item: PolicyObject, section: Section) -> Section:
        # the same section of the same object keeps its number over replacements
        name = (item.ref, section.content)
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = self._next_number
            self._next_number += 1
        numbered = msgspec.structs.replace(section, number=number)
        self._origins[number] = (item, numbered)
        return numbered

    def _drop_number(self, number: int) -> None:
        found = self._origins.pop(number, None)
        if found is not None:
            self._numbers.pop((found[0].ref, found[1].content), None)

    def _count(self, rule: Rule, step: int) -> None:
        for section in (*(rule.ingress or ()), *(rule.egress or ())):
            for peer in section.peers or ():
                if isinstance(peer, CidrPeer):
                    for prefix in (peer.cidr, *peer.exclude):
                        add(self.prefixes, prefix, step)
                        if peer.pods:
                            add(self.pod_prefixes, prefix, step)
                elif isinstance(peer, ServicePeer):
                    add(self.services, peer, step)
