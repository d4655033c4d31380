"""A cursor over one object that collects every mistake instead of stopping at the first."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from ciliate.document import Document
from ciliate.hints import did_you_mean
from ciliate.labels import KNOWN_SOURCES, NAMESPACE_LABELS_PREFIX, SOURCE_ANY, SOURCE_GENERATED
from ciliate.policy.problems import Problem, show
from ciliate.policy.selector import DOES_NOT_EXIST, EXISTS, IN, OPERATORS, Requirement, Selector, selector

_KEY = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9.]*[a-zA-Z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
SELECTOR_FIELDS = ("matchLabels", "matchExpressions")
LATER_FIELDS = frozenset(
    {
        *("ingressDeny", "egressDeny", "enableDefaultDeny", "nodeSelector", "icmps", "authentication", "log"),
        *("fromNodes", "toNodes", "fromGroups", "serverNames", "listener", "headerMatches"),
        *("originatingTLS", "terminatingTLS", "cidrGroupRef", "cidrGroupSelector"),
    }
)
LATER = "; it is a field of later versions of this kind, and nothing here means the same"
EXPRESSION_FIELDS = ("key", "operator", "values")


class Reader:
    """Reads the fields of one document; ``problems`` is empty exactly where all was well."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.selectors: list[tuple[str, Selector]] = []
        """Those of endpoints, as they are meant, with their fields."""
        self.notes: list[tuple[str, str]] = []
        """Fields that can hardly mean what they say, and what they do mean."""

    def problem(self, path: str, value: Any, expected: str) -> None:
        """Note a mistake. ``value`` is shown unless it is absent."""
        document = self.document
        shown = "" if value is ABSENT else show(value)
        line, named = document.line_of(path), title(document.object)
        self.problems.append(Problem(document.file, line, named, path, shown, expected))

    def mapping(self, value: Any, path: str, fields: Collection[str] | None = None) -> dict[str, Any] | None:
        """A mapping with no fields but these, or None after noting what is wrong."""
        if not isinstance(value, dict):
            self.problem(path, value, "expected a mapping")
            return None
        if fields is not None and not value.keys() <= set(fields):
            for key in value:
                if key not in fields:
                    self._unknown(f"{path}.{key}" if path else str(key), str(key), fields)
        return value

    def _unknown(self, path: str, key: str, fields: Collection[str]) -> None:
        hint = LATER if key in LATER_FIELDS else did_you_mean(key, fields)
        self.problem(path, ABSENT, f"unknown field, expected one of {', '.join(sorted(fields))}{hint}")

    def items(self, value: Any, path: str) -> Iterator[tuple[Any, str]]:
        """The items of a list with their paths; absent or null is an empty list."""
        if value is None:
            return
        if not isinstance(value, list):
            self.problem(path, value, "expected a list")
            return
        for index, item in enumerate(value):
            yield item, f"{path}[{index}]"

    def text(self, value: Any, path: str, what: str = "text") -> str | None:
        """A string, or None after noting what is wrong."""
        if isinstance(value, str):
            return value
        self.problem(path, value, f"expected {what}")
        return None

    def selector(self, value: Any, path: str, source: str = "", key_prefix: str = "") -> Selector | None:
        """A label selector. Without ``source``, keys may carry one (``k8s:app``) and default to any source."""
        key = _memo_key(value, source, key_prefix)
        if key is not None and (known := _SELECTORS.get(key)) is not None:
            return known
        found = self._read_selector(value, path, source, key_prefix)
        if found is not None and key is not None:
            if len(_SELECTORS) >= _SELECTORS_LIMIT:
                _SELECTORS.clear()
            _SELECTORS[key] = found
        return found

    def _read_selector(self, value: Any, path: str, source: str, key_prefix: str) -> Selector | None:
        fields = self.mapping(value, path, SELECTOR_FIELDS)
        if fields is None:
            return None
        before = len(self.problems)
        requirements: list[Requirement] = []
        if (labels := fields.get("matchLabels")) is not None:
            requirements.extend(self._match_labels(labels, f"{path}.matchLabels", source, key_prefix))
        for item, below in self.items(fields.get("matchExpressions"), f"{path}.matchExpressions"):
            requirement = self._expression(item, below, source, key_prefix)
            if requirement is not None:
                requirements.append(requirement)
        if len(self.problems) > before:
            return None
        return selector(tuple(requirements))

    def _match_labels(self, labels: Any, path: str, source: str, key_prefix: str) -> Iterator[Requirement]:
        for key, value in (self.mapping(labels, path) or {}).items():
            below = f"{path}.{key}"
            name = self._key(key, below, source, key_prefix)
            if self._value(value, below, bool(source)) and name is not None:
                yield Requirement(*name, IN, (value,))

    def _expression(self, item: Any, path: str, source: str, key_prefix: str) -> Requirement | None:
        fields = self.mapping(item, path, EXPRESSION_FIELDS)
        if fields is None:
            return None
        name = self._key(fields.get("key", ABSENT), f"{path}.key", source, key_prefix)
        operator = fields.get("operator", ABSENT)
        if not isinstance(operator, str) or operator not in OPERATORS:
            self.problem(f"{path}.operator", operator, f"expected one of {', '.join(OPERATORS)}")
            return None
        values = self._values(fields.get("values"), f"{path}.values", operator, bool(source))
        return Requirement(*name, operator, values) if name is not None and values is not None else None

    def _values(self, values: Any, path: str, operator: str, strict: bool) -> tuple[str, ...] | None:
        found = [(item, self._value(item, below, strict)) for item, below in self.items(values, path)]
        if operator in (EXISTS, DOES_NOT_EXIST):
            if found:
                self.problem(path, values, f"expected no values with {operator}")
                return None
        elif not found:
            self.problem(path, ABSENT if values is None else values, f"expected at least one value with {operator}")
            return None
        return tuple(sorted({item for item, _ in found})) if all(good for _, good in found) else None

    def _key(self, key: Any, path: str, source: str, key_prefix: str) -> tuple[str, str] | None:
        if not isinstance(key, str) or not key:
            self.problem(path, key, "expected a label key")
            return None
        name = key
        if not source:
            before, colon, after = key.partition(":")
            source, name = (before, after) if colon and before in KNOWN_SOURCES else (SOURCE_ANY, key)
            if source == SOURCE_GENERATED:
                self.problem(path, key, "the source cilium-generated is the system's own, expected another")
                return None
            if source == "unspec":
                source = SOURCE_ANY
        if source != "cidr" and not valid_key(name):
            self.problem(path, key, "expected a label key: [prefix/]name of letters, digits, '-', '_' and '.'")
            return None
        return source, key_prefix + name

    def _value(self, value: Any, path: str, strict: bool) -> bool:
        if not isinstance(value, str):
            self.problem(path, value, "expected text as a label value (quote numbers and booleans)")
            return False
        if len(value) > 63 or not _VALUE.fullmatch(value):
            expected = "expected at most 63 letters, digits, '-', '_' and '.', a letter or digit at both ends"
            self.problem(path, value, expected)
            return False
        return True


