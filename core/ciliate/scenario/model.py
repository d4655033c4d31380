"""Scenarios as data: peers, flows, expectations; reading them with every mistake named by file, line and field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import msgspec

from ciliate import manifest
from ciliate.manifest import Document, ManifestError
from ciliate.policy.l7rules import KAFKA_KEYS, DnsRequest, HttpRequest, KafkaRequest, L7Request
from ciliate.policy.model import PROTOCOLS
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.reader import ABSENT, Reader

API_VERSION = "ciliate.io/v1alpha1"
KIND = "Expectation"
ALLOW, DENY = "allow", "deny"
ENTITIES = ("host", "world", "init", "health", "unmanaged")
FLOW_FIELDS = ("from", "to", "port", "protocol", "direction", "verdict", "http", "dns", "kafka", "note")
_PROTOCOLS = {name.upper(): name for name in PROTOCOLS}
_REQUESTS: dict[str, type[L7Request]] = {"http": HttpRequest, "dns": DnsRequest, "kafka": KafkaRequest}


class Peer(msgspec.Struct, frozen=True):
    """One end of a flow. ``kind`` is pod, ip, entity, fqdn or service; ``name`` is that of any but ip."""

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
    note: str = ""

    @property
    def request(self) -> L7Request | None:
        """The layer-7 detail, if any."""
        return self.http or self.dns or self.kafka


class Expectation(msgspec.Struct, frozen=True):
    """The flows of one Expectation object, and the enforcement mode in which they are asked."""

    flows: tuple[Flow, ...]
    enforcement: str = "default"
    file: str = ""
    line: int = 0


class Scenario(msgspec.Struct, frozen=True):
    """One file: its manifests (policies, pods, namespaces, services) and its expectations."""

    name: str
    objects: list[Document]
    expectations: list[Expectation]


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
    spec = reader.mapping(obj.get("spec", ABSENT), "spec", ("enforcement", "flows")) or {}
    enforcement = spec.get("enforcement") or "default"
    if enforcement not in ("default", "always", "never"):
        reader.problem("spec.enforcement", enforcement, "expected default, always or never")
    flows = [read_flow(reader, item, path) for item, path in reader.items(spec.get("flows"), "spec.flows")]
    return Expectation(
        tuple(flow for flow in flows if flow is not None), str(enforcement), document.file, document.line
    )


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
    verdict = fields.get("verdict", "" if not verdict_needed else ABSENT)
    if verdict not in (ALLOW, DENY) and (verdict_needed or verdict != ""):
        reader.problem(f"{path}.verdict", verdict, "expected allow or deny")
    requests = {name: _request(reader, fields.get(name), f"{path}.{name}", name) for name in _REQUESTS}
    if sum(item is not None for item in requests.values()) > 1:
        reader.problem(path, ABSENT, "expected only one of http, dns and kafka")
    if src is None or dst is None or len(reader.problems) > before:
        return None
    return Flow(src, dst, port, protocol, direction, verdict, note=str(fields.get("note") or ""), **requests)  # type: ignore[arg-type]


def _peer(reader: Reader, value: Any, path: str) -> Peer | None:
    try:
        return parse_peer(value)
    except ValueError as error:
        reader.problem(path, value, str(error))
        return None


def parse_peer(text: Any) -> Peer:
    """``namespace/pod``, ``ip/ADDRESS``, ``entity/NAME``, ``fqdn/NAME`` or ``service/namespace/name``.

    Raises ValueError saying what was expected.
    """
    expected = "expected namespace/pod, ip/ADDRESS, entity/NAME, fqdn/NAME or service/namespace/name"
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
    return Peer("fqdn", name) if kind == "fqdn" else Peer("pod", name, kind)


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
