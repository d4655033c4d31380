"""Which known name a misspelt one stands for: a typing error of it, never another word that is merely like it."""

from __future__ import annotations

from collections.abc import Iterable

_SHORT = 5
"""Names with fewer letters than this may have one typing error, others two."""


def closest(name: str, known: Iterable[str]) -> str:
    """The one known name that differs from ``name`` by a typing error; empty where none does, or several do.

    Upper and lower case, and the characters between words, are no difference.
    """
    plain = _plain(name)
    most = 1 if len(plain) < _SHORT else 2
    errors = {
        other: typing_errors(plain, _plain(other), most) for other in known if not _prefixed(plain, _plain(other))
    }
    least = min(errors.values(), default=most + 1)
    found = [other for other, count in errors.items() if count == least]
    return found[0] if least <= most and len(found) == 1 else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?``, or nothing."""
    found = closest(name, known)
    return f"; did you mean {found}?" if found else ""


def typing_errors(one: str, other: str, most: int) -> int:
    """Letters to change, add, leave out or exchange with their neighbour between two words; ``most`` + 1 for more."""
    if abs(len(one) - len(other)) > most:
        return most + 1
    before: list[int] = []
    row = list(range(len(other) + 1))
    for index, letter in enumerate(one, 1):
        above, before, row = before, row, [index]
        for column, wanted in enumerate(other, 1):
            best = min(before[column] + 1, row[column - 1] + 1, before[column - 1] + (letter != wanted))
            if above and column > 1 and letter == other[column - 2] and one[index - 2] == wanted:
                best = min(best, above[column - 2] + 1)
            row.append(best)
    return min(row[-1], most + 1)


def _prefixed(one: str, other: str) -> bool:
    """True where one is the other behind a word as short as no, un, to: that is meant."""
    shorter, longer = sorted((one, other), key=len)
    return len(longer) - len(shorter) > 1 and longer.endswith(shorter)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
