"""Port tables: what one peer may do, as (protocol, port, prefix) -> entry, with layer-7 restrictions merged.

Source of behaviour: inventory PO-R04, PO-R05, PO-R07b and section 8 items 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ciliate.policy.l7rules import L7Rules
from ciliate.policy.mapstate import PolicyEntry, Verdict
from ciliate.policy.model import PROTOCOL_NAMES, PortItem, Section
from ciliate.policy.ports import prefixes

PortKey = tuple[int, int, int]
"""Protocol, port, prefix length, as in ``mapstate.PolicyKey``."""
ALL_TRAFFIC: PortKey = (0, 0, 0)
NamedPorts = Mapping[str, Sequence[tuple[str, int]]]
PROXY_VISIBLE = L7Rules("", ())
"""Stands where a proxy looks on but restricts nothing."""


class Grant(NamedTuple):
    """One section's say on one port key. ``anyone`` tells that the section names no layer-3 peer."""

    section: Section
    item: PortItem | None
    anyone: bool = False


class Decision(NamedTuple):
    """What holds for one port key: the entry, the layer-7 rules behind a REDIRECT, and a conflict's text."""

    entry: PolicyEntry
    l7: tuple[L7Rules, ...] = ()
    conflict: str = ""


def parsers_of(decision: Decision | None) -> list[str]:
    """The layer-7 parsers that a decision counts on."""
    return sorted({rules.parser for rules in decision.l7 if rules.parser}) if decision is not None else []


class PortTable:
    """Entries of one peer. Tables are shared by peers of which the same sections speak."""

    __slots__ = ("decisions", "entries", "lengths", "refuses")

    def __init__(self, decisions: dict[PortKey, Decision]) -> None:
        self.decisions = {key: decision for key, decision in decisions.items() if decision.l7 or decision.conflict}
        self.entries = {key: decision.entry for key, decision in decisions.items()}
        self.lengths = sorted({key[2] for key in decisions if key[0]}, reverse=True)
        self.refuses = any(decision.entry.verdict is not Verdict.ALLOW for decision in decisions.values())


class Proxies(NamedTuple):
    """Which layer-7 parsers have an active proxy, and on which port; which have one that is ``down``, and why."""

    ports: tuple[tuple[str, int], ...] = ()
    down: tuple[tuple[str, str], ...] = ()

    def port(self, parser: str) -> int:
        """The proxy port of a parser, 0 where none is active: the datapath drops what is to be redirected there."""
        return dict(self.ports).get(parser, 0)

    def why_not(self, parser: str) -> str:
        """Why no proxy serves a parser; empty where one does."""
        if self.port(parser):
            return ""
        reason = dict(self.down).get(parser)
        return f"no proxy for {parser} is active" if reason is None else f"the proxy for {parser} is down: {reason}"


def blocks(section: Section, names: NamedPorts) -> Iterator[tuple[PortKey, PortItem | None]]:
    """The port keys of a section; ``names`` gives the numbers behind port names."""
    if section.ports is None:
        yield ALL_TRAFFIC, None
        return
    for item in section.ports:
        if item.name:
            for protocol, number in names.get(item.name, ()):
                if protocol == PROTOCOL_NAMES[item.protocol]:
                    yield (item.protocol, number, 16), item
        else:
            for port, length in prefixes(item.first, item.last):
                yield (item.protocol, port, length), item


def port_table(own: Iterable[Section], anyone: Sequence[Section], names: NamedPorts, proxies: Proxies) -> PortTable:
    """The table of a peer of which the sections ``own`` speak, beside those that speak of anyone."""
    grants = _grants(own, names, False)
    if not any(item.section.filters for found in grants.values() for item in found) and not any(
        section.filters for section in anyone
    ):
        return PortTable({key: _allow(found) for key, found in grants.items()})
    return PortTable(_merged(grants, _grants(anyone, names, True), proxies))


def plain_table(own: Iterable[Section], names: NamedPorts) -> PortTable:
    """The table of a peer of which these sections speak, where no section filters."""
    numbers: dict[PortKey, int] = {}
    for section in own:
        for key, _ in blocks(section, names):
            numbers[key] = min(numbers.get(key, section.number), section.number)
    return PortTable({key: Decision(PolicyEntry(Verdict.ALLOW, 0, number)) for key, number in numbers.items()})


