"""Policies of registered endpoints: resolved when they are asked for, then handed out as what changed of them.

Endpoints of one identity and the same named ports share one resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import msgspec
from pyroaring import BitMap

from ciliate.identity.numeric import INIT
from ciliate.policy.importer import quiet_collector
from ciliate.policy.mapstate import PolicyEntry, PolicyKey
from ciliate.policy.model import Rule
from ciliate.policy.porttable import NamedPorts
from ciliate.policy.resolve import Changes, Context, NamesKey, SharedPolicy, Tables, names_key, written_out
from ciliate.policy.selectors import Cached


class EndpointPolicy:
    """The whole policy of one endpoint. ``size`` is how many entries it has; ``problem`` says why it is an older one.

    ``tables`` are the entries by direction, identity and place, which many peers share; written out only when asked.
    """

    def __init__(self, revision: int, policy: SharedPolicy) -> None:
        self.revision = revision
        self.enforce_ingress, self.enforce_egress = _enforced(policy)
        self.size, self.problem = policy.size, policy.problem
        self.tables: Tables = policy.tables()

    @cached_property
    def map_state(self) -> dict[PolicyKey, PolicyEntry]:
        """Every entry."""
        return written_out(self.tables)


class EndpointDelta(msgspec.Struct, frozen=True):
    """What changed in one endpoint's policy since it was last handed out."""

    ep_id: int
    upserts: dict[PolicyKey, PolicyEntry]
    deletes: set[PolicyKey]
    enforce_ingress: bool
    enforce_egress: bool
    revision: int
    size: int = 0
    """Entries of the whole policy."""
    whole: bool = False
    """The policy has more entries than an endpoint may have, or had, or is an older one: to be resolved as a whole."""


class Counters(msgspec.Struct):
    """Witnesses of how much work was done."""

    imports: int = 0
    policies_rebuilt: int = 0
    peers_refreshed: int = 0
    endpoints_touched: int = 0


class _Endpoint:
    """A registered endpoint. ``pending`` is what it has not been told yet; ``fresh``: it was told nothing at all.

    ``whole``: what it has not been told yet is not worth being put together as a delta.
    """

    __slots__ = ("enforced", "fresh", "id", "pending", "policy", "whole")

    def __init__(self, ep_id: int, policy: SharedPolicy) -> None:
        self.id = ep_id
        self.policy = policy
        self.pending: Changes = {}
        self.fresh = True
        self.whole = False
        self.enforced = (False, False)


PolicyName = tuple[int, NamesKey]


