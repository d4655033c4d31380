"""The repository: policy objects in, endpoint policies out, and only what changed of them.

An import is all or nothing. A rule change touches the policies of the identities that the changed rules select; an
identity that comes or goes touches one peer's entries in the policies whose selectors mean it (inventory 3.4).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import msgspec
from pyroaring import BitMap

from ciliate.document import Document
from ciliate.identity.numeric import INIT, RESERVED, Identity, reserved_identity
from ciliate.labels import LabelSet
from ciliate.policy.importer import PolicyObject, parse_documents, quiet_collector
from ciliate.policy.mapstate import PolicyEntry, PolicyKey
from ciliate.policy.model import CidrPeer, Network, Rule, RuleOrigin, Section, ServicePeer
from ciliate.policy.porttable import NamedPorts, Proxies
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.resolve import NO_NAMES, Changes, Context, NamesKey, SharedPolicy, names_key
from ciliate.policy.selectors import Cached, SelectorCache, Service

__all__ = ["EndpointDelta", "EndpointPolicy", "ImportResult", "PolicyError", "PolicySettings", "Problem", "Repository"]

ENFORCEMENT = ("default", "always", "never")


class PolicySettings(msgspec.Struct, frozen=True):
    """``enforcement`` default, always or never (PO-R07); ``allow_localhost``: the node may always reach its pods;
    ``cluster``: this cluster's name; ``proxies``: (layer-7 parser, proxy port) pairs that are running."""

    enforcement: str = "default"
    allow_localhost: bool = True
    cluster: str = "default"
    proxies: tuple[tuple[str, int], ...] = ()


class ImportResult(msgspec.Struct, frozen=True):
    """What an import did: counts of objects, the new revision, and how many endpoints its rules select."""

    revision: int
    added: int
    replaced: int
    unchanged: int
    affected: int = 0


class EndpointPolicy(msgspec.Struct, frozen=True):
    """The whole policy of one endpoint."""

    revision: int
    enforce_ingress: bool
    enforce_egress: bool
    map_state: dict[PolicyKey, PolicyEntry]


class EndpointDelta(msgspec.Struct, frozen=True):
    """What changed in one endpoint's policy since it was last handed out."""

    ep_id: int
    upserts: dict[PolicyKey, PolicyEntry]
    deletes: set[PolicyKey]
    enforce_ingress: bool
    enforce_egress: bool
    revision: int


class Counters(msgspec.Struct):
    """Witnesses of how much work was done."""

    imports: int = 0
    policies_rebuilt: int = 0
    peers_refreshed: int = 0
    endpoints_touched: int = 0


class _Endpoint:
    """A registered endpoint. ``pending`` is what it has not been told yet; ``fresh``: it was told nothing at all."""

    __slots__ = ("enforced", "fresh", "id", "pending", "policy")

    def __init__(self, ep_id: int, policy: SharedPolicy) -> None:
        self.id = ep_id
        self.policy = policy
        self.pending: Changes = {}
        self.fresh = True
        self.enforced = (False, False)


PolicyName = tuple[int, NamesKey]


