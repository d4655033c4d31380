"""Which node a pod of a lab lives on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


class Shape(msgspec.Struct, frozen=True):
    """What a lab is built like: how many nodes, how packets get from one to another, what store they share."""

    nodes: int = 1
    tunnel: str = "disabled"
    kvstore: str = "embedded"


ONE_NODE = Shape()


class Placement:
    """Nodes in turn, except for pods that name one."""

    def __init__(self, nodes: Sequence[str], begun: int = 0) -> None:
        """``begun``: how many pods have been placed before."""
        self._nodes = nodes
        self._turn = begun
        self._names: dict[str, str] = {}

    def next(self) -> str:
        """The node whose turn it is."""
        self._turn += 1
        return self._nodes[(self._turn - 1) % len(self._nodes)]

    def named(self, name: Any) -> str:
        """The node of a pod's ``spec.nodeName``, empty where it has none.

        Names that are none of the lab's stand for its nodes in the order in which they come, the first one again
        when they are used up: pods with the same name are on the same node.
        """
        if not name:
            return ""
        if name in self._nodes:
            return str(name)
        return self._names.setdefault(str(name), self._nodes[len(self._names) % len(self._nodes)])
