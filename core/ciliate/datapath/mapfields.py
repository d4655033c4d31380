"""Keys and values of maps as named fields, and how entries of one layout become entries of another by these names."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_FIELD = re.compile(r"([a-z][a-z0-9_.]*):([0-9]*)([BHIQsx])(!?)\Z")


class Field(NamedTuple):
    """One field: where it begins, how many bytes it has, whether it is one number in the processor's order, and whether
    an entry that has something in it is not to be read without knowing of it."""

    name: str
    offset: int
    size: int
    number: bool
    vital: bool


@dataclass(frozen=True)
class Fields:
    """A struct as text, ``name:CODE`` for each field with the codes of Python's ``struct``, without any alignment.

    ``x`` is padding, which is zero. ``!`` behind the code: an entry in which this field is not zero means something
    else to who does not know the field, so that it must be left out rather than read without it.
    """

    text: str

    @cached_property
    def all(self) -> tuple[Field, ...]:
        """The fields in their order; ValueError where the text is wrong."""
        found, offset = [], 0
        for item in self.text.split():
            match = _FIELD.match(item)
            if match is None:
                raise ValueError(f"field {item!r}: expected NAME:CODE with a code of Python's struct, B H I Q Ns or Nx")
            name, count, code, vital = match.groups()
            size = struct.calcsize(f"={count}{code}")
            number = code in "BHIQ" and count in ("", "1")
            if code != "x":
                found.append(Field(name, offset, size, number, bool(vital)))
            offset += size
        return tuple(found)

    @cached_property
    def struct(self) -> struct.Struct:
        """The struct."""
        return struct.Struct("=" + "".join(item.partition(":")[2].rstrip("!") for item in self.text.split()))

    @property
    def size(self) -> int:
        """Bytes."""
        return self.struct.size

    def named(self) -> dict[str, Field]:
        """The fields by name."""
        return {item.name: item for item in self.all}


class _Run(NamedTuple):
    source: int
    target: int
    size: int


class Shape(NamedTuple):
    """Key and value of a map."""

    key: Fields
    value: Fields

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of key and value."""
        return self.key.size, self.value.size


Entries = list[tuple[bytes, bytes]]
Convert = Callable[[Entries], Entries]
"""Entries of one layout as entries of the next one; one that cannot be said in the other layout is left out."""


@dataclass(frozen=True)
class Reading:
    """How one struct is read as another one, by the names of fields: what both have is copied, what is new is zero.

    An entry is left out where a field that the other one does not have, or has with fewer bytes, has something to say:
    any field of a key, and vital fields of a value.
    """

    old: Fields
    new: Fields
    key: bool
    runs: tuple[_Run, ...] = field(init=False)
    zero: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        pairs = list(self._pairs())
        object.__setattr__(self, "runs", _joined([run for run, _ in pairs if run.size]))
        object.__setattr__(self, "zero", tuple(part for _, rest in pairs for part in rest))

    def _pairs(self) -> Iterator[tuple[_Run, list[tuple[int, int]]]]:
        wanted = self.new.named()
        for item in self.old.all:
            other, vital = wanted.get(item.name), self.key or item.vital
            if other is None:
                yield _Run(0, 0, 0), [(item.offset, item.size)] if vital else []
                continue
            size = min(item.size, other.size)
            # of a number its low bytes, of bytes the first ones
            low = sys.byteorder == "little" or not item.number
            start, place = (0, 0) if low else (item.size - size, other.size - size)
            left = [(item.offset + (size if low else 0), item.size - size)] if vital and item.size > size else []
            yield _Run(item.offset + start, other.offset + place, size), left

    def batch(self, data: bytes | bytearray | memoryview, count: int) -> tuple[bytes, list[int]]:
        """``count`` structs that lie one behind the other, converted; and which of them have to be left out."""
        old, new = self.old.size, self.new.size
        source, target = memoryview(data)[: count * old], bytearray(count * new)
        for run in self.runs:
            for byte in range(run.size):
                target[run.target + byte :: new] = bytes(source[run.source + byte :: old])
        lost: set[int] = set()
        for offset, size in self.zero:
            for byte in range(offset, offset + size):
                column = bytes(source[byte::old])
                if any(column):
                    lost.update(index for index, value in enumerate(column) if value)
        return bytes(target), sorted(lost)


def _joined(runs: list[_Run]) -> tuple[_Run, ...]:
    """Runs that follow each other in both structs as one."""
    found: list[_Run] = []
    for run in sorted(runs):
        last = found[-1] if found else None
        if last and (last.source + last.size, last.target + last.size) == (run.source, run.target):
            found[-1] = _Run(last.source, last.target, last.size + run.size)
        else:
            found.append(run)
    return tuple(found)


def by_names(old: Shape, new: Shape) -> Convert:
    """Entries of ``old`` as entries of ``new``, by the names of their fields."""
    key, value = Reading(old.key, new.key, True), Reading(old.value, new.value, False)

    def convert(entries: Entries) -> Entries:
        count, keys, values = len(entries), b"".join(item for item, _ in entries), b"".join(item for _, item in entries)
        new_keys, lost = key.batch(keys, count)
        new_values, more = value.batch(values, count)
        left_out = {*lost, *more}
        wide, broad = new.sizes
        return [
            (new_keys[at * wide : (at + 1) * wide], new_values[at * broad : (at + 1) * broad])
            for at in range(count)
            if at not in left_out
        ]

    return convert
