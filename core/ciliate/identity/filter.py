"""Which of a workload's labels make its identity (inventory PO-L02).

A filter is a list of key prefixes; `!` before one excludes. The longest prefix that matches a key decides. A prefix of
the user without `!` switches to a white list: then only what a prefix includes counts. Prefixes are matched literally,
except that `.*` stands for any text, as the seed system's defaults use it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ciliate.identity.fixed import FixedIdentities
from ciliate.labels import FIXED_IDENTITY, Label, LabelSet

DEFAULTS = (
    "io.kubernetes.pod.namespace",
    "io.cilium.k8s.namespace.labels",
    "io.cilium.k8s.policy",
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

    def __init__(self, text: str = "", fixed: FixedIdentities | None = None) -> None:
        self._fixed = fixed or FixedIdentities()
        own = [_rule(part) for part in re.split(r"[\s,]+", text.strip()) if part]
        self._rules = [_rule(part) for part in DEFAULTS] + own
        self._white_list = any(rule.include for rule in own)

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


def _rule(text: str) -> _Rule:
    include = not text.startswith("!")
    body = text.lstrip("!")
    source, colon, prefix = body.partition(":")
    if not colon:
        source, prefix = "", body
    pattern = ".*".join(re.escape(part) for part in prefix.split(".*"))
    return _Rule(source, re.compile(pattern), include, len(prefix))
