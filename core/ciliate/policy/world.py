"""A cluster from manifests, as far as policy can see it: pods, namespaces, services, nodes and their identities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import msgspec

from ciliate.document import Document
from ciliate.hints import typing_errors
from ciliate.identity.filter import LabelFilter
from ciliate.labels import (
    KEY_FORM,
    MAX_NAME,
    SOURCE_CIDR,
    SOURCE_CONTAINER,
    SOURCE_RESERVED,
    VALUE_FORM,
    LabelSet,
    parse_label,
    valid_key,
    valid_namespace,
    valid_subdomain,
    valid_value,
)
from ciliate.policy.importer import CLUSTER_ANNOTATION, KINDS, is_policy, may_be_policy
from ciliate.policy.model import Network
from ciliate.policy.problems import Problem
from ciliate.policy.reader import ABSENT, NAME, Reader
from ciliate.policy.selectors import Service
from ciliate.workload import pod_identity_labels

Address = IPv4Address | IPv6Address
NEARLY = 2
"""Typing errors that make a kind of a scenario a misspelt one; other kinds are left alone."""
PROTOCOLS = ("TCP", "UDP", "SCTP")


class Pod(msgspec.Struct, frozen=True):
    """A pod as policy sees it."""

    namespace: str
    name: str
    labels: LabelSet
    plain_labels: dict[str, str]
    addresses: tuple[Address, ...] = ()
    ports: dict[str, list[tuple[str, int]]] = {}
    host_network: bool = False

    def address(self, version: int) -> Address | None:
        """Its address of that family, if known."""
        return next((item for item in self.addresses if item.version == version), None)


class ServicePort(msgspec.Struct, frozen=True):
    """One port of a service; ``target`` is a number or a port name."""

    name: str
    protocol: str
    port: int
    target: int | str


class Backend(msgspec.Struct, frozen=True):
    """One address behind a service without selector, and its ports by (name, protocol)."""

    address: Address
    ports: dict[tuple[str, str], int]


class ClusterService(msgspec.Struct, frozen=True):
    """A service."""

    namespace: str
    name: str
    labels: dict[str, str]
    selector: dict[str, str]
    ports: tuple[ServicePort, ...]
    addresses: tuple[Address, ...] = ()


WORKLOAD = "Workload"
WORKLOAD_PEER = "workload"
"""How a flow names one: `workload/NAME`."""
WORKLOAD_API = "ciliate.io/v1alpha1"
_CLOSED_SOURCES = (SOURCE_RESERVED, SOURCE_CIDR, "fqdn")


def read_workload(reader: Reader) -> tuple[str, LabelSet, dict[str, list[tuple[str, int]]]] | None:
    """Name, labels and named ports of a Workload object; mistakes go to the reader."""
    obj = reader.document.object
    before = len(reader.problems)
    if obj.get("apiVersion") != WORKLOAD_API:
        reader.problem("apiVersion", obj.get("apiVersion", ABSENT), f"expected {WORKLOAD_API}")
    reader.mapping(obj, "", ("apiVersion", "kind", "metadata", "spec", "status"))
    meta = reader.mapping(obj.get("metadata", ABSENT), "metadata", ("name", "annotations")) or {}
    name = meta.get("name", ABSENT)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        reader.problem("metadata.name", name, "expected a name of lower-case letters, digits, '-' and '.'")
    spec = reader.mapping(obj.get("spec") or {}, "spec", ("labels", "ports")) or {}
    labels = []
    for text, path in reader.items(spec.get("labels"), "spec.labels"):
        label = parse_label(text, SOURCE_CONTAINER) if isinstance(text, str) and text else None
        if label is None or not valid_key(label.key) or not valid_value(label.value) or label.source in _CLOSED_SOURCES:
            reader.problem(path, text, "expected a label SOURCE:KEY=VALUE, such as container:app=web")
        else:
            labels.append(label)
    ports: dict[str, list[tuple[str, int]]] = {}
    for item, path in reader.items(spec.get("ports"), "spec.ports"):
        fields = reader.mapping(item, path, ("name", "port", "protocol")) or {}
        number, protocol = fields.get("port"), fields.get("protocol") or "TCP"
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 65536:
            reader.problem(f"{path}.port", number, "expected a port, 1 to 65535")
        elif protocol not in PROTOCOLS:
            reader.problem(f"{path}.protocol", protocol, f"expected one of {', '.join(PROTOCOLS)}")
        elif reader.text(fields.get("name", ABSENT), f"{path}.name", "the name of a port"):
            ports.setdefault(fields["name"], []).append((protocol, number))
    return (str(name), LabelSet(labels), ports) if len(reader.problems) == before else None


class World:
    """Everything that the manifests tell. ``problems`` lists what is wrong with them."""

    def __init__(self, documents: Iterable[Document], cluster: str = "default") -> None:
        self.cluster = cluster
        self.problems: list[Problem] = []
        self.policies: list[Document] = []
        self.pods: dict[str, Pod] = {}
        self.services: dict[tuple[str, str], ClusterService] = {}
        self.backends: dict[tuple[str, str], list[Backend]] = {}
        self.hosts: set[Address] = set()
        self._namespaces: dict[tuple[str, str], dict[str, str]] = {}
        self._filter, self._kept = LabelFilter(), dict[str, bool]()
        readers = [Reader(document) for document in documents]
        for reader in readers:
            self._first(reader)
        for reader in readers:
            kind = reader.document.object.get("kind")
            if kind == "Pod":
                self._pod(reader)
            elif kind == WORKLOAD:
                self._workload(reader)
            self.problems.extend(reader.problems)
        self.by_address = {address: pod for pod in self.pods.values() for address in pod.addresses}
        self.by_cluster_address = {address: item for item in self.services.values() for address in item.addresses}

    def _first(self, reader: Reader) -> None:
        kind = reader.document.object.get("kind", ABSENT)
        if is_policy(reader.document.object):
            self.policies.append(reader.document)
            return
        handler = self._handlers().get(kind) if isinstance(kind, str) else None
        if handler is not None:
            handler(reader)
        elif kind not in ("Pod", WORKLOAD):
            known = sorted({*self._handlers(), "Pod", WORKLOAD, *(name for name in KINDS if name != "Rule")})
            nearly = isinstance(kind, str) and any(typing_errors(kind, name, NEARLY) <= NEARLY for name in known)
            if nearly or may_be_policy(reader.document.object):
                reader.problem("kind", kind, f"expected one of {', '.join(known)}")

    def _handlers(self) -> Mapping[str, Any]:
        return {
            "Namespace": self._namespace,
            "Service": self._service,
            "Endpoints": self._endpoints,
            "EndpointSlice": self._slice,
            "Node": self._node,
        }

    def _meta(self, reader: Reader, namespaced: bool = True) -> tuple[str, str, dict[str, str], str] | None:
        meta = reader.mapping(reader.document.object.get("metadata", ABSENT), "metadata")
        if meta is None:
            return None
        before = len(reader.problems)
        name = meta.get("name", ABSENT)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            reader.problem("metadata.name", name, "expected a name of lower-case letters, digits, '-' and '.'")
        namespace = meta.get("namespace") or ("default" if namespaced else "")
        if reader.text(namespace, "metadata.namespace", "a namespace") and not valid_namespace(namespace):
            expected = f"expected at most {MAX_NAME} lower-case letters, digits and '-'"
            reader.problem("metadata.namespace", namespace, expected)
        labels = self._labels(reader, meta.get("labels"), "metadata.labels")
        annotations = self._texts(reader, meta.get("annotations"), "metadata.annotations")
        if len(reader.problems) > before:
            return None
        return namespace, name, labels, annotations.get(CLUSTER_ANNOTATION, self.cluster)

    def _texts(self, reader: Reader, value: Any, path: str) -> dict[str, str]:
        if value is None:
            return {}
        found = reader.mapping(value, path) or {}
        return {key: item for key, item in found.items() if reader.text(item, f"{path}.{key}") is not None}

    def _labels(self, reader: Reader, value: Any, path: str) -> dict[str, str]:
        """Labels as Kubernetes takes them."""
        found = self._texts(reader, value, path)
        for key, item in found.items():
            if not isinstance(key, str) or not valid_key(key):
                reader.problem(f"{path}.{key}", key, f"expected the key {KEY_FORM}")
            elif not valid_value(item):
                reader.problem(f"{path}.{key}", item, f"expected {VALUE_FORM}")
        return found

    def _namespace(self, reader: Reader) -> None:
        meta = self._meta(reader, namespaced=False)
        if meta is not None:
            self._namespaces[meta[3], meta[1]] = meta[2]

    def _namespace_labels(self, cluster: str, name: str) -> dict[str, str]:
        labels = self._namespaces.get((cluster, name)) or self._namespaces.get((self.cluster, name)) or {}
        # the API server gives every namespace this label
        return {**labels, "kubernetes.io/metadata.name": name}

    def _pod(self, reader: Reader) -> None:
        meta = self._meta(reader)
        obj = reader.document.object
        spec = reader.mapping(obj.get("spec") or {}, "spec")
        if meta is None or spec is None:
            return
        namespace, name, labels, cluster = meta
        account = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
        if reader.text(account, "spec.serviceAccountName") is None:
            return
        if not valid_subdomain(account):
            reader.problem("spec.serviceAccountName", account, "expected lower-case letters, digits, '-' and '.'")
            return
        key = f"{namespace}/{name}"
        if key in self.pods:
            reader.problem("metadata.name", name, f"expected one pod {key}, this is the second")
            return
        spaces = self._namespace_labels(cluster, namespace)
        host = spec.get("hostNetwork") is True
        pod = Pod(
            namespace=namespace,
            name=name,
            labels=self._identity_labels(pod_identity_labels(labels, namespace, spaces, account, cluster)),
            plain_labels=labels,
            addresses=tuple(self._pod_addresses(reader, obj.get("status"))),
            ports=self._named_ports(reader, spec),
            host_network=host,
        )
        self.pods[key] = pod
        if host:
            self.hosts.update(pod.addresses)

    def _workload(self, reader: Reader) -> None:
        """A container that no orchestrator speaks for: its labels say their source, and it is in no namespace."""
        workload = read_workload(reader)
        if workload is None:
            return
        name, labels, ports = workload
        key = f"{WORKLOAD_PEER}/{name}"
        if key in self.pods:
            reader.problem("metadata.name", name, f"expected one workload {name}, this is the second")
            return
        addresses = tuple(self._pod_addresses(reader, reader.document.object.get("status")))
        self.pods[key] = Pod("", name, self._identity_labels(labels), {}, addresses, ports)

    def _identity_labels(self, labels: LabelSet) -> LabelSet:
        """Without what an agent leaves out of identities by default: a policy cannot ask for that."""
        kept = []
        for label in labels:
            if label.key not in self._kept:
                self._kept[label.key] = self._filter.keeps(label)
            if self._kept[label.key]:
                kept.append(label)
        return LabelSet(kept) if len(kept) < len(labels) else labels

    def _pod_addresses(self, reader: Reader, status: Any) -> Iterator[Address]:
        fields = reader.mapping(status, "status") if status is not None else None
        if not fields:
            return
        texts = [(fields.get("podIP"), "status.podIP")]
        for item, path in reader.items(fields.get("podIPs"), "status.podIPs"):
            below = reader.mapping(item, path)
            if below is not None:
                texts.append((below.get("ip"), f"{path}.ip"))
        seen = set()
        for text, path in texts:
            address = self._address(reader, text, path) if text is not None else None
            if address is not None and address not in seen:
                seen.add(address)
                yield address

    def _address(self, reader: Reader, text: Any, path: str) -> Address | None:
        try:
            if not isinstance(text, str):
                raise ValueError(text)
            return ip_address(text)
        except ValueError:
            reader.problem(path, text, "expected an IPv4 or IPv6 address")
            return None

    def _named_ports(self, reader: Reader, spec: dict[str, Any]) -> dict[str, list[tuple[str, int]]]:
        found: dict[str, list[tuple[str, int]]] = {}
        for container, path in reader.items(spec.get("containers"), "spec.containers"):
            fields = reader.mapping(container, path) or {}
            for item, below in reader.items(fields.get("ports"), f"{path}.ports"):
                port = reader.mapping(item, below)
                if port is None:
                    continue
                number = self._number(reader, port.get("containerPort", ABSENT), f"{below}.containerPort")
                protocol = self._protocol(reader, port.get("protocol"), f"{below}.protocol")
                if port.get("name") is not None and number and reader.text(port["name"], f"{below}.name"):
                    found.setdefault(port["name"], []).append((protocol, number))
        return found

    def _number(self, reader: Reader, value: Any, path: str) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536:
            return value
        reader.problem(path, value, "expected a port, 1 to 65535")
        return 0

    def _protocol(self, reader: Reader, value: Any, path: str) -> str:
        if value is None:
            return "TCP"
        if value not in PROTOCOLS:
            reader.problem(path, value, f"expected one of {', '.join(PROTOCOLS)}")
            return "TCP"
        return str(value)

    def _service(self, reader: Reader) -> None:
        meta = self._meta(reader)
        spec = reader.mapping(reader.document.object.get("spec") or {}, "spec")
        if meta is None or spec is None:
            return
        namespace, name, labels, _ = meta
        ports = []
        for item, path in reader.items(spec.get("ports"), "spec.ports"):
            fields = reader.mapping(item, path)
            if fields is None:
                continue
            number = self._number(reader, fields.get("port", ABSENT), f"{path}.port")
            target = fields.get("targetPort")
            if target is not None and not isinstance(target, (int, str)):
                reader.problem(f"{path}.targetPort", target, "expected a port number or name")
                target = None
            protocol = self._protocol(reader, fields.get("protocol"), f"{path}.protocol")
            ports.append(ServicePort(str(fields.get("name") or ""), protocol, number, target or number))
        texts = [(spec.get("clusterIP"), "spec.clusterIP"), *reader.items(spec.get("clusterIPs"), "spec.clusterIPs")]
        addresses = [self._address(reader, text, path) for text, path in texts if text not in (None, "None", "")]
        selector = self._texts(reader, spec.get("selector"), "spec.selector")
        found = tuple(dict.fromkeys(item for item in addresses if item is not None))
        self.services[namespace, name] = ClusterService(namespace, name, labels, selector, tuple(ports), found)

    def _endpoints(self, reader: Reader) -> None:
        meta = self._meta(reader)
        if meta is None:
            return
        for item, path in reader.items(reader.document.object.get("subsets"), "subsets"):
            fields = reader.mapping(item, path)
            if fields is None:
                continue
            ports = self._endpoint_ports(reader, fields.get("ports"), f"{path}.ports")
            for entry, below in reader.items(fields.get("addresses"), f"{path}.addresses"):
                inner = reader.mapping(entry, below) or {}
                self._backend(reader, meta, inner.get("ip", ABSENT), f"{below}.ip", ports)

    def _slice(self, reader: Reader) -> None:
        meta = self._meta(reader)
        if meta is None:
            return
        service = meta[2].get("kubernetes.io/service-name")
        if not service:
            reader.problem("metadata.labels", meta[2], "expected label kubernetes.io/service-name")
            return
        obj = reader.document.object
        ports = self._endpoint_ports(reader, obj.get("ports"), "ports")
        for item, path in reader.items(obj.get("endpoints"), "endpoints"):
            fields = reader.mapping(item, path) or {}
            for text, below in reader.items(fields.get("addresses"), f"{path}.addresses"):
                self._backend(reader, (meta[0], service), text, below, ports)

    def _endpoint_ports(self, reader: Reader, value: Any, path: str) -> dict[tuple[str, str], int]:
        found = {}
        for item, below in reader.items(value, path):
            fields = reader.mapping(item, below)
            if fields is None:
                continue
            number = self._number(reader, fields.get("port", ABSENT), f"{below}.port")
            protocol = self._protocol(reader, fields.get("protocol"), f"{below}.protocol")
            found[str(fields.get("name") or ""), protocol] = number
        return found

    def _backend(
        self, reader: Reader, meta: tuple[Any, ...], text: Any, path: str, ports: dict[tuple[str, str], int]
    ) -> None:
        address = self._address(reader, text, path)
        if address is not None:
            self.backends.setdefault((meta[0], meta[1]), []).append(Backend(address, ports))

    def _node(self, reader: Reader) -> None:
        status = reader.mapping(reader.document.object.get("status") or {}, "status") or {}
        for item, path in reader.items(status.get("addresses"), "status.addresses"):
            fields = reader.mapping(item, path) or {}
            if fields.get("type") in ("InternalIP", "ExternalIP"):
                address = self._address(reader, fields.get("address", ABSENT), f"{path}.address")
                if address is not None:
                    self.hosts.add(address)

    def external_services(self) -> dict[tuple[str, str], Service]:
        """Services without selector, which toServices may name, with their endpoints' addresses."""
        return {
            key: Service(item.labels, [network_of(backend.address) for backend in self.backends.get(key, [])])
            for key, item in self.services.items()
            if not item.selector
        }

    def selected_pods(self, service: ClusterService) -> list[Pod]:
        """The pods that a service's selector selects."""
        return [
            pod
            for pod in self.pods.values()
            if pod.namespace == service.namespace and service.selector.items() <= pod.plain_labels.items()
        ]


def network_of(address: Address) -> Network:
    """The prefix of exactly this address."""
    return ip_network(address)


def covering(address: Address) -> Iterator[Network]:
    """Every prefix that holds the address, the widest first."""
    for length in range(address.max_prefixlen + 1):
        yield ip_network((address, length), strict=False)
