"""What a cluster does for services and a lab has to do itself: cluster addresses, and endpoints from selectors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec

from ciliate.lab.errors import LabError
from ciliate.lab.state import NODE, WORLD, LabPod

RANGES = (ip_network("10.96.0.0/16"), ip_network("fd00:c11:96::/112"))
FIRST = 10
"""The first host number of a range that a service gets."""
Name = tuple[str, str]


class LabService(msgspec.Struct):
    """A service of a lab: its addresses, and by (protocol, port) the places that answer with their ports."""

    addresses: tuple[str, ...] = ()
    targets: dict[tuple[str, int], tuple[tuple[str, int], ...]] = {}
    node_ports: dict[tuple[str, int], tuple[tuple[str, int], ...]] = {}
    """The same for the ports of nodes."""


class _Pod(msgspec.Struct):
    labels: dict[str, str]
    addresses: list[str]
    ports: dict[tuple[str, str], int]
    place: str


class ServicePlan:
    """The objects that a lab's agent is given, and where each service's packets end."""

    def __init__(
        self,
        documents: Iterable[Mapping[str, Any]],
        manifests: Mapping[str, Mapping[str, Any]],
        pods: Mapping[str, LabPod],
        pod_addresses: Mapping[str, str],
    ) -> None:
        """``manifests`` and ``pods`` by namespace/name; ``pod_addresses``: those of the manifests, with their pods."""
        self._pods = {name: _pod(name, manifests[name], pods[name]) for name in manifests}
        self._given = pod_addresses
        self._used: set[str] = set()
        found = [copy.deepcopy(dict(item)) for item in documents]
        services = {_name(item): item for item in found if item["kind"] == "Service"}
        endpoints = [self._real(item) for item in found if item["kind"] != "Service"]
        named = {_owner(item) for item in endpoints}
        for item in services.values():
            self._used |= set(_addresses(item))
        for name, item in services.items():
            told = [address for part in endpoints if _owner(part) == name for address, _ in _targets(part)]
            self._allocate(item, {ip_address(text).version for text in told} or {4, 6})
        made = [
            self._slice(item, version) for name, item in services.items() if name not in named for version in (4, 6)
        ]
        self.objects = [*services.values(), *endpoints, *(item for item in made if item["endpoints"])]
        self.outside = [address for item in endpoints for address, _ in _targets(item) if not self._is_pod(address)]
        places = {address: pod.place for pod in self._pods.values() for address in pod.addresses}
        self.services = {name: _service(item, self.objects, places) for name, item in services.items()}

    def _allocate(self, service: dict[str, Any], versions: set[int]) -> None:
        """An address of each of its endpoints' families, unless the manifest says otherwise."""
        spec = service.setdefault("spec", {})
        if spec.get("clusterIP") or spec.get("clusterIPs") or spec.get("type") == "ExternalName":
            return
        chosen = []
        for network in RANGES:
            if network.version not in versions:
                continue
            address = next(text for number in range(FIRST, 60000) if (text := str(network[number])) not in self._used)
            self._used.add(address)
            chosen.append(address)
        spec["clusterIP"], spec["clusterIPs"] = chosen[0], chosen

    def _real(self, item: dict[str, Any]) -> dict[str, Any]:
        """Endpoints with the lab's addresses in place of those that the manifests give to pods."""
        if item["kind"] == "Endpoints":
            for subset in item.get("subsets") or ():
                subset["addresses"] = [
                    {**entry, "ip": text} for entry in subset.get("addresses") or () for text in self._of(entry["ip"])
                ]
        else:
            for endpoint in item.get("endpoints") or ():
                endpoint["addresses"] = [text for given in endpoint["addresses"] for text in self._of(given)]
        return item

    def _is_pod(self, address: str) -> bool:
        return any(address in pod.addresses for pod in self._pods.values())

    def _of(self, address: str) -> list[str]:
        pod = self._pods.get(self._given.get(address, ""))
        return pod.addresses if pod else [address]

    def _slice(self, service: Mapping[str, Any], version: int) -> dict[str, Any]:
        """What the cluster's controller would make of a selector, for one address family."""
        namespace, name = _name(service)
        spec = service["spec"]
        chosen = list(self._selected(namespace, spec.get("selector") or {}))
        ports, endpoints = [], []
        for port in spec.get("ports") or ():
            protocol, target = port.get("protocol") or "TCP", port.get("targetPort") or port["port"]
            numbers = {_number(pod, target, protocol) for pod in chosen} - {None}
            if len(numbers) > 1:
                raise LabError(f"service {namespace}/{name}: port {target!r} is another number in each pod")
            ports += [{"name": port.get("name") or "", "protocol": protocol, "port": number} for number in numbers]
        for pod in chosen:
            addresses = [text for text in pod.addresses if ip_address(text).version == version]
            if addresses:
                endpoints.append({"addresses": addresses[:1], "conditions": {"ready": True}})
        metadata = {
            "name": f"{name}-v{version}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": name},
        }
        return {"kind": "EndpointSlice", "metadata": metadata, "endpoints": endpoints, "ports": ports}

    def _selected(self, namespace: str, selector: Mapping[str, str]) -> Iterator[_Pod]:
        if selector:
            for name, pod in self._pods.items():
                if name.startswith(f"{namespace}/") and selector.items() <= pod.labels.items():
                    yield pod


