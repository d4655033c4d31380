"""Why a flow is allowed or denied, rule by rule, in the manner of inventory PO-T01.

The verdict is read from the resolved policy that the datapath has; the lines beside it say what each section
contributes. They cannot disagree about who may do what, because both read the same selectors and port keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

import msgspec

from ciliate.identity.numeric import Identity
from ciliate.labels import NAMESPACE, SOURCE_CIDR, SOURCE_K8S, SOURCE_RESERVED, LabelSet
from ciliate.policy.isolation import isolating, origin
from ciliate.policy.mapstate import EGRESS, INGRESS, PolicyEntry, Verdict
from ciliate.policy.model import PROTOCOLS, RuleOrigin, Section
from ciliate.policy.places import NOWHERE
from ciliate.policy.porttable import Decision, NamedPorts, blocks, parsers_of
from ciliate.policy.repository import Repository
from ciliate.policy.resolve import NO_NAMES, DirectionPolicy, SharedPolicy, find_in_state

_TRIAL_IDENTITIES = (0xFFFF_FFF0, 0xFFFF_FFF1)
_SIDES = ("Ingress", "Egress")
_REQUIRES = ("FromRequires", "ToRequires")
SHOWN = 12
"""Sections of a direction that are shown without ``verbose``; those that mean the peer come first."""


class End(msgspec.Struct, frozen=True):
    """One end of a flow. ``identity`` 0 is whoever has these labels; ``names`` are the named ports of a pod.

    ``addresses`` are those that are known of it, ``place`` is that of the one that is meant (``places``).
    """

    labels: LabelSet
    identity: int = 0
    names: NamedPorts = NO_NAMES
    title: str = ""
    place: int = NOWHERE
    addresses: tuple[IPv4Address | IPv6Address, ...] = ()

    def text(self, verbose: bool) -> str:
        """Its labels; unless ``verbose`` without those that every pod has of the system."""
        shown = [str(label) for label in self.labels if verbose or not label.key.startswith("io.cilium.")]
        return f"[{' '.join(shown)}]"


class Side(msgspec.Struct, frozen=True):
    """What one direction says: ``verdict`` is allowed, redirected or denied; ``rule`` decided, ``why`` in one line."""

    direction: str
    enforced: bool
    verdict: str
    why: str
    lines: list[str]
    number: int = 0
    rule: RuleOrigin | None = None


class Explanation(msgspec.Struct, frozen=True):
    """``verdict`` is allow or deny; ``lines`` explain it; ``rule`` numbers the deciding section, 0 for none."""

    verdict: str
    lines: list[str]
    rule: int
    sides: list[Side]


class _Question(NamedTuple):
    """One direction of the flow: whose policy is asked about whom, on which port."""

    repository: Repository
    direction: int
    own: End
    peer: End
    protocol: int
    port: int | None
    verbose: bool


def trace(
    repository: Repository,
    source: End,
    destination: End,
    protocol: str | None = None,
    port: int | None = None,
    verbose: bool = False,
) -> Explanation:
    """Explain a flow between two ends. ``port`` None asks for layer 3; for ICMP it is the type of message.

    ``verbose`` also lists every section and the policies that select neither end. KeyError for a protocol that is not
    one of ``model.PROTOCOLS``, and for an identity that is not known.
    """
    number = PROTOCOLS[protocol] if protocol else 0
    asked = f"{port if port is not None else 'any'}/{protocol}" if protocol else "any"
    with _known(repository, source, destination) as (one, two):
        sides = [
            _side(_Question(repository, EGRESS, one, two, number, port, verbose)),
            _side(_Question(repository, INGRESS, two, one, number, port, verbose)),
        ]
    flow = f"From: {source.text(verbose)} => To: {destination.text(verbose)} Ports: [{asked}]"
    lines = [f"Tracing {flow}", *_notes(source, destination)]
    for side, end, role in zip(sides, (source, destination), ("source", "destination"), strict=True):
        lines += ["", f"{side.direction.capitalize()} of the {role}{end.title and f' {end.title}'}:", *side.lines]
    deciding = next((side for side in sides if side.verdict == "denied"), None)
    lines += ["", f"Final verdict: {'DENIED' if deciding else 'ALLOWED'}"]
    if deciding is None:
        number = next((side.number for side in reversed(sides) if side.number), 0)
        return Explanation("allow", lines, number, sides)
    return Explanation("deny", lines, deciding.number, sides)


def by_family(repository: Repository, source: End, destination: End) -> dict[int, tuple[End, End]]:
    """The ends as policy sees them in each address family that they can speak; an end without addresses speaks both."""
    found = {}
    for version in (4, 6):
        ends = []
        for end in (source, destination):
            address = next((item for item in end.addresses if item.version == version), None)
            if address is not None or not end.addresses:
                place = repository.place_of(address) if address is not None else NOWHERE
                ends.append(msgspec.structs.replace(end, place=place))
        if len(ends) == 2:
            found[version] = (ends[0], ends[1])
    return found


def _notes(*ends: End) -> Iterator[str]:
    for end, role in zip(ends, ("source", "destination"), strict=True):
        pod = any(label.source not in (SOURCE_RESERVED, SOURCE_CIDR) for label in end.labels)
        if not end.identity and pod and end.labels.get(NAMESPACE, SOURCE_K8S) is None:
            yield f"Note: the {role} has no label k8s:{NAMESPACE}, so no policy of a namespace selects or means it"


@contextmanager
def _known(repository: Repository, *ends: End) -> Iterator[list[End]]:
    """The ends with their identities; label sets that nobody has get one that exists only meanwhile."""
    found, added = [], []
    known = {} if all(end.identity for end in ends) else _by_labels(repository)
    for end, trial in zip(ends, _TRIAL_IDENTITIES, strict=True):
        number = end.identity or known.get(end.labels)
        if number is None:
            repository.upsert_identities([Identity(trial, end.labels)])
            added.append(trial)
            number = known[end.labels] = trial
        found.append(msgspec.structs.replace(end, identity=number, names=end.names or repository.peer_names(number)))
    try:
        yield found
    finally:
        repository.remove_identities(added)


def _by_labels(repository: Repository) -> dict[LabelSet, int]:
    return {member.labels: number for number, member in repository.cache.members.items()}


def _side(asked: _Question) -> Side:
    names = asked.own.names if asked.direction == INGRESS else NO_NAMES
    # a trial identity must not get into the policies of endpoints
    trial = asked.own.identity in _TRIAL_IDENTITIES or asked.peer.identity in _TRIAL_IDENTITIES
    with asked.repository.preview(asked.own.identity, names, fresh=trial) as policy:
        sides = policy.sides
        assert sides is not None  # a preview is resolved
        return _explain(asked, policy, sides[asked.direction])


def _explain(asked: _Question, policy: SharedPolicy, side: DirectionPolicy) -> Side:
    name, repository = _SIDES[asked.direction], asked.repository
    head = list(_others(asked, policy)) if asked.verbose else []
    if not side.enforce:
        why = f"Policy enforcement is disabled because {_why_off(repository, asked.direction)}"
        lines = [*head, f"  {why}", f"  {name} verdict: allowed"]
        return Side(name.lower(), False, "allowed", why, lines)
    lines = [*head, *_shown(asked, policy, side)]
    unmet = [cached.peer for cached in side.requires if asked.peer.identity not in cached.members]
    lines += [f"  Found unsatisfied {_REQUIRES[asked.direction]} constraint {item}" for item in unmet]
    lines += [f"  {_selected(repository, policy)}", *_levels(asked, side, bool(unmet))]
    found = side.find(asked.peer.identity, asked.protocol, asked.port, asked.peer.place)
    if found is None:
        by = ", ".join(isolating(repository, policy, asked.direction)) or "the enforcement mode"
        why = f"Found no allow rule; isolated by {by}"
        return Side(name.lower(), True, "denied", why, [*lines, f"  {why}", f"  {name} verdict: denied"])
    entry = found[1].entries[found[0]]
    why, verdict = _decision(repository, entry, found[1].decisions.get(found[0]))
    how = "redirected to the layer-7 proxy" if verdict == "redirected" else verdict
    lines += [f"  {why}", f"  {name} verdict: {how}"]
    return Side(name.lower(), True, verdict, why, lines, entry.rule, repository.rule(entry.rule))


def _levels(asked: _Question, side: DirectionPolicy, unmet: bool) -> Iterator[str]:
    """What labels alone say, before any port is looked at."""
    whole = side.find(asked.peer.identity, 0, None, asked.peer.place)
    yield f"  Label verdict: {'denied' if unmet else 'undecided' if whole is None else 'allowed'}"
    if asked.port is None and not asked.protocol:
        yield f"  L4 {_SIDES[asked.direction].lower()} policies skipped"


def _decision(repository: Repository, entry: PolicyEntry, decision: Decision | None) -> tuple[str, str]:
    rule = repository.rule(entry.rule) if entry.rule else "the node may reach its own pods"
    if entry.verdict is Verdict.DENY:
        return f"Conflicting layer-7 rules at {rule}", "denied"
    if entry.verdict is Verdict.ALLOW:
        return f"Found allow rule: {rule}", "allowed"
    if entry.proxy_port:
        return f"Found allow rule: {rule}", "redirected"
    missing = "; ".join(repository.proxies.why_not(name) for name in parsers_of(decision))
    return f"Found layer-7 rules, and {missing}: dropped (191), see {rule}", "denied"


def _why_off(repository: Repository, direction: int) -> str:
    if repository.settings.enforcement == "never":
        return "the enforcement mode is never"
    return f"no rule with an {_SIDES[direction].lower()} section selects it"


def _selected(repository: Repository, policy: SharedPolicy) -> str:
    total = sum(len(item.rules) for item in repository.objects())
    return f"{len(policy.rules)}/{total} rules selected"


def _others(asked: _Question, policy: SharedPolicy) -> Iterator[str]:
    """Rules that do not select this end, each with its selector."""
    for item in asked.repository.objects():
        for rule in item.rules:
            if rule not in policy.rules:
                yield f"  * {origin(item)}: not selected, its selector is {rule.subject}"


def _shown(asked: _Question, policy: SharedPolicy, side: DirectionPolicy) -> Iterator[str]:
    """The sections of the rules that select this end; without ``verbose`` only the first, those that match before."""
    peer = asked.peer
    matching = {
        section
        for cached, group in side.groups.items()
        if peer.identity in cached.members or peer.place in cached.places
        for section in group
    }
    sections = [
        section for rule in policy.rules for section in (rule.egress if asked.direction else rule.ingress) or ()
    ]
    if not asked.verbose:
        sections.sort(key=lambda section: section.peers is not None and section not in matching)
    names = asked.peer.names if asked.direction == EGRESS else asked.own.names
    for section in sections[: None if asked.verbose else SHOWN]:
        yield f"  * {asked.repository.rule(section.number)}: selected"
        lines = _section(section, section in matching, asked.protocol, asked.port, names)
        yield from (f"      {line}" for line in lines)
    if len(sections) > SHOWN and not asked.verbose:
        yield f"  * {len(sections) - SHOWN} more sections that select it"


def _section(section: Section, meant: bool, protocol: int, port: int | None, names: NamedPorts) -> Iterator[str]:
    if section.peers is None:
        yield "Allows any peer: matches"
    else:
        peers = _list(section.peers) or "no one"
        yield f"Allows {peers}: {'matches' if meant else 'does not match'}"
    if section.requires:
        yield f"Requires {_list(section.requires)}"
    if section.ports is None:
        yield "No L4 restrictions"
        return
    keys = {key: None for key, _ in blocks(section, names)}
    found = find_in_state(keys, protocol, port) is not None
    yield f"Allows ports [{_list(section.ports)}]: {'matches' if found else 'does not match'}"


def _list(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
