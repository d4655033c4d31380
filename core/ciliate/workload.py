"""What the orchestrator says of pods and namespaces: labels, service account, named ports.

Sources (the API today, a Kubernetes reflector later) put plain manifests in; the endpoint manager asks for the
labels that make a pod's identity. Generated labels: inventory PO-L03.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from ciliate import labels as lbl
from ciliate.labels import SOURCE_K8S, Label, LabelSet

_PROTOCOLS = ("TCP", "UDP", "SCTP")
NamedPorts = Mapping[str, list[tuple[str, int]]]
"""Port name -> (protocol, number) pairs, as a pod's containers declare them."""


def merge_ports(several: Iterable[NamedPorts]) -> NamedPorts:
    """Every named port of any; a name that means different numbers to different pods means all of them."""
    merged: dict[str, list[tuple[str, int]]] = {}
    for ports in several:
        for name, pairs in ports.items():
            known = merged.setdefault(name, [])
            known += [pair for pair in pairs if pair not in known]
    return merged


class WorkloadError(ValueError):
    """A manifest that cannot be used; the text names the object, the field and what was expected."""


class Pod(msgspec.Struct, frozen=True):
    """The part of a pod's manifest that networking needs."""

    namespace: str
    name: str
    labels: dict[str, str] = {}
    service_account: str = "default"
    ports: dict[str, list[tuple[str, int]]] = {}
    host_network: bool = False

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


def reserved_key(key: str) -> bool:
    """True for label keys that only the system may set, so that no pod can claim them (GO-2022-0959)."""
    return key.startswith(("io.cilium.", "io.kubernetes.pod.", "cilium-generated", "reserved:", "cidr:"))


def pod_identity_labels(
    pod_labels: Mapping[str, str],
    namespace: str,
    namespace_labels: Mapping[str, str] | None = None,
    service_account: str = "",
    cluster: str = "default",
) -> LabelSet:
    """The labels of a pod's identity before the label filter: its own, minus reserved keys, plus generated ones."""
    own = [Label(SOURCE_K8S, key, value) for key, value in pod_labels.items() if not reserved_key(key)]
    generated = [
        Label(SOURCE_K8S, lbl.NAMESPACE, namespace),
        Label(SOURCE_K8S, lbl.CLUSTER, cluster),
        *(
            Label(SOURCE_K8S, lbl.NAMESPACE_LABELS_PREFIX + key, value)
            for key, value in (namespace_labels or {}).items()
        ),
    ]
    if service_account:
        generated.append(Label(SOURCE_K8S, lbl.SERVICE_ACCOUNT, service_account))
    return LabelSet([*own, *generated])


class WorkloadRegistry:
    """Pods and namespaces as last told. Not thread-safe: it belongs to the agent's loop."""

    def __init__(self, cluster: str = "default") -> None:
        self._cluster = cluster
        self._pods: dict[str, Pod] = {}
        self._namespaces: dict[str, dict[str, str]] = {}
        self._observers: list[Callable[[set[str]], None]] = []

    def subscribe(self, observer: Callable[[set[str]], None]) -> None:
        """Call ``observer`` with the keys (``namespace/name``) of the pods whose labels may have changed."""
        self._observers.append(observer)

    def upsert(self, objects: Iterable[Mapping[str, Any]]) -> set[str]:
        """Take in Pod and Namespace manifests, all or none; returns the keys of the pods concerned.

        Raises WorkloadError where an object is malformed or of another kind.
        """
        pods: list[Pod] = []
        namespaces: dict[str, dict[str, str]] = {}
        for index, obj in enumerate(objects):
            kind = obj.get("kind") if isinstance(obj, Mapping) else None
            if kind == "Pod":
                pods.append(parse_pod(obj, index))
            elif kind == "Namespace":
                meta = _metadata(obj, index)
                name = _namespace(meta["name"], f"objects[{index}].metadata.name")
                namespaces[name] = _labels(meta.get("labels"), f"objects[{index}].metadata.labels")
            else:
                raise WorkloadError(f"objects[{index}].kind: {kind!r} given, expected Pod or Namespace")
        return self._apply(pods, namespaces)

    def _apply(self, pods: list[Pod], namespaces: dict[str, dict[str, str]]) -> set[str]:
        changed = {pod.key for pod in pods if self._pods.get(pod.key) != pod}
        self._pods.update((pod.key, pod) for pod in pods)
        for name, labels in namespaces.items():
            if self._namespaces.get(name) != labels:
                self._namespaces[name] = labels
                changed.update(pod.key for pod in self._pods.values() if pod.namespace == name)
        if changed:
            for observer in self._observers:
                observer(changed)
        return changed

    def clear(self) -> None:
        """Forget every pod and namespace."""
        self._pods.clear()
        self._namespaces.clear()

    def pod(self, namespace: str, name: str) -> Pod | None:
        """The pod as last told, or None."""
        return self._pods.get(f"{namespace}/{name}")

    def pods(self) -> list[Pod]:
        """Every known pod."""
        return list(self._pods.values())

    def identity_labels(self, namespace: str, name: str, extra: Mapping[str, str] | None = None) -> LabelSet | None:
        """Unfiltered identity labels of a pod; ``extra`` are labels that the runtime gave with the CNI call.

        None where nothing is known of the pod: neither a manifest nor extra labels.
        """
        pod = self.pod(namespace, name)
        if pod is None and not extra:
            return None
        own = {**(extra or {}), **(pod.labels if pod else {})}
        account = pod.service_account if pod else ""
        labels = pod_identity_labels(own, namespace, self._namespaces.get(namespace), account, self._cluster)
        # the one label of the system that a pod may carry: the label filter knows whether anybody listens to it
        claim = own.get(lbl.FIXED_IDENTITY)
        return labels.union([Label(SOURCE_K8S, lbl.FIXED_IDENTITY, claim)]) if claim else labels

    def known(self) -> bool:
        """Whether there is anything to export."""
        return bool(self._pods or self._namespaces)

    def export(self) -> dict[str, Any]:
        """Everything as plain data, for the state file."""
        return {
            "pods": [msgspec.to_builtins(pod) for pod in self._pods.values()],
            "namespaces": self._namespaces,
        }

    def restore(self, data: Mapping[str, Any]) -> None:
        """Take back what ``export`` gave; msgspec.ValidationError where it is malformed."""
        pods = msgspec.convert(data.get("pods", []), list[Pod])
        self._pods = {pod.key: pod for pod in pods}
        self._namespaces = msgspec.convert(data.get("namespaces", {}), dict[str, dict[str, str]])


