"""Sorts manifests for a lab: what the agent is told, which pods are made, which policies apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ciliate.lab.errors import LabError
from ciliate.lab.plan import Places
from ciliate.lab.services import ServicePlan
from ciliate.lab.state import LabPod
from ciliate.labels import LabelSet
from ciliate.manifest import Document
from ciliate.policy.importer import is_policy
from ciliate.policy.problems import PolicyError
from ciliate.policy.reader import Reader
from ciliate.policy.world import WORKLOAD, WORKLOAD_PEER, read_workload
from ciliate.service.objects import KINDS

CLUSTER_ANNOTATION = "ciliate.io/cluster"
CLUSTER = "default"
NAME_LABEL = "kubernetes.io/metadata.name"


class Cluster(msgspec.Struct):
    """A scenario's manifests by what is done with them."""

    pods: dict[str, dict[str, Any]] = {}
    outside: dict[str, LabelSet] = {}
    """Workloads of no orchestrator (`workload/NAME`), and their labels."""
    namespaces: dict[str, dict[str, Any]] = {}
    policies: list[Document] = []
    elsewhere: dict[str, str] = {}
    pod_addresses: dict[str, str] = {}
    services: list[dict[str, Any]] = []
    plan: ServicePlan | None = None

    def workloads(self, before: Cluster | None = None) -> list[dict[str, Any]]:
        """What `PUT /v1/workloads` gets: namespaces first, with the label that an API server gives each.

        A namespace of ``before`` that is not there any more has that label alone.
        """
        known = before.namespaces if before else ()
        gone = [_namespace(name, {}) for name in known if name not in self.namespaces]
        return [*gone, *self.namespaces.values(), *self.pods.values()]

    def places(self, pods: Mapping[str, LabPod]) -> Places:
        """Where this scenario's peers are, once its pods exist."""
        return Places(pods, self.pod_addresses, self.elsewhere, self.plan.services if self.plan else {})


def sort_documents(documents: Iterable[Document]) -> Cluster:
    """Sort manifests; LabError names a pod or namespace without name."""
    cluster = Cluster()
    for document in documents:
        kind = document.object.get("kind")
        if kind == "Pod":
            _add_pod(cluster, document)
        elif kind == WORKLOAD:
            _add_workload(cluster, document)
        elif kind == "Namespace":
            name, labels = _name(document), (document.object["metadata"].get("labels") or {})
            cluster.namespaces[name] = _namespace(name, labels)
        elif kind in KINDS:
            _name(document)
            cluster.services.append(document.object)
        elif is_policy(document.object):
            cluster.policies.append(document)
    for pod in cluster.pods.values():
        name = pod["metadata"].get("namespace") or "default"
        cluster.namespaces.setdefault(name, _namespace(name, {}))
    return cluster


def _add_pod(cluster: Cluster, document: Document) -> None:
    pod = document.object
    metadata = pod.get("metadata") or {}
    name = f"{metadata.get('namespace') or 'default'}/{_name(document)}"
    other = (metadata.get("annotations") or {}).get(CLUSTER_ANNOTATION, CLUSTER)
    if other != CLUSTER:
        cluster.elsewhere[name] = other
    else:
        cluster.pods[name] = pod
    status = pod.get("status") or {}
    listed = [item.get("ip") for item in status.get("podIPs") or []]
    cluster.pod_addresses.update((address, name) for address in [status.get("podIP"), *listed] if address)


def _add_workload(cluster: Cluster, document: Document) -> None:
    reader = Reader(document)
    found = read_workload(reader)
    if found is None:
        raise PolicyError(reader.problems)
    name, labels, _ = found
    key = f"{WORKLOAD_PEER}/{name}"
    cluster.outside[key] = labels
    status = document.object.get("status") or {}
    listed = [item.get("ip") for item in status.get("podIPs") or []]
    cluster.pod_addresses.update((address, key) for address in [status.get("podIP"), *listed] if address)


def _namespace(name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    metadata = {"name": name, "labels": {**labels, NAME_LABEL: name}}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def _name(document: Document) -> str:
    metadata = document.object.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        raise LabError(f"{document.file}:{document.line}: metadata.name: {name!r} given, expected a name")
    return name
