"""Which labels an endpoint has: those of the orchestrator, without what a user disabled, and what a user added."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ciliate.identity import INIT, reserved_identity
from ciliate.identity.filter import LabelFilter
from ciliate.labels import (
    KEY_FORM,
    SOURCE_CIDR,
    SOURCE_GENERATED,
    SOURCE_RESERVED,
    VALUE_FORM,
    Label,
    LabelSet,
    valid_key,
    valid_value,
)
from ciliate.workload import reserved_key

if TYPE_CHECKING:
    from ciliate.endpoint.model import Endpoint

SYSTEM_SOURCES = frozenset({SOURCE_RESERVED, SOURCE_CIDR, SOURCE_GENERATED})


class LabelChangeError(ValueError):
    """A change of labels that cannot be made. ``field`` is ``add`` or ``delete``, the text has what was expected."""

    def __init__(self, field: str, label: Label, expected: str) -> None:
        self.field = field
        super().__init__(f"{field}: label {str(label)!r} given, expected {expected}")


def identity_labels(endpoint: Endpoint, label_filter: LabelFilter) -> LabelSet:
    """The labels that make an endpoint's identity; those of identity ``init`` where there are none."""
    if endpoint.request.reserved:
        return reserved_identity(endpoint.request.reserved).labels
    labels = label_filter.apply(all_labels(endpoint))
    return labels if len(labels) else reserved_identity(INIT).labels


def all_labels(endpoint: Endpoint) -> LabelSet:
    """Every label that counts, before the label filter."""
    disabled = _names(endpoint.disabled_labels)
    kept = LabelSet(label for label in endpoint.orchestration if (label.source, label.key) not in disabled)
    return kept.union(endpoint.user_labels)


def change(endpoint: Endpoint, add: LabelSet, delete: LabelSet) -> None:
    """Add and delete labels of one endpoint, all or none; LabelChangeError names the label that stands in the way.

    An orchestrator's label that is deleted is disabled until it is added again.
    """
    _refuse(add)
    user, given = _names(endpoint.user_labels), _names(endpoint.orchestration)
    for label in delete:
        if (label.source, label.key) not in user and not _may_disable(label, given):
            raise LabelChangeError("delete", label, "one that the endpoint has and that the system did not generate")
    added, deleted = _names(add), _names(delete)
    disabled = [label for label in endpoint.disabled_labels if (label.source, label.key) not in added]
    disabled += [
        label
        for label in endpoint.orchestration
        if (label.source, label.key) in deleted and (label.source, label.key) not in user
    ]
    known = set(endpoint.orchestration)
    kept = [label for label in endpoint.user_labels if (label.source, label.key) not in deleted]
    endpoint.user_labels = LabelSet([*kept, *(label for label in add if label not in known)])
    endpoint.disabled_labels = LabelSet(disabled)


def document(endpoint: Endpoint, label_filter: LabelFilter) -> dict[str, Any]:
    """The labels as the API shows them (inventory section 4.2, LabelConfiguration)."""
    everything = all_labels(endpoint)
    relevant = label_filter.apply(everything)
    return {
        "spec": {"user": endpoint.user_labels.strings()},
        "status": {
            "realized": {"user": endpoint.user_labels.strings()},
            "security-relevant": endpoint.labels.strings(),
            "derived": [str(label) for label in everything if label not in relevant],
            "disabled": endpoint.disabled_labels.strings(),
        },
    }


def summary(add: LabelSet, delete: LabelSet) -> str:
    """A change in one line: ``+a -b``."""
    return " ".join([*(f"+{label}" for label in add), *(f"-{label}" for label in delete)])


def _refuse(labels: Iterable[Label]) -> None:
    """LabelChangeError for labels of the system, and for those that Kubernetes would not take."""
    for label in labels:
        if label.source in SYSTEM_SOURCES or reserved_key(label.key):
            raise LabelChangeError("add", label, "none that only the system may set")
        if not valid_key(label.key):
            raise LabelChangeError("add", label, f"the key {KEY_FORM}")
        if not valid_value(label.value):
            raise LabelChangeError("add", label, f"the value {VALUE_FORM}")


def _may_disable(label: Label, given: set[tuple[str, str]]) -> bool:
    return (label.source, label.key) in given and not reserved_key(label.key) and label.source not in SYSTEM_SOURCES


def _names(labels: Iterable[Label]) -> set[tuple[str, str]]:
    return {(label.source, label.key) for label in labels}
