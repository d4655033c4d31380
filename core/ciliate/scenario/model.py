"""Scenarios as data: peers, flows, expectations; reading them with every mistake named by file, line and field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import msgspec

from ciliate import manifest
from ciliate.manifest import Document, ManifestError
from ciliate.policy.l7rules import (
    KAFKA_KEYS,
    DnsRequest,
    GenericRequest,
    HttpRequest,
    KafkaRequest,
    L7Request,
    normal_name,
)
from ciliate.policy.model import PROTOCOLS
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.reader import ABSENT, Reader

API_VERSION = "ciliate.io/v1alpha1"
KIND = "Expectation"
ALLOW, DENY = "allow", "deny"
ENTITIES = ("host", "world", "init", "health", "unmanaged")
PEERS = "namespace/pod, workload/NAME, ip/ADDRESS, entity/NAME, fqdn/NAME or service/namespace/name"
SPEC_FIELDS = ("enforcement", "allowLocalhost", "dns", "flows", "steps")
STEP_FIELDS = ("name", "apply", "delete", "flows")
FLOW_FIELDS = (
    *("from", "to", "port", "protocol", "direction", "family", "verdict"),
    *("http", "dns", "kafka", "generic", "note"),
)
_PROTOCOLS = {name.upper(): name for name in PROTOCOLS}
_REQUESTS: dict[str, type[L7Request]] = {
    "http": HttpRequest,
    "dns": DnsRequest,
    "kafka": KafkaRequest,
    "generic": GenericRequest,
}
_FAMILIES = {4: 4, "4": 4, "IPv4": 4, 6: 6, "6": 6, "IPv6": 6}
Address = IPv4Address | IPv6Address
Reference = tuple[str, str, str]
"""An object by kind, namespace (empty where it has none) and name."""


class Peer(msgspec.Struct, frozen=True):
    """One end of a flow. ``kind`` is pod, workload, ip, entity, fqdn or service; ``name`` is that of any but ip."""

    kind: str
    name: str = ""
    namespace: str = ""
    address: IPv4Address | IPv6Address | None = None

    def __str__(self) -> str:
        if self.kind == "pod":
            return f"{self.namespace}/{self.name}"
        if self.kind == "service":
            return f"service/{self.namespace}/{self.name}"
        return f"{self.kind}/{self.address if self.kind == 'ip' else self.name}"


class Flow(msgspec.Struct, frozen=True):
    """One connection attempt. ``port`` None asks for layer 3; for ICMP it is the message type, None an echo request.

    ``protocol`` None goes with ``port`` None: any traffic. ``direction`` ingress or egress asks for one side only.
    ``family`` 4 or 6 asks for one address family; None for what the ends have.
    ``verdict`` is what is expected, empty where nothing is.
    """

    src: Peer
    dst: Peer
    port: int | None = None
    protocol: str | None = None
    direction: str | None = None
    verdict: str = ""
    http: HttpRequest | None = None
    dns: DnsRequest | None = None
    kafka: KafkaRequest | None = None
    generic: GenericRequest | None = None
    family: int | None = None
    note: str = ""

    @property
    def request(self) -> L7Request | None:
        """The layer-7 detail, if any."""
        return self.http or self.dns or self.kafka or self.generic


class Names(msgspec.Struct, frozen=True):
    """DNS as a scenario has it: the addresses of names, which may share some, and the names asked for before."""

    records: dict[str, tuple[Address, ...]] = {}
    seen: tuple[str, ...] = ()


class Step(msgspec.Struct, frozen=True):
    """A change to the living cluster, and the flows that are asked after it."""

    name: str
    apply: tuple[Document, ...] = ()
    delete: tuple[Reference, ...] = ()
    flows: tuple[Flow, ...] = ()


class Expectation(msgspec.Struct, frozen=True):
    """The flows of one Expectation object, and what holds while they are asked.

    ``allow_localhost``: whether nodes reach their pods past policy. ``steps`` come after the flows, in turn.
    """

    flows: tuple[Flow, ...]
    enforcement: str = "default"
    file: str = ""
    line: int = 0
    allow_localhost: bool = True
    dns: Names = Names()
    steps: tuple[Step, ...] = ()


class Stage(msgspec.Struct, frozen=True):
    """What a scenario's cluster is at one time, and the flows that are asked then.

    ``step`` is empty before the first one; ``objects`` are all that there are then.
    """

    expectation: Expectation
    step: str
    objects: list[Document]
    flows: tuple[Flow, ...]


class Scenario(msgspec.Struct, frozen=True):
    """One file: its manifests (policies, pods, namespaces, services) and its expectations."""

    name: str
    objects: list[Document]
    expectations: list[Expectation]

    def stages(self) -> Iterator[Stage]:
        """What is asked, in order. A step changes the cluster for everything that comes after it."""
        objects = self.objects
        for expectation in self.expectations:
            yield Stage(expectation, "", objects, expectation.flows)
            for step in expectation.steps:
                objects = changed(objects, step)
                yield Stage(expectation, step.name, objects, step.flows)


def reference(obj: Mapping[str, Any]) -> Reference:
    """The kind, namespace and name of an object; empty where it does not say."""
    metadata = obj.get("metadata") or {}
    return str(obj.get("kind") or ""), str(metadata.get("namespace") or ""), str(metadata.get("name") or "")


def changed(objects: list[Document], step: Step) -> list[Document]:
    """The objects after a step: what it applies replaces what has the same kind, namespace and name.

    PolicyError where it deletes what is not there.
    """
    there = {reference(item.object) for item in objects}
    missing = [item for item in step.delete if item not in there]
    if missing:
        problems = [
            Problem("", 0, f"step {step.name}", "/".join(item), "delete", "expected an object that is there")
            for item in missing
        ]
        raise PolicyError(problems)
    gone = {*step.delete, *(reference(item.object) for item in step.apply)}
    return [*(item for item in objects if reference(item.object) not in gone), *step.apply]


def load_scenarios(paths: Iterable[Path | str]) -> list[Scenario]:
    """Read scenario files; one scenario a file. Objects of files without Expectation belong to every scenario.

    Raises ManifestError for files that cannot be read, PolicyError with every mistake in expectations.
    """
    by_file: dict[str, list[Document]] = {}
    for document in manifest.load(paths):
        by_file.setdefault(document.file, []).append(document)
    shared = [item for items in by_file.values() if not any(map(_is_expectation, items)) for item in items]
    problems: list[Problem] = []
    scenarios = []
    for file, documents in by_file.items():
        expected = [item for item in documents if _is_expectation(item)]
        if not expected:
            continue
        own = [item for item in documents if not _is_expectation(item)]
        expectations = []
        for document in expected:
            expectation, mistakes = read_expectation(document)
            expectations.append(expectation)
            problems.extend(mistakes)
        scenarios.append(Scenario(Path(file).stem, [*shared, *own], expectations))
    if problems:
        raise PolicyError(problems)
    if not scenarios:
        raise ManifestError(f"{', '.join(map(str, paths))}: expected an object of kind {KIND} with the flows to check")
    return scenarios


def parse_flow(value: Mapping[str, Any]) -> Flow:
    """A flow from its YAML form; PolicyError lists what is wrong with it."""
    reader = Reader(Document({"kind": "Flow"}))
    flow = read_flow(reader, value, "flow", verdict_needed=False)
    if flow is None or reader.problems:
        raise PolicyError(reader.problems)
    return flow


def read_expectation(document: Document) -> tuple[Expectation, list[Problem]]:
    """An Expectation object, as far as it can be read, and every mistake in it."""
    reader = Reader(document)
    return _expectation(reader), reader.problems


def _is_expectation(document: Document) -> bool:
    return document.object.get("kind") == KIND


def _expectation(reader: Reader) -> Expectation:
    obj, document = reader.document.object, reader.document
    if obj.get("apiVersion") != API_VERSION:
        reader.problem("apiVersion", obj.get("apiVersion", ABSENT), f"expected {API_VERSION}")
    reader.mapping(obj, "", ("apiVersion", "kind", "metadata", "spec"))
    spec = reader.mapping(obj.get("spec", ABSENT), "spec", SPEC_FIELDS) or {}
    enforcement = spec.get("enforcement") or "default"
    if enforcement not in ("default", "always", "never"):
        reader.problem("spec.enforcement", enforcement, "expected default, always or never")
    localhost = spec.get("allowLocalhost", "auto")
    if localhost not in (True, False, "auto", "always", "policy"):
        reader.problem("spec.allowLocalhost", localhost, "expected auto, always or policy")
    steps = [
        step
        for index, (item, path) in enumerate(reader.items(spec.get("steps"), "spec.steps"))
        if (step := _step(reader, item, path, index)) is not None
    ]
    return Expectation(
        _flows(reader, spec.get("flows"), "spec.flows"),
        str(enforcement),
        document.file,
        document.line,
        allow_localhost=localhost not in (False, "policy"),
        dns=_names(reader, spec.get("dns")),
        steps=tuple(steps),
    )


def _flows(reader: Reader, value: Any, path: str) -> tuple[Flow, ...]:
    flows = [read_flow(reader, item, below) for item, below in reader.items(value, path)]
    return tuple(flow for flow in flows if flow is not None)


def _step(reader: Reader, value: Any, path: str, index: int) -> Step | None:
    fields = reader.mapping(value, path, STEP_FIELDS)
    if fields is None:
        return None
    name = fields.get("name") or f"step {index + 1}"
    reader.text(name, f"{path}.name", "the name of a step")
    document = reader.document
    applied = []
    for item, below in reader.items(fields.get("apply"), f"{path}.apply"):
        found = reader.mapping(item, below)
        if found is not None:
            _reference(reader, found.get("kind", ABSENT), reader.mapping(found.get("metadata", ABSENT), below), below)
            applied.append(Document(found, document.file, document.line))
    deleted = []
    for item, below in reader.items(fields.get("delete"), f"{path}.delete"):
        found = reader.mapping(item, below, ("kind", "namespace", "name"))
        if found is not None:
            deleted.append(_reference(reader, found.get("kind", ABSENT), found, below))
    return Step(str(name), tuple(applied), tuple(deleted), _flows(reader, fields.get("flows"), f"{path}.flows"))


def _reference(reader: Reader, kind: Any, metadata: dict[str, Any] | None, path: str) -> Reference:
    reader.text(kind, f"{path}.kind", "the kind of an object")
    fields = metadata or {}
    reader.text(fields.get("name", ABSENT), f"{path}.name", "the name of an object")
    namespace = fields.get("namespace") or ""
    reader.text(namespace, f"{path}.namespace", "a namespace")
    return str(kind), str(namespace), str(fields.get("name"))


def _names(reader: Reader, value: Any) -> Names:
    fields = reader.mapping(value, "spec.dns", ("records", "seen")) if value is not None else None
    if not fields:
        return Names()
    records: dict[str, tuple[Address, ...]] = {}
    for name, _ in (reader.mapping(fields.get("records") or {}, "spec.dns.records") or {}).items():
        path = f"spec.dns.records.{name}"
        found = []
        for item, below in reader.items(fields["records"][name], path):
            try:
                found.append(ip_address(item if isinstance(item, str) else ""))
            except ValueError:
                reader.problem(below, item, "expected an IPv4 or IPv6 address")
        records[normal_name(str(name))] = tuple(found)
    seen = []
    for item, below in reader.items(fields.get("seen"), "spec.dns.seen"):
        if reader.text(item, below, "a name of spec.dns.records") is None:
            continue
        if normal_name(item) not in records:
            reader.problem(below, item, "expected a name of spec.dns.records")
        seen.append(normal_name(item))
    return Names(records, tuple(seen))


def read_flow(reader: Reader, value: Any, path: str, verdict_needed: bool = True) -> Flow | None:
    """One item of ``spec.flows``; mistakes go to the reader."""
    fields = reader.mapping(value, path, FLOW_FIELDS)
    if fields is None:
        return None
    before = len(reader.problems)
    src = _peer(reader, fields.get("from", ABSENT), f"{path}.from")
    dst = _peer(reader, fields.get("to", ABSENT), f"{path}.to")
    port, protocol = _port(reader, fields, path)
    direction = fields.get("direction")
    if direction not in (None, "ingress", "egress"):
        reader.problem(f"{path}.direction", direction, "expected ingress or egress")
    family = _family(reader, fields.get("family"), f"{path}.family", (src, dst), protocol)
    verdict = fields.get("verdict", "" if not verdict_needed else ABSENT)
    if verdict not in (ALLOW, DENY) and (verdict_needed or verdict != ""):
        reader.problem(f"{path}.verdict", verdict, "expected allow or deny")
    requests = {name: _request(reader, fields.get(name), f"{path}.{name}", name) for name in _REQUESTS}
    if sum(item is not None for item in requests.values()) > 1:
        reader.problem(path, ABSENT, "expected only one of http, dns, kafka and generic")
    if src is None or dst is None or len(reader.problems) > before:
        return None
    note = str(fields.get("note") or "")
    return Flow(src, dst, port, protocol, direction, verdict, family=family, note=note, **requests)  # type: ignore[arg-type]


def _family(reader: Reader, value: Any, path: str, ends: Iterable[Peer | None], protocol: str | None) -> int | None:
    """The address family that a flow names, which must be that of what it names beside."""
    if value is None:
        return None
    family = _FAMILIES.get(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    if family is None:
        reader.problem(path, value, "expected 4 or 6")
        return None
    given = {peer.address.version for peer in ends if peer is not None and peer.address is not None}
    given |= {4} if protocol == "ICMP" else {6} if protocol == "ICMPv6" else set()
    if given - {family}:
        reader.problem(path, value, f"expected {min(given)}, the family of its address or protocol")
    return family


def _peer(reader: Reader, value: Any, path: str) -> Peer | None:
    try:
        return parse_peer(value)
    except ValueError as error:
        reader.problem(path, value, str(error))
        return None


def parse_peer(text: Any) -> Peer:
    """``namespace/pod``, ``workload/NAME``, ``ip/ADDRESS``, ``entity/NAME``, ``fqdn/NAME``, ``service/namespace/name``.

    Raises ValueError saying what was expected.
    """
    expected = f"expected {PEERS}"
    parts = text.split("/") if isinstance(text, str) else []
    if not all(parts):
        raise ValueError(expected)
    if len(parts) == 3 and parts[0] == "service":
        return Peer("service", parts[2], parts[1])
    if len(parts) != 2 or parts[0] == "service":
        raise ValueError(expected)
    kind, name = parts
    if kind == "ip":
        return Peer("ip", address=_address(name))
    if kind == "entity":
        if name not in ENTITIES:
            raise ValueError(f"expected one of the entities {', '.join(ENTITIES)}")
        return Peer("entity", name)
    return Peer(kind, name) if kind in ("fqdn", "workload") else Peer("pod", name, kind)


def _address(text: str) -> IPv4Address | IPv6Address:
    try:
        return ip_address(text)
    except ValueError:
        raise ValueError("expected ip/ADDRESS with an IPv4 or IPv6 address") from None


def _port(reader: Reader, fields: Mapping[str, Any], path: str) -> tuple[int | None, str | None]:
    port, protocol = fields.get("port"), fields.get("protocol")
    if protocol is None:
        name = None if port is None else "TCP"
    else:
        name = _PROTOCOLS.get(protocol.upper()) if isinstance(protocol, str) else None
        if name is None:
            reader.problem(f"{path}.protocol", protocol, f"expected one of {', '.join(PROTOCOLS)}")
    icmp = name in ("ICMP", "ICMPv6")
    limit = (0, 255) if icmp else (1, 65535)
    if port is not None and (not isinstance(port, int) or isinstance(port, bool) or not limit[0] <= port <= limit[1]):
        expected = "an ICMP message type, 0 to 255" if icmp else "a port, 1 to 65535, or null for layer 3"
        reader.problem(f"{path}.port", port, f"expected {expected}")
        return None, name
    return port, name


def _request(reader: Reader, value: Any, path: str, kind: str) -> L7Request | None:
    if value is None:
        return None
    try:
        request = msgspec.convert(value, _REQUESTS[kind])
    except msgspec.ValidationError as error:
        text = str(error).replace("`$.", f"`{path}.").replace("`$`", f"`{path}`")
        reader.problem(path, value, f"expected {kind} detail: {text}")
        return None
    if isinstance(request, KafkaRequest) and isinstance(request.api_key, str):
        if request.api_key and request.api_key.lower() not in KAFKA_KEYS:
            reader.problem(f"{path}.apiKey", request.api_key, "expected the name of a Kafka request, such as produce")
        if request.role not in ("", "produce", "consume"):
            reader.problem(f"{path}.role", request.role, "expected produce or consume")
    return request
