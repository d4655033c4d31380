"""Why a flow is allowed or denied, rule by rule, in the manner of inventory PO-T01.

The verdict is read from the resolved policy that the datapath has; the lines beside it say what each section
contributes. They cannot disagree about who may do what, because both read the same selectors and port keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec

from ciliate.identity.numeric import Identity
from ciliate.labels import LabelSet
from ciliate.policy.mapstate import EGRESS, INGRESS, Verdict
from ciliate.policy.model import PROTOCOLS, Section
from ciliate.policy.porttable import NamedPorts, blocks
from ciliate.policy.repository import Repository
from ciliate.policy.resolve import NO_NAMES, DirectionPolicy, SharedPolicy, find_in_state

_TRIAL_IDENTITIES = (0xFFFF_FFF0, 0xFFFF_FFF1)
_SIDES = ("Ingress", "Egress")
_REQUIRES = ("FromRequires", "ToRequires")


class Explanation(msgspec.Struct, frozen=True):
    """``verdict`` is allow or deny; ``lines`` explain it; ``rule`` numbers the deciding section, 0 for none."""

    verdict: str
    lines: list[str]
    rule: int = 0


def trace(
    repository: Repository,
    source: LabelSet,
    destination: LabelSet,
    protocol: str | None = None,
    port: int | None = None,
    named_ports: NamedPorts | None = None,
) -> Explanation:
    """Explain a flow between two label sets, known as identities or not. ``port`` None asks for layer 3.

    ``named_ports`` are those of the destination. KeyError for a protocol that is not one of ``model.PROTOCOLS``.
    """
    number = PROTOCOLS[protocol] if protocol else 0
    asked = f"{port if port is not None else 'any'}/{protocol}" if protocol else "any"
    head = f"Tracing From: [{_labels(source)}] => To: [{_labels(destination)}] Ports: [{asked}]"
    with _identities(repository, source, destination) as (one, two):
        lines, rule, good = [head], 0, True
        for direction, own, peer in ((EGRESS, one, two), (INGRESS, two, one)):
            names = (named_ports or NO_NAMES) if direction == INGRESS else NO_NAMES
            side_lines, found, allowed = _side(repository, direction, own, peer, number, port, names)
            lines += [f"{_SIDES[direction]} of {'destination' if direction == INGRESS else 'source'}:", *side_lines]
            if good:
                rule = found or rule
            good = good and allowed
    lines.append(f"Final verdict: {'ALLOWED' if good else 'DENIED'}")
    return Explanation("allow" if good else "deny", lines, rule)


def _labels(labels: LabelSet) -> str:
    return " ".join(labels.strings())


@contextmanager
def _identities(repository: Repository, *label_sets: LabelSet) -> Iterator[tuple[int, ...]]:
    """The identities of label sets; those not known exist only meanwhile."""
    known = {member.labels: number for number, member in repository.cache.members.items()}
    numbers, added = [], []
    for labels, trial in zip(label_sets, _TRIAL_IDENTITIES, strict=True):
        number = known.get(labels)
        if number is None:
            repository.upsert_identities([Identity(trial, labels)])
            added.append(trial)
            number = known[labels] = trial
        numbers.append(number)
    try:
        yield tuple(numbers)
    finally:
        repository.remove_identities(added)


def _side(
    repository: Repository, direction: int, own: int, peer: int, protocol: int, port: int | None, names: NamedPorts
) -> tuple[list[str], int, bool]:
    """Lines, the deciding rule's number, and whether this side allows."""
    with repository.preview(own, names) as policy:
        sides = policy.sides
        assert sides is not None  # a preview is resolved
        side = sides[direction]
        if not side.enforce:
            return [f"  Policy enforcement is off: {_why_off(repository, direction)}"], 0, True
        lines = list(_sections(repository, policy, side, direction, peer, protocol, port, names))
        unmet = [cached.peer for cached in side.requires if peer not in cached.members]
        lines += [f"  Found unsatisfied {_REQUIRES[direction]} constraint {item}" for item in unmet]
        lines.append(f"  {_selected(repository, policy, direction)}")
        found = side.find(peer, protocol, port)
        if found is None:
            return [*lines, "  Found no allow rule", f"  {_SIDES[direction]} verdict: denied"], 0, False
        entry = found[1].entries[found[0]]
        return [*lines, *_decision(repository, direction, entry.verdict, entry.rule)], entry.rule, entry.verdict != 1


def _decision(repository: Repository, direction: int, verdict: Verdict, number: int) -> list[str]:
    rule = repository.rule(number) if number else "the node may reach its own pods"
    if verdict is Verdict.DENY:
        return [f"  Conflicting layer-7 rules at {rule}", f"  {_SIDES[direction]} verdict: denied"]
    how = "redirected to the layer-7 proxy" if verdict is Verdict.REDIRECT else "allowed"
    return [f"  Found allow rule: {rule}", f"  {_SIDES[direction]} verdict: {how}"]


def _why_off(repository: Repository, direction: int) -> str:
    if repository.settings.enforcement == "never":
        return "the enforcement mode is never"
    return f"no rule with an {_SIDES[direction].lower()} section selects it"


def _selected(repository: Repository, policy: SharedPolicy, direction: int) -> str:
    total = sum(len(item.rules) for item in repository.objects())
    return f"{len(policy.rules)}/{total} rules selected"


def _sections(
    repository: Repository,
    policy: SharedPolicy,
    side: DirectionPolicy,
    direction: int,
    peer: int,
    protocol: int,
    port: int | None,
    names: NamedPorts,
) -> Iterator[str]:
    matching = {section for cached, group in side.groups.items() if peer in cached.members for section in group}
    port_names = repository.peer_names(peer) if direction == EGRESS else names
    for rule in policy.rules:
        for section in (rule.egress if direction == EGRESS else rule.ingress) or ():
            yield f"  * {repository.rule(section.number)}: selected"
            yield from (f"      {line}" for line in _section(section, section in matching, protocol, port, port_names))


def _section(section: Section, meant: bool, protocol: int, port: int | None, names: NamedPorts) -> Iterator[str]:
    if section.peers is None:
        yield "Allows any peer"
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
