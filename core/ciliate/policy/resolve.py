"""Resolution: the rules that select an identity -> who may do what -> map state, whole or for one peer at a time.

Source of behaviour: inventory PO-R01 to PO-R09. One policy is shared by all endpoints of the same identity and the
same named ports; every change of it is handed on as a delta of entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

import msgspec
from pyroaring import BitMap

from ciliate.policy import bounds
from ciliate.policy.bounds import PolicyBoundError
from ciliate.policy.mapstate import ANY_IDENTITY, EGRESS, INGRESS, MAX_ENTRIES, PolicyEntry, PolicyKey
from ciliate.policy.model import CidrPeer, Rule, Section, Special
from ciliate.policy.places import NOWHERE
from ciliate.policy.porttable import (
    ALL_TRAFFIC,
    NamedPorts,
    PortKey,
    PortTable,
    Proxies,
    anyone_table,
    plain_table,
    port_table,
)
from ciliate.policy.selectors import Cached, SelectorCache

NO_NAMES: NamedPorts = {}
LOCALHOST = Section("allow-localhost", None)
"""Implied on ingress: the node itself may reach its pods (PO-R06). Its number 0 says that no rule decided."""
Changes = dict[PolicyKey, PolicyEntry | None]
"""Entries to write, and keys to delete (None)."""
Tables = list[tuple[tuple[int, int, int], Mapping[PortKey, PolicyEntry]]]
"""Entries by direction, identity and place."""
MUCH = 1 << 16
"""Selectors looked at for stale places, from which on a policy is rather worked out anew."""


NamesKey = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]


def names_key(names: NamedPorts) -> NamesKey:
    """Named ports in a form that can be compared and hashed."""
    return tuple(sorted((name, tuple((str(p), int(n)) for p, n in found)) for name, found in names.items()))


class Context(msgspec.Struct, frozen=True):
    """What resolution needs besides the rules."""

    cache: SelectorCache
    enforcement: str
    allow_localhost: bool
    proxies: Proxies
    peer_names: Callable[[int], NamedPorts]
    refused: Mapping[Rule, str] = {}
    """Rules that are not admitted, and why: endpoints that they select keep the policy that they have."""


class DirectionPolicy:
    """One direction of one policy: its sections by peer selector, and a port table per peer identity.

    Where ipBlocks speak of pods there is a table per place as well, for anyone there. It is asked after the identity's
    own, which is right where both only allow. Else (requires, layer 7, port names of the peer) what an identity may do
    at a place is put together in a table of the pair, which is asked before both.
    """

    def __init__(self, direction: int, enforce: bool, names: NamedPorts, context: Context) -> None:
        self.direction = direction
        self.enforce = enforce
        self.anyone: list[Section] = []
        self.groups: dict[Cached, list[Section]] = {}
        self.requires: dict[Cached, None] = {}
        self.tables: dict[int, PortTable] = {}
        self.places: dict[int, PortTable] = {}
        self.pairs: dict[int, dict[int, PortTable]] = {}
        """By identity, then place."""
        self._located: dict[int, tuple[int, ...]] = {}
        self._names = names
        self._context = context
        self._memo: dict[object, PortTable] = {}
        self._order: dict[Cached, int] = {}
        self._lists: list[list[Section]] = []
        self._filters: frozenset[Section] = frozenset()
        self.named = False
        self._localhost = False
        self.size = 0
        """How many entries there are."""

    def add(self, section: Section, acquire: Callable[[object], Cached]) -> None:
        """Take in a section."""
        for wanted in section.requires:
            self.requires[acquire(wanted)] = None
        if section.peers is None:
            self.anyone.append(section)
            return
        for peer in section.peers:
            if peer is not Special.NOTHING:
                self.groups.setdefault(acquire(peer), []).append(section)

    def build(self) -> None:
        """Make every port table."""
        sections = [*self.anyone, *(item for group in self.groups.values() for item in group)]
        self.named = self.direction == EGRESS and any(section.named for section in sections)
        self._filters = frozenset(section for section in sections if section.filters)
        self._localhost = self.direction == INGRESS and self._context.allow_localhost
        # the blocks of one section are one list of sections, however many they are
        same: dict[tuple[Section, ...], int] = {}
        self._order = {cached: same.setdefault(tuple(group), len(same)) for cached, group in self.groups.items()}
        self._lists = list(map(list, same))
        if not self.enforce:
            return
        if sum(len(cached.members) + len(cached.places) for cached in self.groups) > bounds.MAX_MEMBERS:
            raise PolicyBoundError(f"its peers mean more than {bounds.MAX_MEMBERS} identities and prefixes, repeated")
        own: defaultdict[int, set[int]] = defaultdict(set)
        located: defaultdict[int, set[int]] = defaultdict(set)
        for cached, index in self._order.items():
            for number in cached.members:
                own[number].add(index)
            for place in cached.places:
                located[place].add(index)
        self._located = {place: tuple(sorted(indexes)) for place, indexes in located.items()}
        for number in self._everyone_special():
            own.setdefault(number, set())
        allowed = self.required()
        self._check(own.values(), allowed)
        for number, indexes in own.items():
            table = self._table(number, tuple(sorted(indexes)), allowed)
            if table is not None:
                self.tables[number] = table
        if allowed is None and self.anyone:
            self.tables[ANY_IDENTITY] = anyone_table(self.anyone, self._names, self._context.proxies)
        if self._located:
            self._build_places(allowed)
        self.size = sum(len(table.entries) for _, table in self.peers())

    def closed(self) -> DirectionPolicy:
        """The same direction, in which nothing is allowed."""
        return DirectionPolicy(self.direction, self.enforce, NO_NAMES, self._context)

    def _check(self, lists: Iterable[set[int]], allowed: BitMap | None) -> None:
        """PolicyBoundError where the port tables would be more work than one policy may be."""
        weights = [sum(map(bounds.pieces, group)) for group in self._lists]
        anyone = sum(map(bounds.pieces, self.anyone))
        distinct = {*map(frozenset, lists), *map(frozenset, self._located.values())}
        count = anyone + sum(sum(weights[index] for index in found) for found in distinct)
        if anyone and (self.requires or self._filters):
            count += anyone * len(distinct)
        if self._located and (allowed is not None or self.named):
            identities = len(self._context.cache.members) if allowed is None else len(allowed)
            count += identities * len(self._located)
        if count > bounds.MAX_PIECES:
            raise PolicyBoundError(
                f"its rules take {count} steps to be put together, and there may be {bounds.MAX_PIECES}"
            )

    def _build_places(self, allowed: BitMap | None) -> None:
        for place, indexes in self._located.items():
            table = self._place_table(indexes)
            if table is not None:
                self.places[place] = table
        for number in self._mixed(allowed):
            pairs = self._pairs_of(number, self._indexes(number), allowed)
            if pairs:
                self.pairs[number] = pairs

    def _place_table(self, indexes: tuple[int, ...]) -> PortTable | None:
        """What anyone at a place may do; nothing where it depends on who it is."""
        if self.requires:
            return None
        key = (indexes, "place")
        table = self._memo.get(key)
        if table is None:
            table = self._memo[key] = self._make(indexes, True, False, NO_NAMES)
        return table if table.entries else None

    def _mixed(self, allowed: BitMap | None) -> set[int]:
        """Identities for which the table of a place does not say all that holds there."""
        if allowed is not None:
            found: Iterable[int] = allowed
        elif self.named:
            found = self._context.cache.members
        else:
            found = [number for number, table in self.tables.items() if table.refuses]
        return {number for number in found if self._is_mixed(number, allowed)}

    def _is_mixed(self, number: int, allowed: BitMap | None) -> bool:
        member = self._context.cache.members.get(number)
        if member is None or member.world:
            return False  # what is not a pod or node has no place
        if allowed is not None:
            return number in allowed
        table = self.tables.get(number)
        return (table is not None and table.refuses) or (self.named and bool(self._context.peer_names(number)))

    def _indexes(self, number: int) -> list[int]:
        return sorted({index for cached, index in self._order.items() if number in cached.members})

    def _pairs_of(self, number: int, own: Iterable[int], allowed: BitMap | None) -> dict[int, PortTable]:
        found = {}
        for place, indexes in self._located.items():
            table = self._pair(number, own, indexes, allowed)
            if table is not None:
                found[place] = table
        return found

    def _pair(
        self, number: int, own: Iterable[int], located: Iterable[int], allowed: BitMap | None
    ) -> PortTable | None:
        """What an identity may do at a place; None where that is no more than anywhere."""
        table = self._table(number, tuple(sorted({*own, *located})), allowed)
        anywhere = self.tables.get(number)
        return None if table is None or (anywhere is not None and anywhere.entries == table.entries) else table

    def _everyone_special(self) -> Iterable[int]:
        """Identities that need a table of their own though no selector may name them."""
        special = set(self._context.cache.hosts) if self._localhost else set()
        if self.anyone and (self.requires or (self.named and any(section.named for section in self.anyone))):
            # what speaks of anyone has to be written out for each identity that it may mean
            special.update(self._context.cache.members)
        return special

    def required(self) -> BitMap | None:
        """Identities that meet every requires; None where there is none."""
        return BitMap.intersection(*(cached.members for cached in self.requires)) if self.requires else None

    def _table(self, number: int, indexes: tuple[int, ...], allowed: BitMap | None) -> PortTable | None:
        met = allowed is None or number in allowed
        localhost = self._localhost and number in self._context.cache.hosts
        names = self._context.peer_names(number) if self.named else NO_NAMES
        key = (indexes, met, localhost, names_key(names) if names else ())
        table = self._memo.get(key)
        if table is None:
            table = self._memo[key] = self._make(indexes, met, localhost, names)
        return table if table.entries else None

    def _make(self, indexes: tuple[int, ...], met: bool, localhost: bool, names: NamedPorts) -> PortTable:
        own = dict.fromkeys(section for index in indexes for section in self._lists[index]) if met else {}
        anyone: list[Section] = self.anyone if met else []
        if anyone and (self.requires or (self.named and names)):
            own.update(dict.fromkeys(section for section in anyone if self.requires or section.named))
            anyone = [section for section in anyone if section not in own]
        if localhost:
            own[LOCALHOST] = None
        numbers = names if self.named else self._names
        if self._filters.isdisjoint(own) and self._filters.isdisjoint(anyone):
            return plain_table(own, numbers)
        return port_table(own, anyone, numbers, self._context.proxies)

    def refresh(self, number: int, matching: Iterable[Cached]) -> Changes:
        """Work out one peer identity anew, from the selectors that match it now; returns the changed entries."""
        if not self.enforce:
            return {}
        old = self.tables.pop(number, None)
        indexes = sorted({self._order[cached] for cached in matching if cached in self._order})
        table = None
        if indexes or number in self._everyone_special():
            table = self._table(number, tuple(indexes), self.required())
        if table is not None:
            self.tables[number] = table
        changes: Changes = {}
        self._replace((number, 0), old, table, changes)
        if self._located:
            self._refresh_pairs(number, indexes, changes)
        return changes

    def _refresh_pairs(self, number: int, indexes: list[int], changes: Changes) -> None:
        old, allowed = self.pairs.pop(number, {}), self.required()
        new = self._pairs_of(number, indexes, allowed) if self._is_mixed(number, allowed) else {}
        if new:
            self.pairs[number] = new
        for place in old.keys() | new.keys():
            self._replace((number, place), old.get(place), new.get(place), changes)

    def refresh_place(self, place: int) -> Changes:
        """Work out a place anew, with all that pairs say of it; returns the changed entries."""
        if not self.enforce:
            return {}
        indexes = tuple(sorted({index for cached, index in self._order.items() if place in cached.places}))
        if not indexes and place not in self._located:
            return {}
        old = self.places.pop(place, None)
        self._located.pop(place, None)
        changes: Changes = {}
        table = self._place_table(indexes) if indexes else None
        if indexes:
            self._located[place] = indexes
        if table is not None:
            self.places[place] = table
        self._replace((ANY_IDENTITY, place), old, table, changes)
        allowed = self.required()
        for number in self._mixed(allowed) | self.pairs.keys():
            self._refresh_pair(number, place, allowed, changes)
        return changes

    def _refresh_pair(self, number: int, place: int, allowed: BitMap | None, changes: Changes) -> None:
        pairs, indexes = self.pairs.setdefault(number, {}), self._located.get(place)
        old = pairs.pop(place, None)
        table = self._pair(number, self._indexes(number), indexes, allowed) if indexes else None
        if table is not None:
            pairs[place] = table
        if not pairs:
            del self.pairs[number]
        self._replace((number, place), old, table, changes)

    def _replace(self, peer: tuple[int, int], old: PortTable | None, new: PortTable | None, changes: Changes) -> None:
        """One peer has another table than before."""
        self.size += (len(new.entries) if new else 0) - (len(old.entries) if old else 0)
        self._compare(peer, old, new, changes)

    def changes_from(self, old: DirectionPolicy) -> Changes:
        """What turns the entries of ``old`` into these."""
        before = dict(old.peers())
        if not before:
            return dict(self.entries())
        changes: Changes = {}
        for peer, table in self.peers():
            self._compare(peer, before.pop(peer, None), table, changes)
        for peer, table in before.items():
            self._compare(peer, table, None, changes)
        return changes

    def peers(self) -> Iterator[tuple[tuple[int, int], PortTable]]:
        """Every port table with whose it is: identity and place."""
        for number, table in self.tables.items():
            yield (number, 0), table
        for place, table in self.places.items():
            yield (ANY_IDENTITY, place), table
        for number, pairs in self.pairs.items():
            for place, table in pairs.items():
                yield (number, place), table

    def _compare(self, peer: tuple[int, int], old: PortTable | None, new: PortTable | None, changes: Changes) -> None:
        """Add to ``changes`` what the entries of one peer (identity and place) become."""
        before = old.entries if old is not None else {}
        after = new.entries if new is not None else {}
        if before is after or before == after:
            return
        number, place = peer
        for key in before.keys() - after.keys():
            changes[PolicyKey(self.direction, number, *key, place)] = None
        for key, entry in after.items():
            if before.get(key) != entry:
                changes[PolicyKey(self.direction, number, *key, place)] = entry

    def find(
        self, number: int, protocol: int, port: int | None, place: int = NOWHERE
    ) -> tuple[PortKey, PortTable] | None:
        """What decides a packet, in the datapath's order (``mapstate.lookup``); port None: any port of the protocol."""
        asked = [self.tables.get(number), self.tables.get(ANY_IDENTITY)]
        if place:
            asked = [self.pairs.get(number, {}).get(place), asked[0], self.places.get(place), asked[1]]
        for table in asked:
            if table is None:
                continue
            key = find_in_state(table.entries, protocol, port, table.lengths)
            if key is not None:
                return key, table
        return None

    def entries(self) -> Iterator[tuple[PolicyKey, PolicyEntry]]:
        """Every entry of the map state."""
        return iter(written_out(((self.direction, *peer), table.entries) for peer, table in self.peers()).items())