def anyone_table(anyone: Iterable[Section], names: NamedPorts, proxies: Proxies) -> PortTable:
    """The table of identity 0: every peer."""
    grants = _grants(anyone, names, True)
    return PortTable({key: decide(list(_covering(key, grants)), proxies) for key in grants})


def _grants(sections: Iterable[Section], names: NamedPorts, anyone: bool) -> dict[PortKey, list[Grant]]:
    found: dict[PortKey, list[Grant]] = {}
    for section in sections:
        for key, item in blocks(section, names):
            found.setdefault(key, []).append(Grant(section, item, anyone))
    return found


def _merged(
    own: dict[PortKey, list[Grant]], anyone: dict[PortKey, list[Grant]], proxies: Proxies
) -> dict[PortKey, Decision]:
    result = {key: decide([*_covering(key, own), *_covering(key, anyone)], proxies) for key in own}
    for key in anyone:
        if key in own:
            continue
        # the datapath looks at a peer's own entries first: a shorter one of them would hide this key
        hiding = next((above for above in ancestors(key) if above in own), None)
        if hiding is None:
            continue
        decision = decide([*_covering(key, own), *_covering(key, anyone)], proxies)
        same = (decision.entry.verdict, decision.l7) == (result[hiding].entry.verdict, result[hiding].l7)
        if not same:
            result[key] = decision
    return result


def ancestors(key: PortKey) -> Iterator[PortKey]:
    """The keys that a packet of ``key`` may meet after it, in the datapath's order."""
    protocol, port, length = key
    if protocol:
        for shorter in range(length - 1, -1, -1):
            yield protocol, port & (0xFFFF << (16 - shorter)) & 0xFFFF, shorter
        yield ALL_TRAFFIC


def _covering(key: PortKey, grants: dict[PortKey, list[Grant]]) -> Iterator[Grant]:
    yield from grants.get(key, ())
    for above in ancestors(key):
        yield from grants.get(above, ())


def _allow(grants: list[Grant]) -> Decision:
    return Decision(PolicyEntry(Verdict.ALLOW, 0, min(item.section.number for item in grants)))


def decide(grants: list[Grant], proxies: Proxies) -> Decision:
    """Merge everything that speaks of one peer on one port.

    Without layer-7 rules it is an allow. A plain allow lifts layer-7 restrictions (the peer may do everything), but
    not where it speaks of CIDRs or was written for protocol ANY, beside rules that name the peer (PO-R05).
    """
    filters = [item for item in grants if item.item is not None and item.item.l7 is not None]
    plain = [item for item in grants if item.item is None or item.item.l7 is None]
    if not filters:
        return _allow(grants)
    only_anyone = all(item.anyone for item in filters) and not all(item.anyone for item in grants)
    if any(_lifts(item, only_anyone) for item in plain):
        return _lifted(filters, plain, only_anyone, proxies)
    return _filtered(filters, proxies)


def _lifts(grant: Grant, only_anyone: bool) -> bool:
    if grant.item is None and only_anyone:
        return True  # an L3-only entry of the peer is found before any entry for anyone
    return not grant.section.from_prefixes and not (grant.item is not None and grant.item.any_protocol)


def _lifted(filters: list[Grant], plain: list[Grant], only_anyone: bool, proxies: Proxies) -> Decision:
    rule = min(item.section.number for item in plain)
    parsers = {item.item.l7.parser for item in filters if item.item is not None and item.item.l7 is not None}
    port = proxies.port(min(parsers)) if len(parsers) == 1 else 0
    if only_anyone or not port:
        return Decision(PolicyEntry(Verdict.ALLOW, 0, rule))
    return Decision(PolicyEntry(Verdict.REDIRECT, port, rule), (PROXY_VISIBLE,))


def _filtered(filters: list[Grant], proxies: Proxies) -> Decision:
    rules = [item.item.l7 for item in filters if item.item is not None and item.item.l7 is not None]
    number = min(item.section.number for item in filters)
    parsers = sorted({item.parser for item in rules})
    if len(parsers) > 1:
        text = f"conflicting layer-7 parsers on one port: {', '.join(parsers)}"
        return Decision(PolicyEntry(Verdict.DENY, 0, number), (), text)
    return Decision(PolicyEntry(Verdict.REDIRECT, proxies.port(parsers[0]), number), tuple(dict.fromkeys(rules)))