class Repository:
    """Every policy, and the policies of registered endpoints. Not thread-safe: it belongs to one loop."""

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self.settings = settings or PolicySettings()
        if self.settings.enforcement not in ENFORCEMENT:
            given = self.settings.enforcement
            raise ValueError(f"enforcement: {given!r} given, expected one of {', '.join(ENFORCEMENT)}")
        self.revision = 1
        self.counters = Counters()
        self.cache = SelectorCache()
        self._objects: dict[str, PolicyObject] = {}
        self._numbers: dict[tuple[str, object], int] = {}
        self._origins: dict[int, tuple[PolicyObject, Section]] = {}
        self._next_number = 1
        self._subjects: dict[Cached, dict[Rule, None]] = {}
        self._rule_subjects: dict[Rule, Cached] = {}
        self._rule_objects: dict[Rule, PolicyObject] = {}
        self._policies: dict[PolicyName, SharedPolicy] = {}
        self._by_identity: dict[int, dict[SharedPolicy, None]] = {}
        self._local = BitMap()
        self._members: dict[SharedPolicy, dict[int, _Endpoint]] = {}
        self._endpoints: dict[int, _Endpoint] = {}
        self._prefixes: dict[Network, int] = {}
        self._pod_prefixes: dict[Network, int] = {}
        self._service_peers: dict[ServicePeer, int] = {}
        self._peer_names: dict[int, NamedPorts] = {}
        self._dirty: dict[SharedPolicy, None] = {}
        self._refresh_context()
        for number in RESERVED:
            self.cache.upsert(reserved_identity(number))

    def _refresh_context(self) -> None:
        self._context = Context(
            self.cache, self.settings.allow_localhost, Proxies(self.settings.proxies), self.peer_names
        )

    def peer_names(self, number: int) -> NamedPorts:
        """Named ports of an identity's pods, as told."""
        return self._peer_names.get(number, NO_NAMES)

    # policies

    def import_documents(self, documents: Sequence[Document], source: str = "api") -> ImportResult:
        """Add or replace objects, all or none; PolicyError lists every problem. Unchanged objects cost nothing."""
        return self.import_objects(parse_documents(documents, self.settings.cluster, source))

    def import_objects(self, objects: Iterable[PolicyObject]) -> ImportResult:
        """Add or replace objects that were parsed already."""
        with quiet_collector():
            return self._import_objects(objects)

    def _import_objects(self, objects: Iterable[PolicyObject]) -> ImportResult:
        self.counters.imports += 1
        added = replaced = unchanged = 0
        touched: dict[SharedPolicy, None] = {}
        for item in objects:
            old = self._objects.get(item.ref)
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
        self._mark(touched)
        if added or replaced:
            self.revision += 1
        return ImportResult(self.revision, added, replaced, unchanged, self._endpoint_count(touched))

    def delete(
        self,
        refs: Iterable[str] = (),
        *,
        labels: LabelSet | None = None,
        everything: bool = False,
    ) -> int:
        """Delete objects by reference, by labels that they must carry, or all; returns how many there were."""
        doomed = [self._objects[ref] for ref in refs if ref in self._objects]
        if labels is not None:
            doomed.extend(item for item in self._objects.values() if all(label in item.labels for label in labels))
        if everything:
            doomed = list(self._objects.values())
        touched: dict[SharedPolicy, None] = {}
        for item in dict.fromkeys(doomed):
            self._withdraw(item, touched)
            del self._objects[item.ref]
        self._forget_numbers(doomed)
        self._mark(touched)
        if doomed or everything:
            self.revision += 1
        return len(doomed)

    def objects(self) -> list[PolicyObject]:
        """Every policy object, in the order of import."""
        return list(self._objects.values())

    def object_of(self, rule: Rule) -> PolicyObject:
        """The object that a rule in force belongs to."""
        return self._rule_objects[rule]

    def rule(self, number: int) -> RuleOrigin | None:
        """Where the section of this number comes from; None for 0 and for numbers no longer in use."""
        found = self._origins.get(number)
        if found is None:
            return None
        item, section = found
        document = item.document
        line = document.line_of(section.path)
        return RuleOrigin(item.kind, item.namespace, item.name, section.path, document.file, line, item.labels)

    def policy_of(self, ep_id: int) -> SharedPolicy | None:
        """The policy of an endpoint as it was last resolved, with the rules that select it; None where unknown."""
        endpoint = self._endpoints.get(ep_id)
        return endpoint.policy if endpoint is not None else None

    def _enter(self, item: PolicyObject, old: PolicyObject | None, touched: dict[SharedPolicy, None]) -> None:
        stale = {section.number for section in old.sections()} if old is not None else set()
        item.rules = tuple(self._numbered(item, rule) for rule in item.rules)
        for number in stale - {section.number for section in item.sections()}:
            self._drop_number(number)
        self._objects[item.ref] = item
        for rule in item.rules:
            subject = self.cache.acquire(rule.subject)
            self._subjects.setdefault(subject, {})[rule] = None
            self._rule_subjects[rule] = subject
            self._rule_objects[rule] = item
            self._count_prefixes(rule, 1)
            for policy in self._selected(subject):
                policy.rules[rule] = None
                touched[policy] = None

    def _withdraw(self, item: PolicyObject, touched: dict[SharedPolicy, None]) -> None:
        for rule in item.rules:
            subject = self._rule_subjects.pop(rule)
            del self._rule_objects[rule]
            for policy in self._selected(subject):
                policy.rules.pop(rule, None)
                touched[policy] = None
            rules = self._subjects[subject]
            del rules[rule]
            if not rules:
                del self._subjects[subject]
            self._count_prefixes(rule, -1)
            self.cache.release(subject)

    def _selected(self, subject: Cached) -> list[SharedPolicy]:
        """Policies of local identities that a subject selector selects."""
        if not self._local:
            return []
        return [policy for number in subject.members & self._local for policy in self._by_identity[number]]

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

    def _forget_numbers(self, items: Iterable[PolicyObject]) -> None:
        for item in items:
            for section in item.sections():
                self._drop_number(section.number)

    # prefixes and services

    def cidrs(self) -> set[Network]:
        """Every prefix that policies name, exceptions and service addresses included: each needs an identity."""
        found = set(self._prefixes)
        for peer in self._service_peers:
            found |= self.cache.service_addresses(peer)
        return found

    def pod_cidrs(self) -> set[Network]:
        """Prefixes that Kubernetes ipBlocks name: each needs to be a place, too."""
        return set(self._pod_prefixes)

    def _count_prefixes(self, rule: Rule, step: int) -> None:
        for section in (*(rule.ingress or ()), *(rule.egress or ())):
            for peer in section.peers or ():
                if isinstance(peer, CidrPeer):
                    for prefix in (peer.cidr, *peer.exclude):
                        _count(self._prefixes, prefix, step)
                        if peer.pods:
                            _count(self._pod_prefixes, prefix, step)
                elif isinstance(peer, ServicePeer):
                    _count(self._service_peers, peer, step)

    def set_services(self, services: Mapping[tuple[str, str], Service]) -> None:
        """Tell every service without selector, by (namespace, name), with its endpoints' addresses (PO-S11)."""
        self.cache.services = dict(services)
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
                self._stale_everywhere(identity.id, self._policies.values())

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
            named = [policy for policy in self._policies.values() if policy.sides is not None and policy.sides[1].named]
            self._stale_everywhere(number, named)

    def _moved(self, number: int, left: list[Cached], entered: list[Cached]) -> None:
        if number in self._local:
            for cached in (*left, *entered):
                if cached in self._subjects:
                    self._reselect(number)
                    break
        self._stale(number, [*left, *entered])

    def _stale_everywhere(self, number: int, policies: Iterable[SharedPolicy]) -> None:
        for policy in policies:
            policy.stale[number] = None
            self._dirty[policy] = None

    def _stale(self, number: int, selectors: Iterable[Cached]) -> None:
        for cached in selectors:
            for policy in cached.users:
                policy.stale[number] = None
                self._dirty[policy] = None

    def _stale_place(self, number: int, selectors: Iterable[Cached]) -> None:
        for cached in selectors:
            for policy in cached.users:
                policy.stale_places[number] = None
                self._dirty[policy] = None

    def _reselect(self, number: int) -> None:
        for policy in self._by_identity.get(number, ()):
            policy.rules = self._rules_for(number)
            self._mark({policy: None})

    def _rules_for(self, number: int) -> dict[Rule, None]:
        member = self.cache.members.get(number)
        matching = self.cache.matching(member) if member is not None else []
        return {rule: None for cached in matching for rule in self._subjects.get(cached, ())}

    # endpoints

    def register_endpoint(self, ep_id: int, identity: int, named_ports: NamedPorts | None = None) -> None:
        """Keep a policy for an endpoint from now on; again with another identity moves it there.

        Raises KeyError where the identity is unknown.
        """
        if identity not in self.cache.members:
            raise KeyError(f"identity {identity}: expected to be known before an endpoint has it")
        policy = self._policy(identity, named_ports or NO_NAMES)
        old = self._endpoints.get(ep_id)
        if old is not None:
            if old.policy is policy:
                return
            self._leave(old)
        endpoint = self._endpoints[ep_id] = _Endpoint(ep_id, policy)
        self._members[policy][ep_id] = endpoint

    def unregister_endpoint(self, ep_id: int) -> bool:
        """Forget an endpoint; False where it was unknown."""
        endpoint = self._endpoints.pop(ep_id, None)
        if endpoint is None:
            return False
        self._leave(endpoint)
        return True

    def _policy(self, identity: int, names: NamedPorts) -> SharedPolicy:
        key = _policy_name(identity, names)
        policy = self._policies.get(key)
        if policy is None:
            policy = self._policies[key] = SharedPolicy(identity, names)
            policy.rules = self._rules_for(identity)
            self._members[policy] = {}
            self._by_identity.setdefault(identity, {})[policy] = None
            self._local.add(identity)
        return policy

    def _leave(self, endpoint: _Endpoint) -> None:
        policy = endpoint.policy
        members = self._members[policy]
        members.pop(endpoint.id, None)
        if members:
            return
        del self._members[policy], self._policies[_policy_name(policy.identity, policy.names)]
        self._dirty.pop(policy, None)
        policy.close(self.cache)
        same = self._by_identity[policy.identity]
        del same[policy]
        if not same:
            del self._by_identity[policy.identity]
            self._local.discard(policy.identity)

    # resolution

    def resolve(self, ep_id: int) -> EndpointPolicy:
        """The whole policy of an endpoint, as it is now; KeyError where it is not registered."""
        endpoint = self._endpoints[ep_id]
        with quiet_collector():
            self._settle(endpoint.policy)
            endpoint.fresh, endpoint.pending = False, {}
            endpoint.enforced = _enforced(endpoint.policy)
            return EndpointPolicy(self.revision, *endpoint.enforced, endpoint.policy.map_state())

    def drain_changes(self) -> list[EndpointDelta]:
        """What changed since it was last told, for those endpoints alone in whose policy something did."""
        with quiet_collector():
            return self._drain_changes()

    def _drain_changes(self) -> list[EndpointDelta]:
        for policy in list(self._dirty):
            self._settle(policy)
        deltas = []
        for endpoint in self._endpoints.values():
            if endpoint.fresh:
                self._settle(endpoint.policy)
                endpoint.pending = dict(endpoint.policy.map_state())
            enforced = _enforced(endpoint.policy)
            if endpoint.pending or endpoint.fresh or enforced != endpoint.enforced:
                deltas.append(self._delta(endpoint, enforced))
        self.counters.endpoints_touched += len(deltas)
        return deltas

    def _delta(self, endpoint: _Endpoint, enforced: tuple[bool, bool]) -> EndpointDelta:
        pending, endpoint.pending = endpoint.pending, {}
        endpoint.fresh, endpoint.enforced = False, enforced
        upserts = {key: entry for key, entry in pending.items() if entry is not None}
        deletes = {key for key, entry in pending.items() if entry is None}
        return EndpointDelta(endpoint.id, upserts, deletes, *enforced, self.revision)

    def _mark(self, policies: Collection[SharedPolicy]) -> None:
        for policy in policies:
            policy.dirty = True
            self._dirty[policy] = None

    def _settle(self, policy: SharedPolicy) -> None:
        self._dirty.pop(policy, None)
        if policy.dirty:
            self.counters.policies_rebuilt += 1
            changes = policy.rebuild(self._context, self.settings.enforcement, policy.identity == INIT)
        elif policy.stale or policy.stale_places:
            self.counters.peers_refreshed += len(policy.stale) + len(policy.stale_places)
            changes = policy.refresh(self._context)
        else:
            return
        for endpoint in self._members[policy].values():
            if not endpoint.fresh:
                endpoint.pending.update(changes)

    def shared_policy(self, ep_id: int) -> SharedPolicy:
        """The resolved policy of an endpoint, for explanations; KeyError where it is not registered."""
        policy = self._endpoints[ep_id].policy
        self._settle(policy)
        return policy

    @contextmanager
    def preview(self, identity: int, names: NamedPorts, fresh: bool = True) -> Iterator[SharedPolicy]:
        """The policy that an endpoint of this identity would have, for as long as it is looked at.

        Without ``fresh`` it is the one that endpoints have, where there are any: that costs nothing.
        """
        known = None if fresh else self._policies.get(_policy_name(identity, names))
        if known is not None:
            self._settle(known)
            yield known
            return
        policy = SharedPolicy(identity, names)
        policy.rules = self._rules_for(identity)
        policy.rebuild(self._context, self.settings.enforcement, identity == INIT)
        try:
            yield policy
        finally:
            policy.close(self.cache)

    def reconfigure(self, settings: PolicySettings) -> None:
        """Change the settings; every policy is resolved anew."""
        self.settings = settings
        self._refresh_context()
        self._mark(self._policies.values())
        self.revision += 1

    def _endpoint_count(self, policies: Iterable[SharedPolicy]) -> int:
        return sum(len(self._members[policy]) for policy in policies)


def _policy_name(identity: int, names: NamedPorts) -> PolicyName:
    return identity, names_key(names)


def _enforced(policy: SharedPolicy) -> tuple[bool, bool]:
    sides = policy.sides
    return (sides[0].enforce, sides[1].enforce) if sides is not None else (False, False)


def _count(table: dict[Any, int], key: Any, step: int) -> None:
    count = table.get(key, 0) + step
    if count:
        table[key] = count
    else:
        del table[key]
