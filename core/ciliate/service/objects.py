"""Kubernetes' Service, Endpoints and EndpointSlice, and the services that they make on a node. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from ciliate.policy.selectors import Service as PolicyService
from ciliate.service.model import (
    MAX_AFFINITY,
    Address,
    BackendSpec,
    FrontendSpec,
    Port,
    Problem,
    Rules,
    ServiceError,
    ServiceSpec,
    is_usable,
)
from ciliate.service.refusal import refusal, too_large

KINDS = ("Service", "Endpoints", "EndpointSlice")
SERVICE_NAME = "kubernetes.io/service-name"
AFFINITY_DEFAULT = 10800
HOME = {4: "0.0.0.0", 6: "::"}
"""Frontends of node ports at the node's own loopback addresses."""
RANGED = ("LoadBalancer", "ExternalIP")
"""Whose clients ``loadBalancerSourceRanges`` is about. Node ports are for the balancer in front."""
Protocol = Literal["TCP", "UDP", "SCTP"]
Name = tuple[str, str]
"""Namespace and name of a service."""


class _Meta(msgspec.Struct, frozen=True, rename={"given": "namespace"}):
    name: str
    given: str | None = None
    labels: dict[str, str] | None = None

    @property
    def namespace(self) -> str:
        """The namespace, ``default`` where none is given."""
        return self.given or "default"


class _Port(msgspec.Struct, frozen=True, rename="camel"):
    port: Port
    name: str | None = None
    protocol: Protocol | None = None
    node_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None


class _ClientIp(msgspec.Struct, frozen=True, rename="camel"):
    timeout_seconds: Annotated[int, msgspec.Meta(ge=1, le=MAX_AFFINITY)] = AFFINITY_DEFAULT


class _AffinityConfig(msgspec.Struct, frozen=True, rename={"client_ip": "clientIP"}):
    client_ip: _ClientIp | None = None


class _Ingress(msgspec.Struct, frozen=True):
    ip: str | None = None


class _LoadBalancer(msgspec.Struct, frozen=True):
    ingress: list[_Ingress] | None = None


class _Status(msgspec.Struct, frozen=True, rename="camel"):
    load_balancer: _LoadBalancer | None = None


_SPEC_NAMES = {
    "cluster_ip": "clusterIP",
    "cluster_ips": "clusterIPs",
    "external_ips": "externalIPs",
    "session_affinity": "sessionAffinity",
    "session_affinity_config": "sessionAffinityConfig",
    "external_traffic_policy": "externalTrafficPolicy",
    "load_balancer_source_ranges": "loadBalancerSourceRanges",
}


class _Spec(msgspec.Struct, frozen=True, rename=_SPEC_NAMES):
    type: str | None = None
    cluster_ip: str | None = None
    cluster_ips: list[str] | None = None
    external_ips: list[str] | None = None
    ports: list[_Port] | None = None
    selector: dict[str, str] | None = None
    session_affinity: str | None = None
    session_affinity_config: _AffinityConfig | None = None
    external_traffic_policy: str | None = None
    load_balancer_source_ranges: list[str] | None = None


class ServiceObject(msgspec.Struct, frozen=True):
    """A Service, as far as it matters here."""

    metadata: _Meta
    spec: _Spec = _Spec()
    status: _Status | None = None


class _Address(msgspec.Struct, frozen=True, rename="camel"):
    ip: str
    node_name: str | None = None


class _EndpointPort(msgspec.Struct, frozen=True):
    port: Port | None = None
    name: str | None = None
    protocol: Protocol | None = None


class _Subset(msgspec.Struct, frozen=True):
    addresses: list[_Address] | None = None
    ports: list[_EndpointPort] | None = None


class EndpointsObject(msgspec.Struct, frozen=True):
    """Endpoints of the service of the same name."""

    metadata: _Meta
    subsets: list[_Subset] | None = None


class _Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None

    @property
    def serves(self) -> bool:
        """Whether new flows are for it."""
        return self.ready is not False

    @property
    def ends(self) -> bool:
        """Whether it answers still, while it terminates."""
        return not self.serves and bool(self.serving) and bool(self.terminating)


class _SliceEndpoint(msgspec.Struct, frozen=True, rename="camel"):
    addresses: list[str] | None
    conditions: _Conditions | None = None
    node_name: str | None = None


class SliceObject(msgspec.Struct, frozen=True, rename="camel"):
    """A part of a service's endpoints."""

    metadata: _Meta
    address_type: Literal["IPv4", "IPv6", "FQDN"] | None = None
    endpoints: list[_SliceEndpoint] | None = None
    ports: list[_EndpointPort] | None = None


class Target(NamedTuple):
    """A backend's address with its ports by (name, protocol)."""

    ip: str
    node: str
    ports: dict[tuple[str, str], int]
    terminating: bool = False


class Surroundings(NamedTuple):
    """What services depend on beside their objects."""

    node_addresses: tuple[Address, ...] = ()
    node_name: str = ""
    rules: Rules = Rules()


