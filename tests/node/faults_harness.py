"""A lab with pods and traffic for the tests of faults, and an agent that is expected to refuse to start."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ciliate.lab import audit, netns
from ciliate.lab.changes import populate
from ciliate.lab.command import run
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.runtime import Runtime
from ciliate.lab.state import NODE
from ciliate.lab.traffic import Traffic
from ciliate.manifest import loads

PATIENCE = 15.0
PORT = 80
STATE_SIZE = "24m"
MANIFESTS = """
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: friend, labels: {app: friend}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, labels: {app: stranger}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: friend}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}, {port: "80", protocol: UDP}]}]
  - fromCIDR: [203.0.113.0/24, "2001:db8:7::/48"]
"""


@contextlib.contextmanager
def lab_with_pods(name: str) -> Iterator[Lab]:
    """A lab whose agent has its state on a small file system of its own, with three pods and a policy."""
    root = Path(f"/run/ciliate-test-{os.getpid()}")
    lab = Lab.create(f"{name}-{uuid.uuid4().hex[:8]}", root)
    state = lab.directory.state_dir
    try:
        lab.stop_agent()
        shutil.rmtree(state)
        state.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={STATE_SIZE},mode=0700", "tmpfs", str(state))
        lab.start_agent()
        populate(lab, loads(MANIFESTS, "faults"))
        yield lab
    finally:
        lab.stop_agent()
        run("umount", str(state))
        assert lab.destroy() == []
        root.rmdir()


def ensure_agent(lab: Lab) -> None:
    """The agent runs, also after a test that failed while it did not."""
    try:
        lab.client()
    except LabError:
        lab.start_agent()


@contextlib.contextmanager
def undisturbed(lab: Lab) -> Iterator[Traffic]:
    """Traffic that has to go on, and traffic that has to stay denied, while the block runs."""
    pods = lab.state.pods
    places = [netns.path(pods[f"default/{name}"].netns) for name in ("server", "friend", "stranger")]
    traffic = Traffic(places[0], places[1], places[2], pods["default/server"].addresses, PORT)
    try:
        yield traffic
        sent = [flow.records for flow in traffic.allowed]
        wait_for(lambda: all(flow.records > before for flow, before in zip(traffic.allowed, sent, strict=True)))
    finally:
        lost, through = traffic.stop()
    assert not any(lost.values()), lost
    assert not any(through.values()), through


def wait_for(condition: Callable[[], Any], what: str = "") -> None:
    """Return once ``condition`` holds; AssertionError after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what or "it did not come about"
        time.sleep(0.05)


def settled(lab: Lab) -> None:
    """Nothing is missing and nothing is left over; flows of a gone endpoint go with the next collection."""
    found: list[str] = []

    def clean() -> bool:
        found[:] = audit.leftovers(lab)
        return not found

    with contextlib.suppress(AssertionError):
        wait_for(clean)
    assert found == [], "; ".join(found)


def start_in_vain(lab: Lab, *prefix: str, options: Mapping[str, Any] | None = None, **environ: str) -> str:
    """Start an agent on the lab's node that cannot start; returns what it says. It must end, without a trace."""
    directory = lab.directory
    chosen = {
        "node-name": NODE,
        "state-dir": directory.state_dir,
        "run-dir": directory.run_dir,
        "bpf-root": directory.bpf_dir,
        **(options or {}),
    }
    nsenter, *rest = netns.inside(directory.namespace(NODE))
    program = [sys.executable, "-P", "-m", "ciliate.agent.main"]
    command = [shutil.which(nsenter) or nsenter, *rest, *prefix, *program]
    done = subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in chosen.items())],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


class Container:
    """A pod of the test's own, by CNI."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.id = uuid.uuid4().hex
        self.namespace = lab.directory.namespace(f"c-{self.id[:8]}")
        lab.state.namespaces.append(self.namespace)
        lab.save()
        netns.create(self.namespace)
        self._runtime = Runtime(lab.directory)

    @property
    def name(self) -> str:
        """Namespace and name of the pod."""
        return f"default/c-{self.id[:8]}"

    def add(self) -> dict[str, Any]:
        """ADD; LabError where it is refused."""
        return self._runtime.add(self.id, self.namespace, self.name)

    def delete(self) -> None:
        """DEL; LabError where it is refused."""
        self._runtime.delete(self.id, self.namespace, self.name)

    def remove(self) -> None:
        """DEL, and the namespace goes."""
        self.delete()
        netns.remove(self.namespace)


def looks(lab: Lab) -> int:
    """How often the agent has compared the state directory with what it knows."""
    found = lab.request("GET", "/v1/healthz?detail=true")["controllers"]
    return int(next(item["success_count"] for item in found if item["name"] == "state"))


def part(lab: Lab, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(
        item for item in lab.request("GET", "/v1/healthz?detail=true")["parts"] if item["name"] == name
    )
    return found
