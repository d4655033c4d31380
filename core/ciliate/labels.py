"""Labels with a source, and immutable label sets: what an identity is made of.

Facts behind this module: inventory PO-L01 (sources), PO-L03 (generated labels), PO-L07 (canonical key).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

SOURCE_ANY = "any"
SOURCE_K8S = "k8s"
SOURCE_RESERVED = "reserved"
SOURCE_CIDR = "cidr"
SOURCE_UNSPEC = "unspec"
SOURCE_GENERATED = "cilium-generated"
KNOWN_SOURCES = frozenset(
    {
        SOURCE_ANY,
        SOURCE_K8S,
        "container",
        SOURCE_RESERVED,
        SOURCE_CIDR,
        "mesos",
        SOURCE_UNSPEC,
        SOURCE_GENERATED,
    }
)

NAMESPACE = "io.kubernetes.pod.namespace"
NAMESPACE_LABELS_PREFIX = "io.cilium.k8s.namespace.labels."
POLICY_PREFIX = "io.cilium.k8s.policy."
CLUSTER = POLICY_PREFIX + "cluster"
SERVICE_ACCOUNT = POLICY_PREFIX + "serviceaccount"
FIXED_IDENTITY = "io.cilium.fixed-identity"
POLICY_NAME = POLICY_PREFIX + "name"
POLICY_NAMESPACE = POLICY_PREFIX + "namespace"
POLICY_UID = POLICY_PREFIX + "uid"
POLICY_DERIVED_FROM = POLICY_PREFIX + "derived-from"


class Label(NamedTuple):
    """One label. ``source`` says who vouches for it; only the system may use ``reserved`` and ``cidr``."""

    source: str
    key: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.key}={self.value}" if self.value else f"{self.source}:{self.key}"


@lru_cache(maxsize=65536)
def parse_label(text: str, default_source: str = SOURCE_UNSPEC) -> Label:
    """Parse ``[source:]key[=value]``.

    A prefix before the first ``:`` is a source only where it is a known one and stands before any ``=``.
    Raises ValueError naming the text where the key is empty.
    """
    name, _, value = text.partition("=")
    source, colon, key = name.partition(":")
    if not colon or source not in KNOWN_SOURCES:
        source, key = default_source, name
    if not key:
        raise ValueError(f"label {text!r}: expected [source:]key[=value] with a key")
    return Label(sys.intern(source), sys.intern(key), value)


class LabelSet:
    """An immutable, hashable, sorted set of labels with one value per (source, key)."""

    # a cluster has a hundred thousand of these: nothing is kept that can be worked out
    __slots__ = ("_hash", "_labels")

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        by_name = {(label.source, label.key): label for label in labels}
        self._labels = tuple(sorted(by_name.values()))
        self._hash = hash(self._labels)

    @classmethod
    def parse(cls, texts: Iterable[str], default_source: str = SOURCE_UNSPEC) -> LabelSet:
        """Build from ``[source:]key[=value]`` strings; ValueError on a malformed one."""
        return cls(parse_label(text, default_source) for text in texts)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, str], source: str = SOURCE_K8S) -> LabelSet:
        """Build from a Kubernetes label map, all from one source."""
        return cls(Label(source, key, value) for key, value in mapping.items())

    @property
    def key(self) -> str:
        """Canonical ``source:key=value;`` string, sorted: equal exactly for equal sets."""
        return "".join(f"{source}:{key}={value};" for source, key, value in self._labels)

    def get(self, key: str, source: str = SOURCE_ANY) -> str | None:
        """The value of ``key``, or None where it is absent; source ``any`` looks in every source."""
        for label in self._labels:
            if label.key == key and source in (SOURCE_ANY, label.source):
                return label.value
        return None

    def union(self, other: Iterable[Label]) -> LabelSet:
        """A new set; labels of ``other`` win."""
        return LabelSet((*self._labels, *other))

    def strings(self) -> list[str]:
        """Every label as ``source:key[=value]``, sorted."""
        return [str(label) for label in self._labels]

    def __iter__(self) -> Iterator[Label]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __contains__(self, label: object) -> bool:
        return isinstance(label, Label) and label in self._labels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelSet) and self._labels == other._labels

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"LabelSet({self.key!r})"