_TYPES: dict[str, Any] = {"Service": ServiceObject, "Endpoints": EndpointsObject, "EndpointSlice": SliceObject}


class ServiceObjects:
    """The objects that are known, by kind, namespace and name."""

    def __init__(self) -> None:
        self._services: dict[Name, ServiceObject] = {}
        self._targets: dict[Name, dict[tuple[str, str], list[Target]]] = {}
        self._owner: dict[tuple[str, str, str], Name] = {}
        self._left_out: dict[tuple[str, str, str], list[str]] = {}

    def upsert(self, objects: Iterable[Mapping[str, Any]]) -> set[Name]:
        """Take objects in, all or none; returns the services concerned. ServiceError names what is wrong."""
        problems: list[Problem] = []
        decoded = [item for index, raw in enumerate(objects) if (item := _decode(raw, index, problems))]
        if problems:
            raise ServiceError(problems)
        return {name for kind, item in decoded for name in self._put(kind, item) if name[1]}

    def _put(self, kind: str, item: Any) -> Iterator[Name]:
        meta = item.metadata
        key = (kind, meta.namespace, meta.name)
        if (before := self.remove(key)) is not None:
            yield before
        if isinstance(item, ServiceObject):
            name = (meta.namespace, meta.name)
            self._services[name] = item
        else:
            name = (meta.namespace, _service_of(item))
            self._targets.setdefault(name, {})[kind, meta.name] = list(_targets(item))
            if left := list(_left_out(item)):
                self._left_out[key] = left
        self._owner[key] = name
        yield name

    def left_out(self, keys: Iterable[tuple[str, str, str]] | None = None) -> list[str]:
        """What of the objects makes no backend, each with object, field and why. ``keys``: of these objects alone."""
        wanted = sorted(self._left_out if keys is None else set(keys) & self._left_out.keys())
        return [f"{'/'.join(key)}: {text}" for key in wanted for text in self._left_out[key]]

    def remove(self, key: tuple[str, str, str]) -> Name | None:
        """Forget an object by kind, namespace and name; returns the service concerned."""
        name = self._owner.pop(key, None)
        if name is None:
            return None
        self._left_out.pop(key, None)
        if key[0] == "Service":
            self._services.pop(name, None)
        else:
            self._targets.get(name, {}).pop((key[0], key[2]), None)
        return name

    def stored(self) -> list[tuple[str, str, str]]:
        """Kind, namespace and name of every object."""
        return sorted(self._owner)

    def names(self) -> set[Name]:
        """Every service of which there is an object."""
        return set(self._services)

    def specs(self, name: Name, around: Surroundings) -> list[ServiceSpec]:
        """The services that the node has for one; none where the object is not there. Of addresses that the rules
        do not let it have there is none."""
        service = self._services.get(name)
        if service is None or service.spec.type == "ExternalName":
            return []
        found = {}
        for kind, ip, port, item in _frontends(service, around):
            found[ip, port, item.protocol or "TCP"] = self._spec(service, kind, (ip, port), item, around)
        return list(found.values())

    def _spec(
        self, service: ServiceObject, kind: Any, front: tuple[str, int], port: _Port, around: Surroundings
    ) -> ServiceSpec:
        protocol, six = port.protocol or "TCP", ":" in front[0]
        found = [
            BackendSpec(target.ip, number, _is_local(target, around), target.terminating)
            for target in self._all_targets(service)
            if (number := target.ports.get((port.name or "", protocol))) and (":" in target.ip) == six
        ]
        # named twice, by two slices: the one that is ready counts
        backends = {(item.ip, item.port): item for item in sorted(found, key=lambda item: not item.terminating)}
        ranges = service.spec.load_balancer_source_ranges or [] if kind in RANGED else []
        return ServiceSpec(
            name=service.metadata.name,
            namespace=service.metadata.namespace,
            type=kind,
            frontend_address=FrontendSpec(*front, protocol),
            backend_addresses=list(backends.values()),
            session_affinity_timeout=_affinity(service.spec),
            external_traffic_policy="Local" if _is_external_local(service.spec, kind) else "Cluster",
            source_ranges=[_network(text) for text in ranges],
        )

    def _all_targets(self, service: ServiceObject) -> Iterator[Target]:
        """Slices say it all where there are any; Endpoints then only repeat them."""
        parts = self._targets.get((service.metadata.namespace, service.metadata.name), {})
        slices = [part for (kind, _), part in parts.items() if kind == "EndpointSlice"]
        for part in slices or parts.values():
            yield from part

    def external(self) -> dict[Name, PolicyService]:
        """Services without selector, as toServices knows them."""
        return {
            name: PolicyService(
                service.metadata.labels or {}, [ip_network(target.ip) for target in self._all_targets(service)]
            )
            for name, service in self._services.items()
            if not service.spec.selector
        }


