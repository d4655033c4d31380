"""The repository: policy objects in, endpoint policies out, and only what changed of them.

An import is all or nothing. A rule change touches the policies of the identities that the changed rules select; an
identity that comes or goes touches one peer's entries in the policies whose selectors mean it (inventory 3.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from ipaddress import IPv4Address, IPv6Address

import msgspec

from ciliate.document import Document
from ciliate.identity.numeric import RESERVED, Identity, reserved_identity
from ciliate.labels import NAMESPACE, Label
from ciliate.policy import bounds
from ciliate.policy.cautions import unserved
from ciliate.policy.endpointpolicies import Counters, EndpointDelta, EndpointPolicies, EndpointPolicy
from ciliate.policy.importer import PolicyObject, carry, parse_documents, quiet_collector
from ciliate.policy.mapstate import MAX_ENTRIES
from ciliate.policy.model import Network, Rule, RuleOrigin
from ciliate.policy.porttable import NamedPorts, Proxies
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.resolve import NO_NAMES, Context, SharedPolicy
from ciliate.policy.rulebook import Rulebook
from ciliate.policy.selectors import Cached, SelectorCache, Service
from ciliate.policy.shares import Shares, service_peers

__all__ = ["EndpointDelta", "EndpointPolicy", "ImportResult", "PolicyError", "PolicySettings", "Problem", "Repository"]

ENFORCEMENT = ("default", "always", "never")


class PolicySettings(msgspec.Struct, frozen=True):
    """``enforcement`` default, always or never (PO-R07); ``allow_localhost``: the node may always reach its pods;
    ``cluster``: this cluster's name; ``proxies``: (layer-7 parser, proxy port) pairs that are active;
    ``proxies_down``: (parser, why) pairs of those that are there and do not serve now."""

    enforcement: str = "default"
    allow_localhost: bool = True
    cluster: str = "default"
    proxies: tuple[tuple[str, int], ...] = ()
    proxies_down: tuple[tuple[str, str], ...] = ()


class ImportResult(msgspec.Struct, frozen=True):
    """What an import did: counts of objects, the new revision, and how many endpoints its rules select."""

    revision: int
    added: int
    replaced: int
    unchanged: int
    affected: int = 0


class Repository:
    """Every policy, and the policies of registered endpoints. Not thread-safe: it belongs to one loop."""

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self.settings = settings or PolicySettings()
        if self.settings.enforcement not in ENFORCEMENT:
            given = self.settings.enforcement
            raise ValueError(f"enforcement: {given!r} given, expected one of {', '.join(ENFORCEMENT)}")
        self.revision = 1
        self.cache = SelectorCache()
        self._book = Rulebook()
        self._subjects: dict[Cached, dict[Rule, None]] = {}
        self._rule_subjects: dict[Rule, Cached] = {}
        self._peer_names: dict[int, NamedPorts] = {}
        self._unserved: tuple[int, dict[str, list[PolicyObject]]] | None = None
        self._shares = Shares()
        self._service_changes = 0
        self._endpoints = EndpointPolicies(self._context(), self._rules_for, self._used)
        for number in RESERVED:
            self.cache.upsert(reserved_identity(number))

    def _context(self) -> Context:
        settings = self.settings
        refused = self._shares.refused
        return Context(
            self.cache, settings.enforcement, settings.allow_localhost, self.proxies, self.peer_names, refused
        )

    @property
    def proxies(self) -> Proxies:
        """Which layer-7 parsers are served."""
        return Proxies(self.settings.proxies, self.settings.proxies_down)

    @property
    def counters(self) -> Counters:
        """How much work was done so far."""
        return self._endpoints.counters

    def peer_names(self, number: int) -> NamedPorts:
        """Named ports of an identity's pods, as told."""
        return self._peer_names.get(number, NO_NAMES)

    # policies

    def import_documents(self, documents: Sequence[Document], source: str = "api") -> ImportResult:
        """Add or replace objects, all or none; PolicyError lists every problem. Unchanged objects cost nothing."""
        return self.import_objects(parse_documents(documents, self.settings.cluster, source))

    def import_objects(self, objects: Iterable[PolicyObject], bounded: bool = True) -> ImportResult:
        """Add or replace objects that were parsed already.

        PolicyError where one takes too much. Without ``bounded`` that concerns but the endpoints that it selects: they
        keep the policy that they have.
        """
        with quiet_collector():
            found = list(objects)
            if bounded:
                self._check(found)
            result = self._import_objects(found)
            self._admit_waiting()
            return result

    def _check(self, found: list[PolicyObject]) -> None:
        """PolicyError where objects take more than there may be for one, for its namespace, or beside others."""
        replaced = [
            rule for item in found if item.ref in self._book.objects for rule in self._book.objects[item.ref].rules
        ]
        problems = []
        together: dict[str, set[Network]] = {}
        largest: dict[str, tuple[int, PolicyObject]] = {}
        for item in found:
            rules, policies = self._selecting(item)
            if rules and not item.excess:
                prefixes = {prefix for rule in rules for prefix in bounds.named(rule)}
                together.setdefault(item.namespace, set()).update(prefixes)
                if len(prefixes) > largest.get(item.namespace, (0, item))[0]:
                    largest[item.namespace] = len(prefixes), item
            if reason := item.excess or self._crowding(rules, policies):
                problems.append(item.wrong(reason))
        for namespace, prefixes in together.items():
            if reason := self._shares.reason(namespace, prefixes, replaced):
                problems.append(largest[namespace][1].wrong(reason))
        if problems:
            raise PolicyError(problems)

    def _selecting(self, item: PolicyObject) -> tuple[list[Rule], set[SharedPolicy]]:
        """Rules of an object that name prefixes and select an endpoint, and the policies that they belong to."""
        rules, policies = [], set[SharedPolicy]()
        for rule in item.rules:
            if bounds.named(rule):
                subject = self.cache.acquire(rule.subject)
                selected = self._endpoints.selected(subject)
                self.cache.release(subject)
                if selected:
                    rules.append(rule)
                    policies.update(selected)
        return rules, policies

    def _crowding(self, rules: Iterable[Rule], own: Collection[SharedPolicy]) -> str:
        """Why new prefixes of rules would take too many entries in the policies of others; empty where they do not.

        Whoever means a wider prefix needs entries for each that somebody names within it.
        """
        new = {prefix for rule in rules for prefix in bounds.named(rule)} - self._shares.wanted.keys()
        if not new:
            return ""
        more = Counter[SharedPolicy]()
        for prefix in new:
            for cached in self.cache.around(prefix):
                for policy in cached.users:
                    if policy not in own:
                        more[policy] += policy.weight(cached)
        for policy, count in more.items():
            if policy.size <= MAX_ENTRIES < policy.size + count:
                member = self.cache.members.get(policy.identity)
                namespace = member.labels.get(NAMESPACE) if member is not None else ""
                return (
                    f"names {len(new)} prefixes that take {count} entries in the policy of identity {policy.identity} "
                    f"(namespace {namespace or '-'}), expected at most {MAX_ENTRIES - policy.size}"
                )
        total = sum(count * self._endpoints.count((policy,)) for policy, count in more.items())
        if total > bounds.FOREIGN_ENTRIES:
            return (
                f"names {len(new)} prefixes that take {total} entries in policies of endpoints that it does not "
                f"select, expected at most {bounds.FOREIGN_ENTRIES}"
            )
        return ""

    def _used(self, rule: Rule, used: bool) -> None:
        """A rule selects an endpoint from now on, or none any more."""
        if not used:
            self._shares.drop(rule)
            return
        item = self._book.object_of(rule)
        if not item.excess and not bounds.named(rule) and not service_peers(rule):
            return
        reason = item.excess or self._shares.reason(item.namespace, bounds.named(rule))
        if reason:
            self._shares.refuse(rule, f"{item.title} {reason}")
        else:
            self._shares.admit(rule, item)

    def _admit_waiting(self) -> None:
        """Rules that were refused may have room by now."""
        for rule in list(self._shares.refused):
            item = self._book.object_of(rule)
            if not item.excess and not self._shares.reason(item.namespace, bounds.named(rule)):
                self._shares.admit(rule, item)
                self._endpoints.mark(self._endpoints.selected(self._rule_subjects[rule]))

    @property
    def shares(self) -> Shares:
        """What policies take, by namespace, and which rules are not in force because they take too much."""
        return self._shares

    def settle_one(self) -> bool:
        """Work out one policy of which something changed; False where there is none. `drain_changes` does all."""
        return self._endpoints.settle_one()

    def _import_objects(self, objects: Iterable[PolicyObject]) -> ImportResult:
        self.counters.imports += 1
        added = replaced = unchanged = 0
        touched: dict[SharedPolicy, None] = {}
        for item in objects:
            old = self._book.objects.get(item.ref)
            if old is not None and old.document.object == item.document.object:
                unchanged += 1
                old.document = item.document
                continue
            if old is not None:
                replaced += 1
                self._withdraw(old, touched)
            else:
                added += 1
            self._enter(item, old, touched)
        self._endpoints.mark(touched)
        if added or replaced:
            self.revision += 1
        return ImportResult(self.revision, added, replaced, unchanged, self._endpoints.count(touched))

    def labelled(self, wanted: Iterable[Label]) -> list[tuple[PolicyObject, list[str]]]:
        """The objects with rules that carry every wanted label, and the fields of these rules.

        No field: the object has no rule, and carries them itself.
        """
        asked = list(wanted)
        found = []
        for item in self._book.objects.values():
            paths = [path for path, labels in item.labels_by_rule().items() if carry(labels, asked)]
            if paths:
                found.append((item, paths if item.rules else []))
        return found

    def delete(self, refs: Iterable[str] = (), *, everything: bool = False) -> int:
        """Delete objects by reference, or all; returns how many there were."""
        doomed = [self._book.objects[ref] for ref in refs if ref in self._book.objects]
        if everything:
            doomed = list(self._book.objects.values())
        touched: dict[SharedPolicy, None] = {}
        for item in dict.fromkeys(doomed):
            self._withdraw(item, touched)
        self._book.forget(doomed)
        self._endpoints.mark(touched)
        self._admit_waiting()
        if doomed or everything:
            self.revision += 1
        return len(doomed)

    def objects(self) -> list[PolicyObject]:
        """Every policy object, in the order of import."""
        return list(self._book.objects.values())

    def object_of(self, rule: Rule) -> PolicyObject:
        """The object that a rule in force belongs to."""
        return self._book.object_of(rule)

    def rule(self, number: int) -> RuleOrigin | None:
        """Where the section of this number comes from; None for 0 and for numbers no longer in use."""
        return self._book.rule(number)

    def _enter(self, item: PolicyObject, old: PolicyObject | None, touched: dict[SharedPolicy, None]) -> None:
        self._book.enter(item, old)
        for rule in item.rules:
            subject = self.cache.acquire(rule.subject)
            self._subjects.setdefault(subject, {})[rule] = None
            self._rule_subjects[rule] = subject
            for policy in self._endpoints.selected(subject):
                self._endpoints.add_rule(policy, rule)
                touched[policy] = None

    def _withdraw(self, item: PolicyObject, touched: dict[SharedPolicy, None]) -> None:
        for rule in item.rules:
            subject = self._rule_subjects.pop(rule)
            for policy in self._endpoints.selected(subject):
                self._endpoints.remove_rule(policy, rule)
                touched[policy] = None
            rules = self._subjects[subject]
            del rules[rule]
            if not rules:
                del self._subjects[subject]
            self._book.withdraw(rule)
            self.cache.release(subject)

    def _rules_for(self, number: int) -> dict[Rule, None]:
        """The rules that select an identity."""
        member = self.cache.members.get(number)
        matching = self.cache.matching(member) if member is not None else []
        return {rule: None for cached in matching for rule in self._subjects.get(cached, ())}

    def unserved(self) -> dict[str, list[PolicyObject]]:
        """The policies that count on a proxy which is not active, by what is to be told of it."""
        if self._unserved is None or self._unserved[0] != self.revision:
            found: dict[str, dict[str, PolicyObject]] = {}
            for item in self._book.objects.values():
                for _, text in unserved(item, self.proxies):
                    found.setdefault(text, {})[item.ref] = item
            self._unserved = (self.revision, {text: list(items.values()) for text, items in found.items()})
        return self._unserved[1]

    # prefixes and services

    def cidrs(self) -> set[Network]:
        """Every prefix that policies name, exceptions and service addresses included, whomever they select."""
        found = set(self._book.prefixes)
        for peer in self._book.services:
            found |= self.cache.service_addresses(peer)
        return found

    def pod_cidrs(self) -> set[Network]:
        """Those of `cidrs` that Kubernetes ipBlocks name."""
        return set(self._book.pod_prefixes)

    @property
    def prefix_changes(self) -> int:
        """Grows whenever `wanted_cidrs` or `wanted_places` may have changed."""
        return self._shares.changes + self._service_changes

    def wanted_cidrs(self) -> set[Network]:
        """Every prefix that rules name which select an endpoint: each needs an identity."""
        found = set(self._shares.wanted)
        for peer in self._shares.services:
            found |= self.cache.service_addresses(peer)
        return found

    def wanted_places(self) -> set[Network]:
        """Those of `wanted_cidrs` that Kubernetes ipBlocks name: each needs to be a place, too."""
        return set(self._shares.places)

    def set_services(self, services: Mapping[tuple[str, str], Service]) -> None:
        """Tell every service without selector, by (namespace, name), with its endpoints' addresses (PO-S11)."""
        self.cache.services = dict(services)
        self._service_changes += 1
        for cached, numbers in self.cache.services_changed():
            for number in numbers:
                self._stale(number, [cached])

    # identities

    def upsert_identities(self, identities: Iterable[Identity]) -> None:
        """Add or change identities: pods of the cluster, prefixes, whatever a packet may come from."""
        for identity in identities:
            known = identity.id in self.cache.members
            left, entered = self.cache.upsert(identity)
            self._moved(identity.id, left, entered)
            if not known and identity.id in self.cache.hosts:
                self._endpoints.stale(identity.id, self._endpoints.policies)

    def remove_identities(self, numbers: Iterable[int]) -> None:
        """Forget identities."""
        for number in numbers:
            self._moved(number, self.cache.remove(number), [])

    def add_places(self, places: Mapping[int, Network | None]) -> None:
        """Know prefixes that ipBlocks name by their numbers, None: addresses that are not known (``places``)."""
        for number, prefix in places.items():
            self._stale_place(number, self.cache.add_place(number, prefix))

    def remove_places(self, numbers: Iterable[int]) -> None:
        """Forget places."""
        for number in numbers:
            self._stale_place(number, self.cache.remove_place(number))

    def place_of(self, address: IPv4Address | IPv6Address) -> int:
        """The place of a pod's or node's address; 0 where no ipBlock names anything around it."""
        return self.cache.places.of(address)

    def set_peer_ports(self, number: int, names: NamedPorts) -> None:
        """Tell the named ports of an identity's pods, for port names on egress."""
        if self._peer_names.get(number, NO_NAMES) != names:
            self._peer_names[number] = names
            member = self.cache.members.get(number)
            self._stale(number, self.cache.matching(member) if member is not None else [])
            policies = self._endpoints.policies
            self._endpoints.stale(number, [item for item in policies if item.sides is not None and item.sides[1].named])

    def _moved(self, number: int, left: list[Cached], entered: list[Cached]) -> None:
        if self._endpoints.has(number) and any(cached in self._subjects for cached in (*left, *entered)):
            self._endpoints.reselect(number)
            self._admit_waiting()
        self._stale(number, [*left, *entered])

    def _stale(self, number: int, selectors: Iterable[Cached]) -> None:
        for cached in selectors:
            self._endpoints.stale(number, cached.users)

    def _stale_place(self, number: int, selectors: Iterable[Cached]) -> None:
        for cached in selectors:
            self._endpoints.stale_place(number, cached.users)

    # endpoints

    def register_endpoint(self, ep_id: int, identity: int, named_ports: NamedPorts | None = None) -> None:
        """Keep a policy for an endpoint from now on; again with another identity moves it there.

        Raises KeyError where the identity is unknown.
        """
        if identity not in self.cache.members:
            raise KeyError(f"identity {identity}: expected to be known before an endpoint has it")
        self._endpoints.register(ep_id, identity, named_ports or NO_NAMES)
        self._admit_waiting()

    def unregister_endpoint(self, ep_id: int) -> bool:
        """Forget an endpoint; False where it was unknown."""
        found = self._endpoints.unregister(ep_id)
        self._admit_waiting()
        return found

    def resolve(self, ep_id: int) -> EndpointPolicy:
        """The whole policy of an endpoint, as it is now; KeyError where it is not registered."""
        return self._endpoints.resolve(ep_id, self.revision)

    def drain_changes(self) -> list[EndpointDelta]:
        """What changed since it was last told, for those endpoints alone in whose policy something did."""
        return self._endpoints.drain_changes(self.revision)

    def policy_of(self, ep_id: int) -> SharedPolicy | None:
        """The policy of an endpoint as it was last resolved, with the rules that select it; None where unknown."""
        return self._endpoints.of(ep_id)

    def heaviest(self, ep_id: int) -> str:
        """The object that most entries of an endpoint's policy come from; empty where there is none."""
        policy = self._endpoints.of(ep_id)
        if policy is None or not policy.rules:
            return ""
        return self._book.object_of(max(policy.rules, key=bounds.weight)).title

    def shared_policy(self, ep_id: int) -> SharedPolicy:
        """The resolved policy of an endpoint, for explanations; KeyError where it is not registered."""
        return self._endpoints.shared(ep_id)

    def preview(self, identity: int, names: NamedPorts, fresh: bool = True) -> AbstractContextManager[SharedPolicy]:
        """The policy that an endpoint of this identity would have, for as long as it is looked at.

        Without ``fresh`` it is the one that endpoints have, where there are any: that costs nothing.
        """
        return self._endpoints.preview(identity, names, fresh)

    def reconfigure(self, settings: PolicySettings) -> None:
        """Change the settings; every policy is resolved anew."""
        self.settings = settings
        self._endpoints.context = self._context()
        self._endpoints.mark(self._endpoints.policies)
        self.revision += 1
