"""A lab of a test module's own, with the pods that its manifests say; and the command `ciliate` towards its agent."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ciliate.lab.changes import populate
from ciliate.lab.lab import Lab
from ciliate.lab.manifests import sort_documents
from ciliate.lab.placement import ONE_NODE, Shape
from ciliate.manifest import Document

PATIENCE = 60.0
"""Seconds that one command may take."""


@contextmanager
def new_lab(
    name: str, documents: Iterable[Document] = (), options: Mapping[str, str] | None = None, shape: Shape = ONE_NODE
) -> Iterator[Lab]:
    """A lab with the pods and policies of ``documents``, gone afterwards: what it leaves behind is a failure."""
    root = Path(f"/run/ciliate-test-{os.getpid()}-{uuid.uuid4().hex[:6]}")
    lab = Lab.create(f"{name}-{uuid.uuid4().hex[:8]}", root, options=options, shape=shape)
    try:
        if wanted := list(documents):
            populate(lab, wanted)
        yield lab
    finally:
        problems = lab.destroy()
        root.rmdir()
        assert problems == []


def restore(lab: Lab, documents: Iterable[Document]) -> None:
    """Make a lab what ``new_lab`` made of these documents, whatever a test before did through the API."""
    cluster = sort_documents(documents)
    endpoints = lab.request("GET", "/v1/endpoint")
    alive = {item["status"]["external-identifiers"]["pod-name"] for item in endpoints}
    missing = [name for name in cluster.pods if name not in alive]
    lab.remove_pods([name for name in lab.state.pods if name in missing or name not in cluster.pods])
    for item in endpoints:
        if item["spec"]["label-configuration"]["user"]:
            lab.request("PATCH", f"/v1/endpoint/{item['id']}/labels", {"user": []})
    lab.request("DELETE", "/v1/workloads")
    lab.request("PUT", "/v1/workloads", {"objects": cluster.workloads()})
    lab.add_pods([cluster.pods[name] for name in missing])
    lab.request("DELETE", "/v1/service?all=true")
    lab.request("DELETE", "/v1/service-objects?all=true")
    wanted = [document.object["metadata"]["name"] for document in cluster.policies]
    if [item["object"]["metadata"]["name"] for item in lab.request("GET", "/v1/policy")["policies"]] != wanted:
        lab.request("DELETE", "/v1/policy?all=true")
        documents = [msgspec.to_builtins(document) for document in cluster.policies]
        answer = lab.request("PUT", "/v1/policy", {"documents": documents})
        lab.request("GET", f"/v1/policy/wait?revision={answer['revision']}")


def ciliate(lab: Lab, *arguments: str, node: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a person would, towards the agent of a node: without ``node`` that of the only one."""
    socket = lab.directory.node(node).api_socket if node else lab.directory.api_socket
    command = [sys.executable, "-m", "ciliate.cli.main", "-H", str(socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