def _pod(name: str, manifest: Mapping[str, Any], pod: LabPod) -> _Pod:
    ports = {
        (port["name"], port.get("protocol") or "TCP"): port["containerPort"]
        for container in (manifest.get("spec") or {}).get("containers") or ()
        for port in container.get("ports") or ()
        if port.get("name")
    }
    labels = manifest["metadata"].get("labels") or {}
    return _Pod(labels, pod.addresses, ports, NODE if pod.host_network else name)


def _number(pod: _Pod, target: int | str, protocol: str) -> int | None:
    return target if isinstance(target, int) else pod.ports.get((target, protocol))


def _name(item: Mapping[str, Any]) -> Name:
    return item["metadata"].get("namespace") or "default", item["metadata"]["name"]


def _owner(item: Mapping[str, Any]) -> Name:
    namespace, name = _name(item)
    return namespace, (item["metadata"].get("labels") or {}).get("kubernetes.io/service-name", name)


def _addresses(service: Mapping[str, Any]) -> list[str]:
    spec = service.get("spec") or {}
    texts = [spec.get("clusterIP"), *(spec.get("clusterIPs") or ())]
    return list(dict.fromkeys(text for text in texts if text and text != "None"))


def _service(service: Mapping[str, Any], objects: Iterable[Mapping[str, Any]], places: Mapping[str, str]) -> LabService:
    found = LabService(tuple(_addresses(service)), {}, {})
    parts = [item for item in objects if item["kind"] != "Service" and _owner(item) == _name(service)]
    for port in service["spec"].get("ports") or ():
        key = (port.get("name") or "", port.get("protocol") or "TCP")
        targets = dict.fromkeys(
            (places.get(address, WORLD), number)
            for item in parts
            for address, ports in _targets(item)
            for name, protocol, number in ports
            if (name, protocol) == key
        )
        found.targets[key[1], port["port"]] = tuple(targets)
        if port.get("nodePort"):
            found.node_ports[key[1], port["nodePort"]] = tuple(targets)
    return found


def _targets(item: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    if item["kind"] == "EndpointSlice":
        for endpoint in item.get("endpoints") or ():
            for address in endpoint["addresses"]:
                yield address, _ports(item)
        return
    for subset in item.get("subsets") or ():
        for entry in subset.get("addresses") or ():
            yield entry["ip"], _ports(subset)


def _ports(item: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    return [(port.get("name") or "", port.get("protocol") or "TCP", port["port"]) for port in item.get("ports") or ()]