def written_out(
    tables: Iterable[tuple[tuple[int, int, int], Mapping[PortKey, PolicyEntry]]],
) -> dict[PolicyKey, PolicyEntry]:
    """The map state of port tables by direction, identity and place."""
    # there can be thousands: a named tuple's own constructor takes three times as long
    make = tuple.__new__
    return {
        make(PolicyKey, (direction, number, protocol, port, length, place)): entry
        for (direction, number, place), table in tables
        for (protocol, port, length), entry in table.items()
    }


ALL_LENGTHS = range(16, -1, -1)


def find_in_state(
    keys: Container[PortKey], protocol: int, port: int | None, lengths: Iterable[int] = ALL_LENGTHS
) -> PortKey | None:
    """The first port key that a packet meets; port None: any port of the protocol, protocol 0: all traffic."""
    for length in lengths if port is not None else (0,):
        key = (protocol, (port or 0) & (0xFFFF << (16 - length)) & 0xFFFF, length)
        if key in keys:
            return key
    return ALL_TRAFFIC if ALL_TRAFFIC in keys else None


class SharedPolicy:
    """What one identity's endpoints enforce. ``rules`` are those that select it."""

    def __init__(self, identity: int, names: NamedPorts) -> None:
        self.identity = identity
        self.names = names
        self.rules: dict[Rule, None] = {}
        self.sides: tuple[DirectionPolicy, DirectionPolicy] | None = None
        self.dirty = True
        self.stale: dict[int, None] = {}
        self.stale_places: dict[int, None] = {}
        self._held: dict[Cached, None] = {}
        self.problem = ""
        """Why the rules could not be resolved: what is here is an older policy, or one that allows nothing."""

    @property
    def size(self) -> int:
        """How many entries there are."""
        return sum(side.size for side in self.sides or ())

    @property
    def crowded(self) -> bool:
        """Whether these are more than an endpoint may have; then nothing is written out that may be left out."""
        return self.size > MAX_ENTRIES

    def weight(self, cached: Cached) -> int:
        """How many entries a prefix takes, at most, that a selector means: of its identity, and of its place."""
        found = sum(bounds.pieces(section) for side in self.sides or () for section in side.groups.get(cached, ()))
        return found * (2 if isinstance(cached.peer, CidrPeer) and cached.peer.pods else 1)

    def much_is_stale(self) -> bool:
        """Whether it is cheaper to work everything out anew than what is known to be stale."""
        groups = sum(len(side.groups) for side in self.sides or ())
        return len(self.stale_places) * groups > MUCH

    def rebuild(self, context: Context, init: bool) -> Changes | None:
        """Resolve from the rules; returns what changed against the last resolution, None: too much to be told.

        Where the rules take too much, what was resolved last stays, and ``problem`` says why.
        """
        crowded, troubled = self.crowded, bool(self.problem)
        self.problem = next((context.refused[rule] for rule in self.rules if rule in context.refused), "")
        old, held = self.sides, self._held
        self._held = {}

        def acquire(peer: object) -> Cached:
            cached = context.cache.acquire(peer)  # type: ignore[arg-type]
            if cached in self._held:
                context.cache.release(cached)
            else:
                self._held[cached] = None
                cached.users.add(self)
            return cached

        sides: list[DirectionPolicy] = []
        for direction in (INGRESS, EGRESS):
            lists = [rule.egress if direction else rule.ingress for rule in self.rules]
            enforce = enforces(context.enforcement, init, any(found is not None for found in lists))
            side = DirectionPolicy(direction, enforce, self.names if direction == INGRESS else NO_NAMES, context)
            sides.append(side)
            if self.problem:
                continue
            try:
                for found in lists:
                    for section in found or ():
                        side.add(section, acquire)
                side.build()
            except PolicyBoundError as error:
                self.problem = str(error)
        self.dirty, self.stale, self.stale_places = False, {}, {}
        if self.problem:
            self._let_go(context.cache, self._held, kept=held)
            self._held = held
            self.sides = old or (sides[0].closed(), sides[1].closed())
            return None
        self.sides = (sides[0], sides[1])
        self._let_go(context.cache, held, kept=self._held)
        return None if crowded or troubled or self.crowded else self._changes(old)

    def _let_go(self, cache: SelectorCache, held: Iterable[Cached], kept: Container[Cached]) -> None:
        for cached in held:
            if cached not in kept:
                cached.users.discard(self)
            cache.release(cached)

    def _changes(self, old: tuple[DirectionPolicy, DirectionPolicy] | None) -> Changes:
        if self.sides is None:
            return {}
        if old is None:
            return dict(self.map_state())
        changes: Changes = {}
        for side, before in zip(self.sides, old, strict=True):
            changes.update(side.changes_from(before))
        return changes

    def refresh(self, context: Context) -> Changes | None:
        """Work out the identities and places that came, went or changed; returns as ``rebuild``."""
        changes: Changes = {}
        crowded = self.crowded
        stale, self.stale = self.stale, {}
        places, self.stale_places = self.stale_places, {}
        for number in stale:
            member = context.cache.members.get(number)
            matching = context.cache.matching(member) if member is not None else []
            for side in self.sides or ():
                changes.update(side.refresh(number, matching))
        for place in places:
            for side in self.sides or ():
                changes.update(side.refresh_place(place))
        return None if crowded or self.crowded or self.problem else changes

    def close(self, cache: SelectorCache) -> None:
        """Give the selectors back."""
        for cached in self._held:
            cached.users.discard(self)
            cache.release(cached)
        self._held = {}

    def tables(self) -> Tables:
        """Every port table, by direction, identity and place."""
        return [((side.direction, *peer), table.entries) for side in self.sides or () for peer, table in side.peers()]

    def map_state(self) -> dict[PolicyKey, PolicyEntry]:
        """Every entry."""
        return written_out(self.tables())


def enforces(enforcement: str, init: bool, ruled: bool) -> bool:
    """Whether a direction is enforced (PO-R01, PO-R07)."""
    if enforcement == "never":
        return False
    return enforcement == "always" or ruled or init
