"""From documents to policy objects: what kind it is, whether its head is sound, then the dialect's own reader."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from ciliate.document import Document
from ciliate.hints import typing_errors
from ciliate.labels import POLICY_PREFIX, SOURCE_ANY, SOURCE_K8S, SOURCE_UNSPEC, Label, LabelSet, parse_label
from ciliate.policy.bounds import excess
from ciliate.policy.cilium import CiliumParser
from ciliate.policy.kubernetes import KubernetesParser
from ciliate.policy.model import FqdnPeer, Rule, Section
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.reader import ABSENT, NAME, Reader, title
from ciliate.policy.selector import Selector

CILIUM = "CiliumNetworkPolicy"
CLUSTERWIDE = "CiliumClusterwideNetworkPolicy"
KUBERNETES = "NetworkPolicy"
BARE = "Rule"
KINDS = {
    CILIUM: ("cilium.io/v2",),
    CLUSTERWIDE: ("cilium.io/v2",),
    KUBERNETES: ("networking.k8s.io/v1", "extensions/v1beta1"),
    BARE: (),
}
KUBERNETES_FIELDS = ("apiVersion", "kind", "metadata", "spec", "status")
CILIUM_FIELDS = (*KUBERNETES_FIELDS, "specs", "description")
CLUSTER_ANNOTATION = "ciliate.io/cluster"
_DNS_NAME_LIMIT = 253


class PolicyObject(msgspec.Struct, eq=False):
    """A policy as imported. ``ref`` identifies it: ``Kind/namespace/name``."""

    ref: str
    kind: str
    namespace: str
    name: str
    rules: tuple[Rule, ...]
    document: Document
    source: str = "api"
    selectors: tuple[tuple[str, Selector], ...] = ()
    """Those of endpoints, with their fields."""
    notes: tuple[tuple[str, str], ...] = ()
    """Fields that can hardly mean what they say, and what they do mean."""
    needs: tuple[tuple[str, str, bool], ...] = ()
    """Sections that count on a layer-7 parser: field, parser, and whether for names of peers alone."""
    excess: str = ""
    """Why it takes too much to be in force, whatever it selects."""

    @property
    def title(self) -> str:
        """Kind and name, for people."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"

    def wrong(self, expected: str) -> Problem:
        """A problem of the object as a whole."""
        return Problem(self.document.file, self.document.line, self.title, "spec", "", expected)

    @property
    def labels(self) -> LabelSet:
        """Labels of its first rule, and those that tell which object it is (PO-K05)."""
        return LabelSet(self.labels_of(next(_raw_rules(self.document.object), ("spec", None))[0]))

    def labels_by_rule(self) -> dict[str, tuple[Label, ...]]:
        """By the field of each rule (``spec``, ``specs[0]``): its labels, and those of the object.

        An object that lost its rules has one entry, for ``spec``.
        """
        return {path: self.labels_of(path) for path in dict(_raw_rules(self.document.object)) or ("spec",)}

    def labels_of(self, path: str) -> tuple[Label, ...]:
        """The labels of the rule at or around a field, and those of the object."""
        name, _, index = path.partition(".")[0].removesuffix("]").partition("[")
        rules = self.document.object.get(name)
        rule = rules[int(index)] if index and rules else rules
        return (*_rule_labels(rule), *_generated(self.document.object, self.kind, self.namespace, self.name))

    def sections(self) -> Iterable[Section]:
        """Every section of every rule."""
        for rule in self.rules:
            yield from rule.ingress or ()
            yield from rule.egress or ()


def is_policy(obj: Any) -> bool:
    """True where an object says that it is a policy of a kind known here."""
    if not isinstance(obj, dict) or obj.get("kind") not in KINDS:
        return False
    # others have a kind Rule, too, and theirs say whose they are
    return obj["kind"] != BARE or "apiVersion" not in obj


def may_be_policy(obj: Any) -> bool:
    """True for policies, and for what somebody may have meant as one: it must not be left aside in silence."""
    if is_policy(obj) or not isinstance(obj, dict):
        return True
    kind, version = obj.get("kind"), obj.get("apiVersion")
    if not isinstance(kind, str) or not kind:
        return True
    if isinstance(version, str) and version.startswith("cilium.io/") and "policy" in kind.lower():
        return True
    plain = kind.lower().replace("policies", "policy").removesuffix("s")
    return any(typing_errors(plain, name.lower(), 2) <= 2 for name in KINDS if name != BARE)