class EndpointPolicies:
    """Registered endpoints and their policies. ``rules_for`` gives the rules that select an identity."""

    def __init__(
        self, context: Context, rules_for: Callable[[int], dict[Rule, None]], on_use: Callable[[Rule, bool], None]
    ) -> None:
        """``on_use`` is told of rules that select an endpoint from now on, and that select none any more."""
        self.context = context
        self.counters = Counters()
        self._on_use = on_use
        self._uses: dict[Rule, int] = {}
        self._rules_for = rules_for
        self._policies: dict[PolicyName, SharedPolicy] = {}
        self._by_identity: dict[int, dict[SharedPolicy, None]] = {}
        self._local = BitMap()
        self._members: dict[SharedPolicy, dict[int, _Endpoint]] = {}
        self._endpoints: dict[int, _Endpoint] = {}
        self._dirty: dict[SharedPolicy, None] = {}

    def selected(self, subject: Cached) -> list[SharedPolicy]:
        """Policies of local identities that a subject selector selects."""
        if not self._local:
            return []
        return [policy for number in subject.members & self._local for policy in self._by_identity[number]]

    def has(self, identity: int) -> bool:
        """Whether an endpoint has this identity."""
        return identity in self._local

    @property
    def policies(self) -> Collection[SharedPolicy]:
        """Every policy that an endpoint has."""
        return self._policies.values()

    def of(self, ep_id: int) -> SharedPolicy | None:
        """The policy of an endpoint as it was last resolved; None where unknown."""
        endpoint = self._endpoints.get(ep_id)
        return endpoint.policy if endpoint is not None else None

    def count(self, policies: Iterable[SharedPolicy]) -> int:
        """How many endpoints have these policies."""
        return sum(len(self._members[policy]) for policy in policies)

    # what is not true any more

    def mark(self, policies: Collection[SharedPolicy]) -> None:
        """The rules of these policies changed."""
        for policy in policies:
            policy.dirty = True
            self._dirty[policy] = None

    def reselect(self, identity: int) -> None:
        """Other rules than before may select this identity."""
        for policy in self._by_identity.get(identity, ()):
            old, policy.rules = policy.rules, self._rules_for(identity)
            self._use(policy.rules, 1)
            self._use(old, -1)
            self.mark({policy: None})

    def add_rule(self, policy: SharedPolicy, rule: Rule) -> None:
        """A new rule selects a policy's endpoints."""
        policy.rules[rule] = None
        self._use((rule,), 1)

    def remove_rule(self, policy: SharedPolicy, rule: Rule) -> None:
        """A rule is no more."""
        if policy.rules.pop(rule, rule) is None:
            self._use((rule,), -1)

    def _use(self, rules: Iterable[Rule], step: int) -> None:
        for rule in rules:
            before = self._uses.get(rule, 0)
            if before + step:
                self._uses[rule] = before + step
            else:
                del self._uses[rule]
            if not before or not before + step:
                self._on_use(rule, not before)

    def used(self, rule: Rule) -> bool:
        """Whether a rule selects an endpoint."""
        return rule in self._uses

    def stale(self, number: int, policies: Iterable[SharedPolicy]) -> None:
        """What these policies say of an identity may have changed."""
        for policy in policies:
            policy.stale[number] = None
            self._dirty[policy] = None

    def stale_place(self, number: int, policies: Iterable[SharedPolicy]) -> None:
        """What these policies say of a place may have changed."""
        for policy in policies:
            policy.stale_places[number] = None
            self._dirty[policy] = None

    # endpoints

    def register(self, ep_id: int, identity: int, named_ports: NamedPorts) -> None:
        """Keep a policy for an endpoint from now on; again with another identity moves it there."""
        policy = self._policy(identity, named_ports)
        old = self._endpoints.get(ep_id)
        if old is not None:
            if old.policy is policy:
                return
            self._leave(old)
        endpoint = self._endpoints[ep_id] = _Endpoint(ep_id, policy)
        self._members[policy][ep_id] = endpoint

    def unregister(self, ep_id: int) -> bool:
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
            self._use(policy.rules, 1)
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
        policy.close(self.context.cache)
        self._use(policy.rules, -1)
        same = self._by_identity[policy.identity]
        del same[policy]
        if not same:
            del self._by_identity[policy.identity]
            self._local.discard(policy.identity)

    # resolution

    def resolve(self, ep_id: int, revision: int) -> EndpointPolicy:
        """The whole policy of an endpoint, as it is at this revision; KeyError where it is not registered."""
        endpoint = self._endpoints[ep_id]
        with quiet_collector():
            self._settle(endpoint.policy)
            endpoint.fresh, endpoint.whole, endpoint.pending = False, False, {}
            endpoint.enforced = _enforced(endpoint.policy)
            return EndpointPolicy(revision, endpoint.policy)

    def settle_one(self) -> bool:
        """Work out one policy of which something changed; False where there is none."""
        for policy in self._dirty:
            with quiet_collector():
                self._settle(policy)
            return True
        return False

    def drain_changes(self, revision: int) -> list[EndpointDelta]:
        """What changed since it was last told, for those endpoints alone in whose policy something did."""
        with quiet_collector():
            return self._drain_changes(revision)

    def _drain_changes(self, revision: int) -> list[EndpointDelta]:
        for policy in list(self._dirty):
            self._settle(policy)
        deltas = []
        for endpoint in self._endpoints.values():
            if endpoint.fresh:
                self._settle(endpoint.policy)
                endpoint.whole = endpoint.policy.crowded or bool(endpoint.policy.problem)
                endpoint.pending = {} if endpoint.whole else dict(endpoint.policy.map_state())
            enforced = _enforced(endpoint.policy)
            if endpoint.pending or endpoint.whole or endpoint.fresh or enforced != endpoint.enforced:
                deltas.append(self._delta(endpoint, enforced, revision))
        self.counters.endpoints_touched += len(deltas)
        return deltas

    def _delta(self, endpoint: _Endpoint, enforced: tuple[bool, bool], revision: int) -> EndpointDelta:
        pending, endpoint.pending = endpoint.pending, {}
        whole, endpoint.whole = endpoint.whole, False
        endpoint.fresh, endpoint.enforced = False, enforced
        upserts = {key: entry for key, entry in pending.items() if entry is not None}
        deletes = {key for key, entry in pending.items() if entry is None}
        return EndpointDelta(endpoint.id, upserts, deletes, *enforced, revision, endpoint.policy.size, whole)

    def _settle(self, policy: SharedPolicy) -> None:
        self._dirty.pop(policy, None)
        if policy.dirty or policy.much_is_stale():
            self.counters.policies_rebuilt += 1
            changes = policy.rebuild(self.context, policy.identity == INIT)
        elif policy.stale or policy.stale_places:
            self.counters.peers_refreshed += len(policy.stale) + len(policy.stale_places)
            changes = policy.refresh(self.context)
        else:
            return
        for endpoint in self._members[policy].values():
            if changes is None:
                endpoint.whole, endpoint.pending = True, {}
            elif not endpoint.fresh and not endpoint.whole:
                endpoint.pending.update(changes)

    def shared(self, ep_id: int) -> SharedPolicy:
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
        policy.rebuild(self.context, identity == INIT)
        try:
            yield policy
        finally:
            policy.close(self.context.cache)


def _policy_name(identity: int, names: NamedPorts) -> PolicyName:
    return identity, names_key(names)


def _enforced(policy: SharedPolicy) -> tuple[bool, bool]:
    sides = policy.sides
    return (sides[0].enforce, sides[1].enforce) if sides is not None else (False, False)
