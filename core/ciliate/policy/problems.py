"""What is wrong with an object: every refusal names the object, the field, the value and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """One mistake. ``line`` 0 means unknown; ``object`` is ``Kind namespace/name``; ``field`` a path like
    ``spec.ingress[0].toPorts[0].ports[1].port``."""

    file: str
    line: int
    object: str
    field: str
    value: str
    expected: str

    @property
    def place(self) -> str:
        """``file:line``, or what of it is known."""
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def text(self) -> str:
        """The whole problem as one line for people."""
        where = " ".join(part for part in (self.place and self.place + ":", self.object) if part)
        given = f"{self.value} given, " if self.value else ""
        head = f"{where.removesuffix(':')}: " if where else ""
        return f"{head}{self.field}: {given}{self.expected}"

    def __str__(self) -> str:
        return self.text


class PolicyError(ValueError):
    """Objects that cannot be used; ``problems`` lists everything that is wrong with them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problem.text for problem in self.problems))


def show(value: Any) -> str:
    """A value for a message: short, and never more than one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
