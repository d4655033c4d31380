"""The selector cache: every peer and subject selector once, with the identities that it selects, kept incrementally."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from pyroaring import BitMap

from ciliate.identity.numeric import Identity
from ciliate.labels import CLUSTER, NAMESPACE, SOURCE_CIDR, SOURCE_RESERVED, Label, LabelSet
from ciliate.policy.l7rules import name_matches
from ciliate.policy.members import LabelIndex, Member, PrefixTable, means
from ciliate.policy.model import CidrPeer, FqdnPeer, Network, Peer, ServicePeer, Special
from ciliate.policy.places import Places, covers, inside
from ciliate.policy.selector import IN, Requirement, Selector

if TYPE_CHECKING:
    from ciliate.policy.resolve import SharedPolicy

_HOST = Label(SOURCE_RESERVED, "host")
ServiceTable = Mapping[tuple[str, str], "Service"]
NO_PLACES = BitMap()
"""What every selector but an ipBlock means by place; never changed."""


class Service:
    """A service without selector, as toServices needs it: its labels and its endpoints' addresses."""

    __slots__ = ("addresses", "labels")

    def __init__(self, labels: Mapping[str, str], addresses: Iterable[Network]) -> None:
        self.labels = dict(labels)
        self.addresses = frozenset(addresses)


class Cached:
    """One selector. ``members`` (identities) and ``places`` are always current; policies' entries follow them.

    ``users`` are these policies.
    """

    __slots__ = ("members", "peer", "places", "references", "users")

    def __init__(self, peer: Peer, members: BitMap, places: BitMap) -> None:
        self.peer = peer
        self.members = members
        self.places = places
        self.references = 0
        self.users: set[SharedPolicy] = set()


