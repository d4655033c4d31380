"""What may be said and can hardly be meant: told with its place by import, validate and status, never refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

from ciliate.identity.numeric import RESERVED
from ciliate.labels import (
    CLUSTER,
    NAMESPACE,
    NAMESPACE_LABELS_PREFIX,
    SERVICE_ACCOUNT,
    SOURCE_ANY,
    SOURCE_CIDR,
    SOURCE_K8S,
    SOURCE_RESERVED,
    Label,
)
from ciliate.policy.importer import PolicyObject
from ciliate.policy.porttable import Proxies
from ciliate.policy.problems import Problem
from ciliate.policy.reader import NAME
from ciliate.policy.selector import IN, NOT_IN, Requirement, Selector
from ciliate.workload import reserved_key

GENERATED = (NAMESPACE, CLUSTER, SERVICE_ACCOUNT)
"""Labels that the system gives to pods, beside those of their namespaces."""
NAMES = frozenset(RESERVED.values()) - {"unknown"}
_POD = (SOURCE_ANY, SOURCE_K8S)
_SPECIAL = (SOURCE_RESERVED, SOURCE_CIDR)
_NEARLY = ("io.kubernetes.pod.namespace.labels.", "io.cilium.k8s.namespace.label.", "io.kubernetes.pod.namespace.")


def cautions(
    item: PolicyObject,
    keeps: Callable[[Label], bool],
    proxies: Proxies | None = None,
    reserved: Collection[str] = (),
) -> list[Problem]:
    """Everything that is to be told of a policy.

    ``keeps`` is the identity filter, ``proxies`` what is active now (None: that is not asked), ``reserved`` are names
    of fixed identities.
    """
    found = []
    if not item.rules:
        found.append(caution(item, "spec", "no rule is left: the object selects nobody and allows nothing"))
    for field, selector in item.selectors:
        found += [caution(item, field, text) for text in never(selector, frozenset(reserved))]
        found += [caution(item, field, text) for text in _left_out(selector, keeps)]
    found += [caution(item, field, text) for field, text in item.notes]
    if proxies is not None:
        found += [caution(item, field, text) for field, text in unserved(item, proxies)]
    return sorted(dict.fromkeys(found), key=lambda problem: problem.line)


def caution(item: PolicyObject, field: str, text: str) -> Problem:
    """A line about one field of an object."""
    title = f"{item.kind} {item.namespace}/{item.name}" if item.namespace else f"{item.kind} {item.name}"
    return Problem(item.document.file, item.document.line_of(field), title, field, "", text)


def unserved(item: PolicyObject, proxies: Proxies) -> Iterator[tuple[str, str]]:
    """The sections that count on a proxy which is not active, each with what becomes of it."""
    for field, parser, names in item.needs:
        if proxies.port(parser):
            continue
        why = proxies.why_not(parser)
        if names:
            yield field, f"toFQDNs: {why}; no address of these names is learned: it allows nothing"
        else:
            yield field, f"{parser} rules: {why}; what only they allow is dropped (191)"


def _left_out(selector: Selector, keeps: Callable[[Label], bool]) -> Iterator[str]:
    """Keys that the identity filter leaves out."""
    for key in sorted({item.key for item in selector.requirements if item.source in _POD}):
        if not keeps(Label(SOURCE_K8S, key)):
            yield f"label {key} is no part of identities (option labels): to policies no pod has it"


@lru_cache(maxsize=65536)
def never(selector: Selector, reserved: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Why no identity can meet a selector, or why every one meets a part of it; empty where some may."""
    found = [text for item in selector.requirements for text in _impossible(item, reserved)]
    return tuple(dict.fromkeys(found)) or tuple(_contradictions(selector, reserved))


def _impossible(item: Requirement, reserved: frozenset[str]) -> Iterator[str]:
    if item.source in _POD and reserved_key(item.key) and not _generated(item.key):
        yield f"label {item.key} is never given: to policies no pod has it{_nearly(item.key)}"
    if item.source in _POD and item.key == NAMESPACE and item.operator == IN:
        wrong = [value for value in item.values if not NAME.fullmatch(value)]
        if len(wrong) == len(item.values):
            yield f"no namespace can be called {', '.join(map(repr, wrong))}: nobody meets the selector"
    if item.source == SOURCE_RESERVED and item.key == "all":
        yield "everybody has reserved:all: nobody meets the selector"
    elif item.source == SOURCE_RESERVED and item.key not in NAMES | reserved:
        yield f"there is no label reserved:{item.key}, but reserved:{', '.join(sorted(NAMES | reserved))}"
    elif item.source == SOURCE_RESERVED and item.operator == IN and "" not in item.values:
        yield f"label reserved:{item.key} has no value: nobody meets the selector"


def _generated(key: str) -> bool:
    return key in GENERATED or (key.startswith(NAMESPACE_LABELS_PREFIX) and key != NAMESPACE_LABELS_PREFIX)


def _nearly(key: str) -> str:
    for prefix in _NEARLY:
        if key.startswith(prefix) and key != prefix:
            return f"; labels of namespaces are {NAMESPACE_LABELS_PREFIX}{key.removeprefix(prefix)}"
    return f"; the namespace's name is {NAMESPACE}" if key.startswith(NAMESPACE) else ""


def _contradictions(selector: Selector, reserved: frozenset[str]) -> Iterator[str]:
    asked = [item for item in selector.requirements if item.asks]
    singles = {item.key for item in asked if item.source == SOURCE_RESERVED and item.key not in reserved}
    # what has a reserved label has no other, unless it is of the world
    others = [item for item in asked if item.source not in _SPECIAL]
    pods = [item for item in others if item.source != SOURCE_ANY or item.key not in NAMES]
    if len(singles) > 1 or (singles and pods):
        together = [item for item in asked if item.source == SOURCE_RESERVED or item in pods]
        yield _at_once(together)
    elif any(item.source == SOURCE_CIDR for item in asked) and pods:
        yield "labels of source cidr belong to no endpoint; CIDRs go to fromCIDR and toCIDR"
    by_key: dict[tuple[str, str], list[Requirement]] = {}
    for item in selector.requirements:
        # what the system gives has one source, so that "any" means the same
        source = SOURCE_K8S if item.source == SOURCE_ANY and _generated(item.key) else item.source
        by_key.setdefault((source, item.key), []).append(item)
    yield from (_at_once(items) for items in by_key.values() if len(items) > 1 and _exclusive(items))


def _exclusive(items: list[Requirement]) -> bool:
    """True where no single value can meet all of these."""
    if any(item.source == SOURCE_ANY for item in items) and not _generated(items[0].key):
        # two sources may have two values: only a label that must and must not be there excludes itself
        return any(item.asks for item in items) and any(not item.asks and item.operator != NOT_IN for item in items)
    if not any(item.asks for item in items):
        return False
    if any(not item.asks and item.operator != NOT_IN for item in items):
        return True
    wanted = [set(item.values) for item in items if item.operator == IN]
    refused = {value for item in items if item.operator == NOT_IN for value in item.values}
    return bool(wanted) and not set.intersection(*wanted) - refused


def _at_once(items: list[Requirement]) -> str:
    return f"nobody meets {' and '.join(map(str, items))} at once"
