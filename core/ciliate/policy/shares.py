"""Which prefixes a node has to tell apart: those of rules that select an endpoint, within each namespace's share.

A rule that would take more than there is for its namespace is not admitted. The endpoints that it selects keep the
policy that they have, or get none; nobody else notices. It is asked again when room comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from ciliate.policy import bounds
from ciliate.policy.importer import PolicyObject
from ciliate.policy.model import Network, Rule, ServicePeer


class Share(msgspec.Struct, frozen=True):
    """What the policies of one namespace take; ``largest`` names the object with most prefixes."""

    namespace: str
    prefixes: int
    most_prefixes: int
    largest: str = ""


class Shares:
    """Rules that select an endpoint, and what they take. ``changes`` grows with every change of the prefixes."""

    def __init__(self) -> None:
        self.wanted: dict[Network, int] = {}
        """Prefixes that admitted rules name, with how many do; those that ipBlocks name are in ``places``, too."""
        self.places: dict[Network, int] = {}
        self.services: dict[ServicePeer, int] = {}
        self.refused: dict[Rule, str] = {}
        """Rules that are not admitted, and why."""
        self.changes = 0
        self._admitted: dict[Rule, Mapping[Network, bool]] = {}
        self._objects: dict[Rule, PolicyObject] = {}
        self._by_namespace: dict[str, dict[Network, int]] = {}

    def reason(self, namespace: str, new: Collection[Network], without: Iterable[Rule] = ()) -> str:
        """Why prefixes of a namespace are too many beside what there is ``without`` some rules; empty where not."""
        if not new:
            return ""
        gone = [rule for rule in without if rule in self._admitted]
        same = [rule for rule in gone if self._objects[rule].namespace == namespace]
        own = self._union(self._by_namespace.get(namespace, {}), new, same)
        if namespace and own > bounds.NAMESPACE_PREFIXES:
            return (
                f"makes {own} prefixes of namespace {namespace}, expected at most {bounds.NAMESPACE_PREFIXES} "
                "of one namespace in policies that select an endpoint of the node"
            )
        everyone = self._union(self.wanted, new, gone)
        if everyone > bounds.MAX_PREFIXES:
            return (
                f"makes {everyone} prefixes, expected at most {bounds.MAX_PREFIXES} in all policies that select "
                "an endpoint of the node"
            )
        return ""

    def _union(self, table: Mapping[Network, int], new: Collection[Network], gone: Iterable[Rule]) -> int:
        """How many prefixes there are in a table with new ones, and without those that some rules alone name."""
        lost = Counter(prefix for rule in gone for prefix in self._admitted[rule])
        left = sum(table[prefix] <= count and prefix not in new for prefix, count in lost.items())
        return len(table) + sum(prefix not in table for prefix in new) - left

    def admit(self, rule: Rule, item: PolicyObject) -> None:
        """A rule is in force from now on."""
        self.refused.pop(rule, None)
        prefixes = bounds.named(rule)
        if prefixes or service_peers(rule):
            self._objects[rule], self._admitted[rule] = item, prefixes
            self._count(rule, prefixes, item.namespace, 1)

    def refuse(self, rule: Rule, reason: str) -> None:
        """A rule selects an endpoint and cannot be in force."""
        self.refused[rule] = reason

    def drop(self, rule: Rule) -> None:
        """A rule selects nobody any more."""
        self.refused.pop(rule, None)
        prefixes = self._admitted.pop(rule, None)
        if prefixes is not None:
            self._count(rule, prefixes, self._objects.pop(rule).namespace, -1)

    def _count(self, rule: Rule, prefixes: Mapping[Network, bool], namespace: str, step: int) -> None:
        own = self._by_namespace.setdefault(namespace, {})
        for prefix, place in prefixes.items():
            add(self.wanted, prefix, step)
            add(own, prefix, step)
            if place:
                add(self.places, prefix, step)
        if not own:
            del self._by_namespace[namespace]
        for peer in service_peers(rule):
            add(self.services, peer, step)
        self.changes += 1

    def shares(self) -> list[Share]:
        """What each namespace takes, the greatest first; namespace "" stands for policies of the whole cluster."""
        largest: dict[str, tuple[int, str]] = {}
        sizes: dict[PolicyObject, set[Network]] = {}
        for rule, prefixes in self._admitted.items():
            if prefixes:
                sizes.setdefault(self._objects[rule], set()).update(prefixes)
        for item, found in sizes.items():
            largest[item.namespace] = max(largest.get(item.namespace, (0, "")), (len(found), item.title))
        made = [
            Share(name, len(own), bounds.NAMESPACE_PREFIXES if name else bounds.MAX_PREFIXES, largest[name][1])
            for name, own in self._by_namespace.items()
        ]
        return sorted(made, key=lambda share: -share.prefixes)


def service_peers(rule: Rule) -> list[ServicePeer]:
    """The services that a rule names."""
    sections = (*(rule.ingress or ()), *(rule.egress or ()))
    return [peer for section in sections for peer in section.peers or () if isinstance(peer, ServicePeer)]


def add(table: dict[Any, int], key: Any, step: int) -> None:
    """Count up or down; what comes to nothing goes."""
    count = table.get(key, 0) + step
    if count:
        table[key] = count
    else:
        del table[key]
