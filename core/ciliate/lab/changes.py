"""Makes a lab's cluster equal to a scenario's manifests: at first, and again after each step, on the living nodes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from urllib.parse import quote

import msgspec

from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.manifests import Cluster, sort_documents
from ciliate.lab.propagation import wait_propagated
from ciliate.lab.services import ServicePlan
from ciliate.manifest import Document
from ciliate.policy.world import World
from ciliate.scenario.model import reference

TIMEOUT = 30.0
_POLL = 0.02


def populate(lab: Lab, documents: Iterable[Document]) -> Cluster:
    """Make the pods of these manifests and apply their policies; returns once every endpoint enforces them."""
    return change(lab, Cluster(), documents)


def change(lab: Lab, before: Cluster, documents: Iterable[Document]) -> Cluster:
    """Make a lab, that was made equal to ``before``, equal to these manifests; returns once every endpoint follows."""
    documents = list(documents)
    after = sort_documents(documents)
    lab.remove_pods(
        [name for name in (*before.pods, *before.outside) if name not in after.pods and name not in after.outside]
    )
    lab.everywhere("PUT", "/v1/workloads", {"objects": after.workloads(before)})
    lab.add_pods([pod for name, pod in after.pods.items() if name not in before.pods])
    lab.add_workloads([name for name in after.outside if name not in before.outside])
    for name, labels in after.outside.items():
        if before.outside.get(name) != labels:
            lab.set_labels(name, labels.strings())
    _change_services(lab, before, after)
    _change_policies(lab, before, after)
    _wait_labelled(lab, documents)
    wait_propagated(lab)
    return after


def _change_services(lab: Lab, before: Cluster, after: Cluster) -> None:
    if after.services:
        after.plan = ServicePlan(after.services, after.pods, lab.state.pods, after.pod_addresses)
    old = before.plan.objects if before.plan else []
    new = after.plan.objects if after.plan else []
    names = {reference(item) for item in new}
    gone = [reference(item) for item in old if reference(item) not in names]
    if gone:
        paths = [f"{kind}/{namespace or 'default'}/{name}" for kind, namespace, name in gone]
        query = "&".join(f"name={quote(path)}" for path in paths)
        lab.everywhere("DELETE", f"/v1/service-objects?{query}")
    if new:
        lab.everywhere("PUT", "/v1/service-objects", {"objects": new})


def _change_policies(lab: Lab, before: Cluster, after: Cluster) -> None:
    there = {reference(item.object) for item in after.policies}
    gone = [item for item in map(reference, (item.object for item in before.policies)) if item not in there]
    if gone:
        # without names there is nothing to delete by: all go, and those that stay come again
        named = all(name for _, _, name in gone)
        names = "&".join(f"name={quote(_policy_name(*item))}" for item in gone)
        lab.everywhere("DELETE", f"/v1/policy?{names if named else 'all=true'}")
    if not after.policies:
        return
    body = {"documents": [msgspec.to_builtins(document) for document in after.policies]}
    for node, answer in zip(lab.nodes, lab.everywhere("PUT", "/v1/policy", body), strict=True):
        lab.request("GET", f"/v1/policy/wait?revision={answer['revision']}", node=node)


def _policy_name(kind: str, namespace: str, name: str) -> str:
    return name if kind == "CiliumClusterwideNetworkPolicy" else f"{namespace or 'default'}/{name}"


def _wait_labelled(lab: Lab, documents: Iterable[Document]) -> None:
    """Return once every pod's endpoint has the identity of its manifest's labels; LabError names one that has not."""
    wanted = {name: set(pod.labels.strings()) for name, pod in World(documents).pods.items() if pod.namespace}
    deadline = time.monotonic() + TIMEOUT
    for node in lab.nodes:
        while missing := _unlabelled(lab, node, wanted):
            if time.monotonic() > deadline:
                raise LabError(f"{node}: after {TIMEOUT:g} s {', '.join(missing)} still has other labels")
            time.sleep(_POLL)


def _unlabelled(lab: Lab, node: str, wanted: dict[str, set[str]]) -> list[str]:
    found = []
    for document in lab.request("GET", "/v1/endpoint", node=node):
        status = document["status"]
        name = status["external-identifiers"]["pod-name"]
        if name in wanted and set(status["identity"]["labels"]) != wanted[name]:
            found.append(name)
    return found