def parse_pod(obj: Mapping[str, Any], index: int = 0) -> Pod:
    """Read a Pod manifest; WorkloadError names the field that is wrong."""
    meta, field = _metadata(obj, index), f"objects[{index}]"
    spec = _map(_given(obj, "spec", {}), f"{field}.spec")
    host_network = _given(spec, "hostNetwork", False)
    if not isinstance(host_network, bool):
        raise WorkloadError(f"{field}.spec.hostNetwork: {host_network!r} given, expected true or false")
    return Pod(
        namespace=_namespace(_given(meta, "namespace", "default"), f"{field}.metadata.namespace"),
        name=meta["name"],
        labels=_labels(meta.get("labels"), f"{field}.metadata.labels"),
        service_account=_account(_given(spec, "serviceAccountName", "default"), f"{field}.spec.serviceAccountName"),
        ports=_named_ports(spec, index),
        host_network=host_network,
    )


def _given(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    value = fields.get(name)
    return default if value is None or value == "" else value


def _metadata(obj: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    meta = _map(_given(obj, "metadata", {}), f"objects[{index}].metadata")
    _name(meta.get("name"), f"objects[{index}].metadata.name")
    return meta


def _name(value: Any, field: str) -> str:
    """A name of one word; it becomes part of keys, so no path separator may be in it."""
    if not isinstance(value, str) or not value or not value.isprintable() or "/" in value or " " in value:
        given = "" if value is None else f"{value!r} given, "
        raise WorkloadError(f"{field}: {given}expected a name without white space and '/'")
    return value


def _namespace(value: Any, field: str) -> str:
    """The name of a namespace, which becomes the value of a label."""
    if not isinstance(value, str) or not lbl.valid_namespace(value):
        expected = f"expected at most {lbl.MAX_NAME} lower-case letters, digits and '-'"
        raise WorkloadError(f"{field}: {value!r} given, {expected}")
    return value


def _account(value: Any, field: str) -> str:
    """The name of a service account, which becomes the value of a label that only the system sets."""
    if not isinstance(value, str) or not lbl.valid_subdomain(value):
        expected = f"expected at most {lbl.MAX_SUBDOMAIN} lower-case letters, digits, '-' and '.'"
        raise WorkloadError(f"{field}: {value!r} given, {expected}")
    return value


def _labels(value: Any, field: str) -> dict[str, str]:
    """Labels as Kubernetes takes them."""
    found = _string_map(value, field)
    for key, item in found.items():
        if not lbl.valid_key(key):
            raise WorkloadError(f"{field}: key {key!r} given, expected {lbl.KEY_FORM}")
        if not lbl.valid_value(item):
            raise WorkloadError(f"{field}.{key}: {item!r} given, expected {lbl.VALUE_FORM}")
    return found


def _string_map(value: Any, field: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise WorkloadError(f"{field}: {value!r} given, expected a map of strings")
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, str):
            raise WorkloadError(f"{field}.{key}: {item!r} given, expected a string")
    return dict(value)


def _map(value: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise WorkloadError(f"{field}: {value!r} given, expected a map")
    return value


def _list(value: Any, field: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise WorkloadError(f"{field}: {value!r} given, expected a list")
    return [_map(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _named_ports(spec: Mapping[str, Any], index: int) -> dict[str, list[tuple[str, int]]]:
    ports: dict[str, list[tuple[str, int]]] = {}
    for container in _list(spec.get("containers") or [], f"objects[{index}].spec.containers"):
        field = f"objects[{index}].spec.containers.ports"
        for port in _list(container.get("ports") or [], field):
            name, number, protocol = port.get("name"), port.get("containerPort"), port.get("protocol") or "TCP"
            if type(number) is not int or not 0 < number < 65536:
                raise WorkloadError(f"{field}.containerPort: {number!r} given, expected 1 to 65535")
            if protocol not in _PROTOCOLS:
                raise WorkloadError(f"{field}.protocol: {protocol!r} given, expected one of {', '.join(_PROTOCOLS)}")
            if name is not None and not isinstance(name, str):
                raise WorkloadError(f"{field}.name: {name!r} given, expected a name")
            if name:
                ports.setdefault(name, []).append((protocol, number))
    return ports
