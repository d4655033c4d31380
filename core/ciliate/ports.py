"""Ranges of ports: (first, last), both included. Pure."""

from __future__ import annotations

from collections.abc import Iterable

PortRange = tuple[int, int]
HIGHEST = 65535


def parse_range(text: str) -> PortRange | None:
    """``30000-32767``, or nothing. ValueError says what was expected."""
    if not text.strip():
        return None
    first, dash, last = (part.strip() for part in text.partition("-"))
    if not (dash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= HIGHEST):
        raise ValueError("expected two ports from 1 to 65535, the lower one first, as 30000-32767")
    return int(first), int(last)


def merged(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """The same ports in as few ranges as possible, by number."""
    found: list[PortRange] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def without(whole: PortRange, ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """What is left of a range without the others, by number."""
    found, start = [], whole[0]
    for first, last in merged(ranges):
        if start < first:
            found.append((start, min(first - 1, whole[1])))
        start = max(start, last + 1)
    if start <= whole[1]:
        found.append((start, whole[1]))
    return tuple((first, last) for first, last in found if first <= last)


def common(one: Iterable[PortRange], other: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """The ports that are in both."""
    others = list(other)
    pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in one for b in others)
    return merged((first, last) for first, last in pairs if first <= last)


def subtracted(one: Iterable[PortRange], other: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """The ports of one that the other has not."""
    others = list(other)
    return merged(part for item in one for part in without(item, others))