def _decode(raw: Mapping[str, Any], index: int, problems: list[Problem]) -> tuple[str, Any] | None:
    kind = raw.get("kind") if isinstance(raw, Mapping) else None
    if not isinstance(kind, str) or kind not in _TYPES:
        problems.append(Problem(f"objects[{index}].kind", kind, f"one of {', '.join(KINDS)}"))
        return None
    try:
        item = msgspec.convert(raw, _TYPES[kind])
    except msgspec.ValidationError as error:
        problems.append(refusal(error, raw, f"objects[{index}]"))
        return None
    before = len(problems)
    try:
        msgspec.msgpack.encode(raw)  # it is kept on disk as it is
    except OverflowError:
        problems += too_large(raw, f"objects[{index}]")
    problems += [
        Problem(f"objects[{index}].{field}", text, "an IPv4 or IPv6 address")
        for field, text in _addresses(item)
        if not _is_address(text)
    ]
    return (kind, item) if len(problems) == before else None


def _addresses(item: Any) -> Iterator[tuple[str, str]]:
    if isinstance(item, ServiceObject):
        spec = item.spec
        for text in _cluster_ips(spec):
            yield "spec.clusterIP", text
        for text in spec.external_ips or ():
            yield "spec.externalIPs", text
    elif isinstance(item, EndpointsObject):
        for subset in item.subsets or ():
            for address in subset.addresses or ():
                yield "subsets.addresses.ip", address.ip
    elif item.address_type != "FQDN":
        for endpoint in item.endpoints or ():
            for text in endpoint.addresses or ():
                yield "endpoints.addresses", text


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _cluster_ips(spec: _Spec) -> list[str]:
    texts = [spec.cluster_ip or "", *(spec.cluster_ips or ())]
    return list(dict.fromkeys(text for text in texts if text not in ("", "None")))


def _service_of(item: Any) -> str:
    if isinstance(item, SliceObject):
        return (item.metadata.labels or {}).get(SERVICE_NAME, "")
    return str(item.metadata.name)


def _targets(item: Any) -> Iterator[Target]:
    """What an object says of backends, without what ``_left_out`` names."""
    if isinstance(item, EndpointsObject):
        for subset in item.subsets or ():
            ports = _numbers(subset.ports)
            for address in subset.addresses or ():
                if is_usable(ip_address(address.ip)):
                    yield Target(address.ip, address.node_name or "", ports)
        return
    if item.address_type == "FQDN" or not _service_of(item):
        return
    ports = _numbers(item.ports)
    for endpoint in item.endpoints or ():
        state = endpoint.conditions or _Conditions()
        if state.serves or state.ends:
            for text in endpoint.addresses or ():
                if is_usable(ip_address(text)):
                    yield Target(text, endpoint.node_name or "", ports, state.ends)


def _left_out(item: Any) -> Iterator[str]:
    """What of an object makes no backend, and why: it is no mistake that it was written."""
    if isinstance(item, SliceObject):
        if item.address_type == "FQDN":
            yield "addressType: FQDN has no addresses"
            return
        if not _service_of(item):
            yield f"metadata.labels: no label {SERVICE_NAME} says whose endpoints these are"
            return
        if any(port.port is None for port in item.ports or ()):
            index = next(index for index, port in enumerate(item.ports or ()) if port.port is None)
            yield f"ports[{index}].port: no number"
    for field, text in _addresses(item):
        if not is_usable(ip_address(text)):
            yield f"{field}: {text} is no address that packets can be sent to"


def _numbers(ports: list[_EndpointPort] | None) -> dict[tuple[str, str], int]:
    return {(item.name or "", item.protocol or "TCP"): item.port for item in ports or () if item.port is not None}


def _network(text: str) -> str:
    """A source range as Kubernetes reads it, where it can be read at all."""
    try:
        return str(ip_network(text.strip(), strict=False))
    except ValueError:
        return text


def _frontends(service: ServiceObject, around: Surroundings) -> Iterator[tuple[str, str, int, _Port]]:
    spec = service.spec
    external = [text for text in spec.external_ips or () if _allowed(text, around.rules)]
    ingress = (service.status and service.status.load_balancer and service.status.load_balancer.ingress) or []
    for port in spec.ports or ():
        for ip in _cluster_ips(spec):
            yield "ClusterIP", ip, port.port, port
        for ip in external:
            yield "ExternalIP", ip, port.port, port
        for item in ingress:
            if item.ip and _is_address(item.ip):
                yield "LoadBalancer", item.ip, port.port, port
        if port.node_port:
            for address in around.node_addresses:
                yield "NodePort", str(address), port.node_port, port
            for version in sorted({address.version for address in around.node_addresses}):
                yield "NodePort", HOME[version], port.node_port, port


def _allowed(text: str, rules: Rules) -> bool:
    return any(ip_address(text) in network for network in rules.external)


def _affinity(spec: _Spec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    config = spec.session_affinity_config
    return config.client_ip.timeout_seconds if config and config.client_ip else AFFINITY_DEFAULT


def _is_external_local(spec: _Spec, kind: str) -> bool:
    return kind != "ClusterIP" and spec.external_traffic_policy == "Local"


def _is_local(target: Target, around: Surroundings) -> bool:
    return bool(target.node) and target.node == around.node_name
