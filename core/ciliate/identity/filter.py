"""Which of a workload's labels make its identity (inventory PO-L02).

A filter is a list of key prefixes; `!` before one excludes. The longest prefix that matches a key decides. A prefix of
the user without `!` switches to a white list: then only what a prefix includes counts. Prefixes are regular expressions
that have to match at the beginning of a key; a point that is not followed by a quantifier is just a point, since keys
are full of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from ciliate.identity.fixed import FixedIdentities
from ciliate.labels import FIXED_IDENTITY, Label, LabelSet

DEFAULTS = (
    "io.kubernetes.pod.namespace",
    "io.cilium.k8s.namespace.labels",
    "io.cilium.k8s.policy",
    "app.kubernetes.io",
    "!io.kubernetes",
    "!kubernetes.io",
    "!.*kubernetes.io",
    "!pod-template-generation",
    "!pod-template-hash",
    "!controller-revision-hash",
    "!annotation.cilium.io/",
    "!annotation.cilium-identity",
    "!annotation.sidecar.istio.io",
    "!annotation.etcd.version",
    "!etcd_node",
)


class _Rule(NamedTuple):
    source: str
    pattern: re.Pattern[str]
    include: bool
    length: int


class LabelFilter:
    """Built from the option ``labels``: prefixes separated by spaces or commas, ``[!][source:]prefix``.

    Labels that claim one of the ``fixed`` identities make that one, whatever else there is.
    """

    def __init__(
        self, text: str = "", fixed: FixedIdentities | None = None, file: Sequence[_Rule] | None = None
    ) -> None:
        """``file``: rules of a file, which stand in for the default set."""
        self._fixed = fixed or FixedIdentities()
        own = [*(file or []), *prefix_rules(text)]
        self._rules = [*(_DEFAULTS if file is None else _GENERATED), *own]
        self._white_list = any(rule.include for rule in own)

    @property
    def fixed_names(self) -> list[str]:
        """Names of fixed identities, which policies select as ``reserved:NAME``."""
        return self._fixed.names

    def keeps(self, label: Label) -> bool:
        """Whether a label is part of the identity. A claim never is: it stands for another set or for nothing."""
        if label.key == FIXED_IDENTITY:
            return False
        best: _Rule | None = None
        for rule in self._rules:
            if rule.source not in ("", "any", label.source) or not rule.pattern.match(label.key):
                continue
            if best is None or rule.length >= best.length:
                best = rule
        return best.include if best is not None else not self._white_list

    def apply(self, labels: LabelSet) -> LabelSet:
        """The labels that make the identity; reserved ones always do."""
        fixed = self._fixed.claimed(labels)
        if fixed is not None:
            return fixed
        return LabelSet(label for label in labels if label.source == "reserved" or self.keeps(label))


def prefix_rules(text: str) -> list[_Rule]:
    """The rules of option ``labels``. ValueError names a prefix that is no regular expression."""
    return [_rule(part) for part in re.split(r"[\s,]+", text.strip()) if part]


class _Prefix(msgspec.Struct, forbid_unknown_fields=True):
    prefix: str
    source: str = ""
    invert: bool = False


class _PrefixFile(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    version: Literal[1]
    valid_prefixes: list[_Prefix]


def read_prefixes(path: str) -> list[_Rule] | None:
    """``{"version": 1, "valid-prefixes": [{"prefix", "source", "invert"}, …]}``; a prefix that is inverted excludes.

    As with the option, one that includes makes a white list. None without a file; ValueError says what is wrong.
    """
    if not path:
        return None
    try:
        found = msgspec.json.decode(Path(path).read_bytes(), type=_PrefixFile)
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"expected a file of label prefixes: {error}") from error
    return [_compiled(item.source, item.prefix, not item.invert) for item in found.valid_prefixes]


def _rule(text: str) -> _Rule:
    body = text.lstrip("!")
    source, colon, prefix = body.partition(":")
    return _compiled(source if colon else "", prefix if colon else body, not text.startswith("!"))


def _compiled(source: str, prefix: str, include: bool) -> _Rule:
    literal = re.sub(r"(?<!\\)\.(?![*+?{])", r"\.", prefix)
    try:
        return _Rule(source, re.compile(literal), include, len(prefix.replace("\\", "")))
    except re.error as error:
        raise ValueError(f"prefix {prefix!r}: expected a regular expression: {error}") from error


_DEFAULTS = tuple(_rule(part) for part in DEFAULTS)
_GENERATED = _DEFAULTS[:3]
"""Labels that policies of namespaces and clusters need: they count, unless something longer says otherwise."""
