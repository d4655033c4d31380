"""Labels with a source, and immutable label sets: what an identity is made of.

Facts behind this module: inventory PO-L01 (sources), PO-L03 (generated labels), PO-L07 (canonical key).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

SOURCE_ANY = "any"
SOURCE_K8S = "k8s"
SOURCE_RESERVED = "reserved"
SOURCE_CIDR = "cidr"
SOURCE_CONTAINER = "container"
SOURCE_UNSPEC = "unspec"
SOURCE_GENERATED = "cilium-generated"
KNOWN_SOURCES = frozenset(
    {
        SOURCE_ANY,
        SOURCE_K8S,
        SOURCE_CONTAINER,
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


_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
MAX_NAME = 63
"""Characters of a label's value, of the name in its key, and of a namespace's name (Kubernetes)."""
MAX_SUBDOMAIN = 253
"""Characters of the prefix of a label's key, and of most objects' names (Kubernetes)."""
KEY_FORM = (
    f"[prefix/]name: a name of at most {MAX_NAME} letters, digits, '-', '_' and '.', a letter or digit at both ends, "
    "and a DNS name as prefix"
)
VALUE_FORM = f"nothing, or at most {MAX_NAME} letters, digits, '-', '_' and '.', a letter or digit at both ends"


def valid_key(key: str) -> bool:
    """Whether Kubernetes takes this as the key of a label."""
    prefix, slash, name = key.rpartition("/")
    return len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None and (not slash or valid_subdomain(prefix))


def valid_value(value: str) -> bool:
    """Whether Kubernetes takes this as the value of a label."""
    return not value or (len(value) <= MAX_NAME and _NAME.fullmatch(value) is not None)


def valid_subdomain(name: str) -> bool:
    """Whether this may be the name of most objects of Kubernetes: lower-case words with dots between."""
    return len(name) <= MAX_SUBDOMAIN and _SUBDOMAIN.fullmatch(name) is not None


def valid_namespace(name: str) -> bool:
    """Whether this may be the name of a namespace: one lower-case word."""
    return len(name) <= MAX_NAME and _DNS_LABEL.fullmatch(name) is not None


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
        """Canonical ``source:key=value;`` string, sorted: equal exactly for equal sets.

        Separators within a part are written as ``%XX``, and so is ``%``; well-formed labels have none of them.
        """
        return "".join(_canonical(label) for label in self._labels)

    @classmethod
    def from_key(cls, key: str) -> LabelSet:
        """The set of a canonical key; ValueError where a part of it is no label."""
        return cls(_from_canonical(text) for text in key.split(";") if text)

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


_WELL_FORMED = "".join(map(chr, range(33, 127))).translate(str.maketrans("", "", "%;"))
"""What stands for itself in a canonical key; a source and a key have separators of their own beside."""
_IN_SOURCE = _WELL_FORMED.translate(str.maketrans("", "", ":/="))
_IN_KEY = _WELL_FORMED.translate(str.maketrans("", "", "="))


def _canonical(label: Label) -> str:
    source, key, value = label
    return f"{quote(source, _IN_SOURCE)}:{quote(key, _IN_KEY)}={quote(value, _WELL_FORMED)};"


def _from_canonical(text: str) -> Label:
    source, colon, rest = text.partition(":")
    key, _, value = rest.partition("=")
    if not colon or not key:
        raise ValueError(f"label {text!r}: expected source:key=value")
    return Label(sys.intern(unquote(source)), sys.intern(unquote(key)), unquote(value))