_SELECTORS: dict[tuple[Any, ...], Selector] = {}
_SELECTORS_LIMIT = 65536


def _memo_key(value: Any, source: str, key_prefix: str) -> tuple[Any, ...] | None:
    """Sound selectors of matchLabels alone are read once; rules repeat them a thousandfold."""
    if type(value) is not dict or len(value) != 1:
        return None
    labels = value.get("matchLabels")
    if type(labels) is not dict:
        return None
    items = tuple(labels.items())
    return (items, source, key_prefix) if all(type(item) is str for _, item in items) else None


class _Absent:
    """Stands for a field that is not there."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()


def valid_key(key: str) -> bool:
    """True for a Kubernetes label key, also one behind the prefix of namespace labels."""
    bare = key.removeprefix(NAMESPACE_LABELS_PREFIX)
    prefix, slash, name = bare.rpartition("/")
    if slash and (len(prefix) > 253 or not _PREFIX.fullmatch(prefix)):
        return False
    return len(name) <= 63 + len(NAMESPACE_LABELS_PREFIX) and _KEY.fullmatch(name) is not None


def title(obj: Any) -> str:
    """How messages call an object: its kind, namespace and name, as far as it says them."""
    if not isinstance(obj, dict):
        return ""
    meta = obj.get("metadata")
    meta = meta if isinstance(meta, dict) else {}
    name = "/".join(str(meta[key]) for key in ("namespace", "name") if isinstance(meta.get(key), str))
    kind = obj.get("kind") if isinstance(obj.get("kind"), str) else "object"
    return f"{kind} {name}".strip()
