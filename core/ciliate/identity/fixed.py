"""Identities whose numbers an administrator fixed (inventory PO-L04): option ``fixed-identity-mapping``.

A pod claims one by the label ``io.cilium.fixed-identity=NAME``, and only names of the mapping count: to write a name
there is to trust whoever may label pods with it. An entry with a namespace trusts the pods of that namespace alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ciliate.identity.numeric import FIXED_MAX, FIXED_MIN, RESERVED, Identity
from ciliate.labels import CLUSTER, FIXED_IDENTITY, NAMESPACE, SOURCE_K8S, SOURCE_RESERVED, Label, LabelSet

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
TAKEN = frozenset({*RESERVED.values(), "unknown", "all", "none", "cluster"})
"""Names that mean something else in policies."""


class FixedIdentity(msgspec.Struct, frozen=True):
    """One entry of the mapping; without a namespace pods of every namespace may claim it."""

    number: int
    name: str
    namespace: str = ""

    def labels(self, cluster: str) -> LabelSet:
        """The labels that policies select it by: its name, and what is true of every pod that may claim it."""
        found = [Label(SOURCE_RESERVED, self.name), Label(SOURCE_K8S, CLUSTER, cluster)]
        if self.namespace:
            found.append(Label(SOURCE_K8S, NAMESPACE, self.namespace))
        return LabelSet(found)


def parse_mapping(text: str) -> tuple[FixedIdentity, ...]:
    """``NUMBER=[NAMESPACE/]NAME,…`` or the same as a JSON object. ValueError names the entry and what was expected."""
    found: list[FixedIdentity] = []
    for number, name in _pairs(text):
        entry = _entry(number, name)
        for other in found:
            if entry.number == other.number or entry.name == other.name:
                raise ValueError(f"entry {number}={name}: expected each number and each name once")
        found.append(entry)
    return tuple(found)


def _pairs(text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("{"):
        # pairs, so that a number that is there twice shows
        yield from json.loads(text, object_pairs_hook=list)
        return
    for part in text.split(","):
        number, equals, name = part.partition("=")
        if equals:
            yield number.strip(), name.strip()
        elif part.strip():
            raise ValueError(f"entry {part.strip()!r}: expected NUMBER=[NAMESPACE/]NAME")


def _entry(number: str, value: Any) -> FixedIdentity:
    where = f"entry {number}={value}"
    if not (number.isascii() and number.isdigit() and FIXED_MIN <= int(number) <= FIXED_MAX):
        raise ValueError(f"{where}: number {number!r} given, expected {FIXED_MIN} to {FIXED_MAX}")
    namespace, slash, name = value.rpartition("/") if isinstance(value, str) else ("", "", "")
    if slash and not _NAMESPACE.fullmatch(namespace):
        raise ValueError(f"{where}: namespace {namespace!r} given, expected the name of a namespace")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: name {name!r} given, expected the value of a label (1 to 63 letters and digits)")
    if name in TAKEN:
        raise ValueError(f"{where}: name {name!r} has a meaning of its own, expected another")
    return FixedIdentity(int(number), name, namespace)


class FixedIdentities:
    """The mapping of one cluster."""

    def __init__(self, entries: Iterable[FixedIdentity] = (), cluster: str = "default") -> None:
        self._by_name = {entry.name: entry for entry in entries}
        self._cluster = cluster

    @property
    def names(self) -> list[str]:
        """The names that pods may claim."""
        return list(self._by_name)

    def claimed(self, labels: LabelSet) -> LabelSet | None:
        """The labels of the fixed identity that a pod with these labels claims; None where it claims none of ours."""
        name = labels.get(FIXED_IDENTITY, SOURCE_K8S)
        entry = self._by_name.get(name) if name else None
        if entry is None or entry.namespace not in ("", labels.get(NAMESPACE, SOURCE_K8S)):
            return None
        return entry.labels(self._cluster)

    def identities(self) -> list[Identity]:
        """Every one, by number."""
        return [Identity(entry.number, entry.labels(self._cluster)) for entry in self._ordered()]

    def _ordered(self) -> list[FixedIdentity]:
        return sorted(self._by_name.values(), key=lambda entry: entry.number)
