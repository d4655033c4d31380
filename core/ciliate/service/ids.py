"""Numbers that are given once: a number that went comes back only for the same thing."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
REMEMBERED = 65536
"""Things that went and whose numbers are kept for them."""


class IdPool(Generic[K]):
    """Counts upwards, so that nothing in the kernel that still has an old number can mean another thing."""

    def __init__(self, first: int = 1) -> None:
        self._next = first
        self._released: OrderedDict[K, int] = OrderedDict()

    @property
    def next(self) -> int:
        """The number that the next new thing gets."""
        return self._next

    def take(self, key: K) -> int:
        """A number for ``key``: the one that it had, where it had one lately, or a new one."""
        number = self._released.pop(key, 0)
        if not number:
            number, self._next = self._next, self._next + 1
        return number

    def claim(self, number: int) -> None:
        """A number that is in use already, from disk or by choice of the user."""
        self._next = max(self._next, number + 1)

    def release(self, key: K, number: int) -> None:
        """The thing went; its number waits for it."""
        self._released[key] = number
        if len(self._released) > REMEMBERED:
            self._released.popitem(last=False)
