"""Bounds of what policies may take, looked at before anything is written out, and each namespace's share of a node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from ciliate.policy.model import CidrPeer, Network, Peer, PortItem, Rule, Section
from ciliate.policy.ports import prefixes

MAX_PREFIXES = 65536
"""Prefixes that the policies in force on a node may name: entries of the map ``ciliate_place``."""
NAMESPACE_PREFIXES = MAX_PREFIXES // 4
"""Of them, those that the policies of one namespace may name."""
MAX_PIECES = 65536
"""Aligned pieces of ports that one object may have, and that one policy may be worked out from."""
MAX_MEMBERS = 1 << 22
"""Identities and prefixes that the selectors of one policy may mean, each selector counted by itself."""
NODE_ENTRIES = 524288
"""Entries of the map ``ciliate_policy``."""
NAMESPACE_ENTRIES = NODE_ENTRIES // 2
"""Of them, those that the endpoints of one namespace may have."""
FOREIGN_ENTRIES = NODE_ENTRIES // 8
"""Entries that the prefixes of one object may add to the policies of endpoints that it does not select."""


class PolicyBoundError(Exception):
    """A policy that takes too much to be worked out; the text says what and how much there may be."""


def joined_peers(peers: Iterable[Peer]) -> tuple[Peer, ...]:
    """The same peers, each once, with prefixes that lie side by side or in each other put together.

    A prefix with exceptions stays as it is, unless it lies in one that has none.
    """
    found = tuple(dict.fromkeys(peers))
    for pods in (False, True):
        plain = [peer for peer in found if isinstance(peer, CidrPeer) and peer.pods is pods and not peer.exclude]
        if len(plain) < 2:
            continue
        v4 = collapse_addresses(peer.cidr for peer in plain if isinstance(peer.cidr, IPv4Network))
        v6 = collapse_addresses(peer.cidr for peer in plain if isinstance(peer.cidr, IPv6Network))
        cidrs: list[Network] = [*v4, *v6]
        joined = dict.fromkeys(CidrPeer(cidr, (), pods) for cidr in cidrs)
        if len(joined) < len(plain):
            gone = set(plain) - joined.keys()
            found = tuple(dict.fromkeys((*(peer for peer in found if peer not in gone), *joined)))
    return found


def joined_ports(items: Iterable[PortItem]) -> tuple[PortItem, ...]:
    """The same ports, each once, with ranges that overlap or lie side by side put together."""
    found = tuple(dict.fromkeys(items))
    plain: dict[tuple[int, bool], list[PortItem]] = {}
    for item in found:
        if not item.name and item.l7 is None:
            plain.setdefault((item.protocol, item.any_protocol), []).append(item)
    result = list(found)
    for same in plain.values():
        same.sort(key=lambda item: (item.first, item.last))
        joined = same[:1]
        for item in same[1:]:
            if item.first <= joined[-1].last + 1:
                joined[-1] = joined[-1]._replace(last=max(joined[-1].last, item.last))
            else:
                joined.append(item)
        if len(joined) < len(same):
            gone = set(same)
            result = [item for item in result if item not in gone] + joined
    return tuple(result)


@lru_cache(maxsize=65536)
def _pieces(first: int, last: int) -> int:
    return len(prefixes(first, last))


def pieces(section: Section) -> int:
    """How many entries a section takes for each peer, at most."""
    if section.ports is None:
        return 1
    return sum(1 if item.name else _pieces(item.first, item.last) for item in section.ports)


def weight(rule: Rule) -> int:
    """Peers times ports of a rule: how much it adds to a policy, roughly."""
    sections = (*(rule.ingress or ()), *(rule.egress or ()))
    return sum(pieces(section) * max(len(section.peers or ()), 1) for section in sections)


@lru_cache(maxsize=64)
def named(rule: Rule) -> Mapping[Network, bool]:
    """Prefixes that a rule names, exceptions included, and whether an ipBlock does."""
    found: dict[Network, bool] = {}
    for section in (*(rule.ingress or ()), *(rule.egress or ())):
        for peer in section.peers or ():
            if isinstance(peer, CidrPeer):
                for prefix in (peer.cidr, *peer.exclude):
                    found[prefix] = found.get(prefix, False) or peer.pods
    return found


def excess(rules: Iterable[Rule]) -> str:
    """Why the rules of one object take too much, whatever they select; empty where they do not."""
    known: set[Network] = set()
    count = 0
    for rule in rules:
        known.update(named(rule))
        count += sum(pieces(section) for section in (*(rule.ingress or ()), *(rule.egress or ())))
    if len(known) > NAMESPACE_PREFIXES:
        return f"names {len(known)} prefixes, expected at most {NAMESPACE_PREFIXES} of one object, exceptions included"
    if count > MAX_PIECES:
        return f"has ports that take {count} entries for each peer, expected at most {MAX_PIECES} of one object"
    return ""