def sort_out(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """What concerns policy (mistakes included), and the objects of other kinds that an import leaves alone."""
    concerned: list[Document] = []
    left: list[Document] = []
    for document in documents:
        (concerned if may_be_policy(document.object) else left).append(document)
    return concerned, left


def parse_documents(documents: Iterable[Document], cluster: str = "default", source: str = "api") -> list[PolicyObject]:
    """Read every document; PolicyError lists every problem of every one of them."""
    with quiet_collector():
        return _parse_all(documents, cluster, source)


def parse_stored(
    documents: Iterable[Document], cluster: str = "default", source: str = "api"
) -> tuple[list[PolicyObject], list[Problem], list[Document]]:
    """Read what was taken once: as far as it can be read, never so that it allows more, with what is wrong of it.

    Also returns the documents of which nothing can be read.
    """
    objects: dict[str, PolicyObject] = {}
    problems: list[Problem] = []
    unread: list[Document] = []
    with quiet_collector():
        for document in documents:
            reader = Reader(document)
            found = _parse(reader, cluster, source)
            problems += reader.problems
            if found is None:
                unread.append(document)
            else:
                found.excess = excess(found.rules)
                objects[found.ref] = found
    return list(objects.values()), problems, unread


def _parse_all(documents: Iterable[Document], cluster: str, source: str) -> list[PolicyObject]:
    problems: list[Problem] = []
    objects: dict[str, PolicyObject] = {}
    for document in documents:
        reader = Reader(document)
        found = _parse(reader, cluster, source)
        problems.extend(reader.problems)
        if found is None or reader.problems:
            continue
        if found.ref in objects and found.kind != BARE:
            first = objects[found.ref].document
            place = f"{first.file}:{first.line}" if first.file else "earlier in the same import"
            reader.problem("metadata.name", found.name, f"expected one object of this name; the first is at {place}")
            problems.append(reader.problems[-1])
            continue
        found.excess = excess(found.rules)
        objects[found.ref] = found
    if problems:
        raise PolicyError(problems)
    return list(objects.values())


def need_policies(concerned: list[Document], left: list[Document]) -> None:
    """PolicyError where there are objects, and none of them is a policy."""
    if left and not concerned:
        first = left_alone(left[0])
        expected = f"expected a policy: none of the {len(left)} objects is one"
        raise PolicyError([Problem(first.file, first.line, first.object, "kind", "", expected)])


def left_alone(document: Document) -> Problem:
    """An object of another kind, told with its place."""
    return Problem(document.file, document.line, title(document.object), "", "", "of no concern to policy: left alone")


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Hold the cyclic collector back during a burst of allocations that makes no cycles: it would only walk them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_document(document: Document, cluster: str = "default") -> list[Problem]:
    """Every problem of one policy document, without importing it."""
    reader = Reader(document)
    found = _parse(reader, cluster, "api")
    if found is not None and not reader.problems and (text := excess(found.rules)):
        return [found.wrong(text)]
    return reader.problems


def _parse(reader: Reader, cluster: str, source: str) -> PolicyObject | None:
    obj = reader.document.object
    if not isinstance(obj, dict):
        reader.problem("", obj, "expected an object with kind and metadata")
        return None
    kind = obj.get("kind", ABSENT)
    if not isinstance(kind, str) or kind not in KINDS:
        reader.problem("kind", kind, f"expected one of {CILIUM}, {CLUSTERWIDE}, {KUBERNETES}")
        return None
    if kind == BARE:
        return _bare(reader, obj, cluster, source)
    version = obj.get("apiVersion", ABSENT)
    if version not in KINDS[kind]:
        reader.problem("apiVersion", version, f"expected {KINDS[kind][0]}")
    reader.mapping(obj, "", KUBERNETES_FIELDS if kind == KUBERNETES else CILIUM_FIELDS)
    if kind != KUBERNETES and obj.get("description") is not None:
        reader.text(obj["description"], "description")
    head = _head(reader, obj.get("metadata", ABSENT), kind)
    namespace = "" if kind == CLUSTERWIDE or head is None else head[0]
    own_cluster = "" if head is None else head[2]
    rules = _rules(reader, obj, kind, namespace, cluster, own_cluster)
    if head is None:
        return None
    ref = f"{kind}/{namespace}/{head[1]}"
    return _made(reader, ref, kind, namespace, head[1], rules, source)


def _made(
    reader: Reader, ref: str, kind: str, namespace: str, name: str, rules: list[Rule], source: str
) -> PolicyObject:
    selectors, notes = tuple(reader.selectors), tuple(reader.notes)
    made = PolicyObject(ref, kind, namespace, name, tuple(rules), reader.document, source, selectors, notes)
    made.needs = tuple(need for section in made.sections() for need in _needs(section))
    return made


def _needs(section: Section) -> Iterator[tuple[str, str, bool]]:
    if section.filters:
        parsers = {port.l7.parser for port in section.ports or () if port.l7 is not None}
        yield from ((section.path, parser, False) for parser in sorted(parsers))
    if any(type(peer) is FqdnPeer for peer in section.peers or ()):
        yield section.path, "dns", True


def _rules(
    reader: Reader, obj: dict[str, Any], kind: str, namespace: str, cluster: str, policy_cluster: str
) -> list[Rule]:
    if kind == KUBERNETES:
        return KubernetesParser(reader, namespace, policy_cluster).rules(obj)
    return CiliumParser(reader, namespace, cluster, policy_cluster).rules(obj)


def _bare(reader: Reader, obj: dict[str, Any], cluster: str, source: str) -> PolicyObject:
    if obj.get("spec") is None and obj.get("specs") is None:
        reader.problem("spec", ABSENT, "expected a rule")
    rules = CiliumParser(reader, "", cluster, bare=True).rules(obj)
    content = json.dumps(obj, sort_keys=True, default=str).encode()
    name = hashlib.sha256(content).hexdigest()[:12]
    return _made(reader, f"{BARE}//{name}", BARE, "", name, rules, source)


def _head(reader: Reader, value: Any, kind: str) -> tuple[str, str, str] | None:
    """Namespace, name and cluster of the object's metadata."""
    meta = reader.mapping(value, "metadata")
    if meta is None:
        return None
    before = len(reader.problems)
    name = meta.get("name", ABSENT)
    if not isinstance(name, str) or len(name) > _DNS_NAME_LIMIT or not NAME.fullmatch(name):
        reader.problem("metadata.name", name, "expected a name of lower-case letters, digits, '-' and '.'")
    namespace = meta.get("namespace")
    if namespace is None or namespace == "":
        namespace = "default"
    if not isinstance(namespace, str) or len(namespace) > 63 or not NAME.fullmatch(namespace):
        reader.problem("metadata.namespace", namespace, "expected a namespace of lower-case letters, digits and '-'")
    for field in ("labels", "annotations"):
        if meta.get(field):
            for key, item in (reader.mapping(meta[field], f"metadata.{field}") or {}).items():
                if not isinstance(item, str):
                    reader.problem(f"metadata.{field}.{key}", item, "expected text")
    if len(reader.problems) > before:
        return None
    return namespace, name, (meta.get("annotations") or {}).get(CLUSTER_ANNOTATION, "")


def only(document: Document, paths: Collection[str]) -> Document:
    """The document with no other rules than those at these fields, every one with the lines that it has."""
    obj = {key: value for key, value in document.object.items() if key not in ("spec", "specs")}
    lines = {path: line for path, line in document.lines.items() if not path.startswith("spec")}
    kept = [(path, rule) for path, rule in _raw_rules(document.object) if path in paths]
    several: list[Any] = []
    for path, rule in kept:
        place = "spec" if path == "spec" else f"specs[{len(several)}]"
        if path == "spec":
            obj["spec"] = rule
        else:
            several.append(rule)
        moved = {place + key.removeprefix(path): line for key, line in document.lines.items() if _below(key, path)}
        lines.update(moved)
    if several:
        obj["specs"] = several
    return Document(obj, document.file, document.line, lines)


def _below(field: str, path: str) -> bool:
    return field == path or field.startswith((path + ".", path + "["))


def _raw_rules(obj: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The rules of an object as written, with their fields."""
    if obj.get("spec") is not None:
        yield "spec", obj["spec"]
    for index, rule in enumerate(obj.get("specs") or []):
        yield f"specs[{index}]", rule


def carry(labels: Iterable[Label], wanted: Iterable[Label]) -> bool:
    """Whether every wanted label is among these; one of source ``any`` may have any source."""
    found = list(labels)
    return all(
        any(
            (label.key, label.value) == (asked.key, asked.value) and asked.source in (SOURCE_ANY, label.source)
            for label in found
        )
        for asked in wanted
    )


def _generated(obj: dict[str, Any], kind: str, namespace: str, name: str) -> list[Label]:
    if kind == BARE:
        return []
    uid = obj["metadata"].get("uid")
    given = {"name": name, "namespace": namespace, "uid": uid, "derived-from": kind}
    return [
        Label(SOURCE_K8S, POLICY_PREFIX + key, value)
        for key, value in given.items()
        if isinstance(value, str) and value
    ]


def _rule_labels(spec: Any) -> Iterable[Label]:
    for item in (spec.get("labels") or []) if isinstance(spec, dict) else []:
        if isinstance(item, str) and item:
            yield parse_label(item)
        elif isinstance(item, dict) and isinstance(item.get("key"), str) and item["key"]:
            yield Label(str(item.get("source") or SOURCE_UNSPEC), item["key"], str(item.get("value") or ""))
