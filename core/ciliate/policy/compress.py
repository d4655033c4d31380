"""A smaller map state with the same verdict for every packet, for states that would not fit their map.

Three steps that change no verdict (``mapstate.lookup``): aligned neighbours of one peer become one shorter prefix; an
entry that says what the next one of its peer says goes; and so does one that says what holds for any peer, unless
places are asked before that. What is lost is which of several rules is named as the one that decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ciliate.policy.mapstate import ANY_IDENTITY, PolicyEntry, PolicyKey
from ciliate.policy.porttable import ALL_TRAFFIC, PortKey, ancestors
from ciliate.policy.resolve import Tables, written_out

Table = dict[PortKey, PolicyEntry]
Peer = tuple[int, int, int]
"""Direction, identity and place."""


def compress(state: Mapping[PolicyKey, PolicyEntry]) -> dict[PolicyKey, PolicyEntry]:
    """The smaller state. Costs some 2 µs an entry."""
    tables: dict[Peer, Table] = {}
    for (direction, identity, protocol, port, length, place), entry in state.items():
        tables.setdefault((direction, identity, place), {})[protocol, port, length] = entry
    return written_out(compressed(tables.items()))


def compressed(tables: Iterable[tuple[Peer, Mapping[PortKey, PolicyEntry]]]) -> Tables:
    """Smaller tables with the same verdicts. Those that peers share are looked at once, however many these are."""
    same: dict[int, Table] = {}
    small: dict[frozenset[tuple[PortKey, PolicyEntry]], Table] = {}
    found: dict[Peer, Table] = {}
    for name, table in tables:
        done = same.get(id(table))
        if done is None:
            content = frozenset(table.items())
            if content not in small:
                small[content] = _within(table)
            done = same[id(table)] = small[content]
        found[name] = done
    return list(_beside_anyone(found))


def _beside_anyone(tables: Mapping[Peer, Table]) -> Iterator[tuple[Peer, Table]]:
    known: dict[tuple[int, int], Table] = {}
    placed = {direction for direction, _, place in tables if place}
    for (direction, identity, place), table in tables.items():
        anyone = tables.get((direction, ANY_IDENTITY, 0))
        # whoever is asked next has to be anyone: of identities that is true only where no place is asked in between
        next_is_anyone = not identity and place if direction in placed else identity
        if anyone is not None and next_is_anyone:
            name = direction, id(table)
            if name not in known:
                known[name] = _beside(table, anyone)
            table = known[name]
        yield (direction, identity, place), table


def same(one: PolicyEntry, other: PolicyEntry) -> bool:
    """Whether two entries do the same, whichever rule they name."""
    return one.verdict == other.verdict and one.proxy_port == other.proxy_port


def _within(table: Mapping[PortKey, PolicyEntry]) -> Table:
    """Join neighbours, then leave out what the next shorter prefix says anyway."""
    result = dict(table)
    for length in range(16, 0, -1):
        for key in [key for key in result if key[2] == length and key[0]]:
            _join(result, key)
    for key, entry in list(result.items()):
        above = next((result[item] for item in ancestors(key) if item in result), None)
        if above is not None and same(above, entry):
            del result[key]
    return result


def _join(table: Table, key: PortKey) -> None:
    """Put a prefix and its neighbour into the prefix of both; an entry there is never met, so it may be replaced."""
    protocol, port, length = key
    neighbour = (protocol, port ^ (1 << (16 - length)), length)
    if key not in table or neighbour not in table or not same(table[key], table[neighbour]):
        return
    table[protocol, min(port, neighbour[1]), length - 1] = table[key]
    del table[key], table[neighbour]


def _beside(table: Table, anyone: Table) -> Table:
    """Leave out what holds for any peer: keys that hide nothing shorter of the peer's own, shortest first."""
    result = dict(table)
    for key in sorted(table, key=lambda item: (item != ALL_TRAFFIC, item[2])):
        if not any(item in result for item in ancestors(key)) and _holds(key, table[key], anyone):
            del result[key]
    return result


def _holds(key: PortKey, entry: PolicyEntry, anyone: Table) -> bool:
    """Whether every packet of ``key`` meets the same in the table of any peer."""
    reached = next((anyone[item] for item in (key, *ancestors(key)) if item in anyone), None)
    return (
        reached is not None
        and same(reached, entry)
        and all(same(other, entry) for item, other in anyone.items() if _inside(item, key))
    )


def _inside(inner: PortKey, outer: PortKey) -> bool:
    if outer == ALL_TRAFFIC:
        return True
    protocol, port, length = outer
    return inner[0] == protocol and inner[2] > length and inner[1] >> (16 - length) == port >> (16 - length)