class SelectorCache:
    """Selectors and identities. ``evaluations`` counts full selections, ``checks`` single-identity ones."""

    def __init__(self) -> None:
        self.members: dict[int, Member] = {}
        self.evaluations = 0
        self.checks = 0
        self.places = Places()
        self._labels = LabelIndex()
        self._prefixes = PrefixTable()
        self.hosts: set[int] = set()
        self._cached: dict[Peer, Cached] = {}
        self._by_label: dict[tuple[str, str], dict[Cached, None]] = {}
        self._by_prefix: dict[tuple[int, int], dict[int, dict[Cached, None]]] = {}
        self._others: dict[Cached, None] = {}
        self._whole: dict[Cached, None] = {}
        self.services: dict[tuple[str, str], Service] = {}

    def __len__(self) -> int:
        return len(self._cached)

    def acquire(self, peer: Peer) -> Cached:
        """The cached selector of a peer; each acquire needs a release."""
        cached = self._cached.get(peer)
        if cached is None:
            places = BitMap(self.places.meant(peer)) if isinstance(peer, CidrPeer) and peer.pods else NO_PLACES
            cached = self._cached[peer] = Cached(peer, self._select(peer), places)
            self._index(cached, add=True)
        cached.references += 1
        return cached

    def release(self, cached: Cached) -> None:
        """Give up one use; the selector is forgotten with its last."""
        cached.references -= 1
        if not cached.references:
            del self._cached[cached.peer]
            self._index(cached, add=False)

    def upsert(self, identity: Identity) -> tuple[list[Cached], list[Cached]]:
        """Add or change an identity; returns the selectors that it left and those that it entered."""
        member = Member.of(identity)
        old = self.members.get(identity.id)
        if old is not None and old.labels == member.labels and old.prefixes == member.prefixes:
            return [], []
        before = self._drop(old) if old is not None else []
        after = self._take(member)
        return [item for item in before if item not in after], [item for item in after if item not in before]

    def remove(self, number: int) -> list[Cached]:
        """Forget an identity; returns the selectors that it left."""
        old = self.members.get(number)
        return self._drop(old) if old is not None else []

    def add_place(self, number: int, prefix: Network | None) -> list[Cached]:
        """Know a place, None: that of addresses that are not known; returns the selectors that mean it."""
        self.places.add(number, prefix)
        found = [item for item in self._around(prefix) if isinstance(item.peer, CidrPeer) and item.peer.pods]
        found = [item for item in found if covers(item.peer, prefix)]  # type: ignore[arg-type]
        for item in found:
            item.places.add(number)
        return found

    def remove_place(self, number: int) -> list[Cached]:
        """Forget a place; returns the selectors that meant it."""
        found = [item for item in self._around(self.places.prefix(number)) if number in item.places]
        self.places.remove(number)
        for item in found:
            item.places.discard(number)
        return found

    def around(self, prefix: Network) -> list[Cached]:
        """Every cached CIDR selector that means a prefix."""
        return [item for item in self._around(prefix) if isinstance(item.peer, CidrPeer) and covers(item.peer, prefix)]

    def matching(self, member: Member) -> list[Cached]:
        """Every cached selector that selects this identity."""
        found = dict.fromkeys(self._candidates(member))
        self.checks += len(found)
        return [item for item in found if self._matches(item.peer, member)]

    def services_changed(self) -> list[tuple[Cached, BitMap]]:
        """Select anew for every service peer; returns those that changed, with the identities that did."""
        changed = []
        for item in self._others:
            if isinstance(item.peer, ServicePeer):
                members = self._select(item.peer)
                if members != item.members:
                    difference, item.members = members ^ item.members, members
                    changed.append((item, difference))
        return changed

    def service_addresses(self, peer: ServicePeer) -> set[Network]:
        """Addresses of the services that a service peer means."""
        return {address for service in self._services(peer) for address in service.addresses}

    def _services(self, peer: ServicePeer) -> Iterator[Service]:
        if peer.name and peer.namespace:
            named = self.services.get((peer.namespace, peer.name))
            if named is not None:
                yield named
            return
        for (namespace, name), service in self.services.items():
            if peer.namespace not in ("", namespace) or peer.name not in ("", name):
                continue
            if peer.name or (peer.labels is not None and _plain_match(peer.labels, service.labels)):
                yield service

    def _take(self, member: Member) -> list[Cached]:
        self.members[member.id] = member
        self._labels.add(member)
        if _HOST in member.labels:
            self.hosts.add(member.id)
        if member.world:
            self._prefixes.add(member)
        found = self.matching(member)
        for item in found:
            item.members.add(member.id)
        return found

    def _drop(self, member: Member) -> list[Cached]:
        found = [item for item in self._candidates(member) if member.id in item.members]
        for item in found:
            item.members.discard(member.id)
        del self.members[member.id]
        self._labels.discard(member)
        self.hosts.discard(member.id)
        if member.world:
            self._prefixes.discard(member)
        return found

    def _candidates(self, member: Member) -> Iterator[Cached]:
        yield from self._others
        for label in member.labels:
            if label.source != SOURCE_CIDR:
                yield from self._by_label.get((label.key, label.value), ())
        for prefix in member.prefixes:
            yield from self._around(prefix)
        if member.world and not member.prefixes:
            yield from self._around(None)

    def _around(self, prefix: Network | None) -> Iterator[Cached]:
        """CIDR selectors around a prefix; None: those of a whole family."""
        if prefix is None:
            yield from self._whole
            return
        base, size = int(prefix.network_address), prefix.max_prefixlen
        for (version, length), table in self._by_prefix.items():
            if version == prefix.version and length <= prefix.prefixlen:
                yield from table.get(base >> (size - length), ())

    def _index(self, cached: Cached, add: bool) -> None:
        for table in self._tables(cached.peer):
            if add:
                table[cached] = None
            else:
                table.pop(cached, None)

    def _tables(self, peer: Peer) -> list[dict[Cached, None]]:
        if isinstance(peer, CidrPeer):
            base, size, length = int(peer.cidr.network_address), peer.cidr.max_prefixlen, peer.cidr.prefixlen
            prefixes = self._by_prefix.setdefault((peer.cidr.version, length), {})
            tables = [prefixes.setdefault(base >> (size - length), {})]
            return [*tables, self._whole] if length == 0 else tables
        if isinstance(peer, Selector):
            chosen = _narrowest(peer)
            if chosen is not None:
                return [self._by_label.setdefault((chosen.key, value), {}) for value in chosen.values]
        return [self._others]

    def _select(self, peer: Peer) -> BitMap:
        self.evaluations += 1
        if isinstance(peer, Selector) and not any(item.source == SOURCE_CIDR for item in peer.requirements):
            return self._labels.select(peer)
        if isinstance(peer, CidrPeer):
            return self._select_cidr(peer)
        return BitMap(member.id for member in self.members.values() if self._matches(peer, member))

    def _select_cidr(self, peer: CidrPeer) -> BitMap:
        found = set(self._prefixes.within(peer.cidr))
        if peer.cidr.prefixlen == 0:
            found.update(number for number, member in self.members.items() if member.world and not member.prefixes)
        return BitMap(number for number in found if means(peer, self.members[number]))

    def _matches(self, peer: Peer, member: Member) -> bool:
        if isinstance(peer, Selector):
            return peer.matches(member.labels)
        if isinstance(peer, CidrPeer):
            return means(peer, member)
        if isinstance(peer, FqdnPeer):
            return any(name_matches(peer.pattern, peer.exact, name) for name in member.names())
        if isinstance(peer, ServicePeer):
            wanted = self.service_addresses(peer)
            return member.world and any(inside(prefix, address) for prefix in member.prefixes for address in wanted)
        return peer is Special.ANYTHING


def _narrowest(peer: Selector) -> Requirement | None:
    """The requirement to index a selector by: an In, if possible not one that many selectors share."""
    wanted = [item for item in peer.requirements if item.operator == IN and item.source != SOURCE_CIDR]
    wanted.sort(key=lambda item: item.key in (NAMESPACE, CLUSTER))
    return wanted[0] if wanted else None


def _plain_match(wanted: Selector, labels: Mapping[str, str]) -> bool:
    return wanted.matches(LabelSet.from_mapping(labels))
