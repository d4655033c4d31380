"""A pod that opens connections to the health port without end takes nothing from others, and is named. Tier node."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from ciliate.datapath.netlink import in_netns
from ciliate.health import PORT
from ciliate.lab.lab import Lab
from ciliate.manifest import loads

from .faults_harness import Container, part, wait_for
from .lab_harness import new_lab

ROOM = 64
"""Descriptors that the agent has left."""
MANY = 4 * ROOM


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    pods = loads("{kind: Pod, metadata: {name: hostile, namespace: default, labels: {app: a}}}", "pods.yaml")
    with new_lab("crowd", pods, options={"enable-health-checking": "true"}) as made:
        yield made


def scarce(lab: Lab) -> None:
    """Leave the agent room for a few more descriptors."""
    pid = lab.agent_process().pid
    used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + ROOM, used + ROOM))


def crowd(lab: Lab, pod: str, stack: ExitStack) -> None:
    """Connections of a pod that begin to ask, and stay."""
    [node] = lab.request("GET", "/v1/health")["nodes"]
    address = next(
        path["address"] for path in node["paths"] if path["kind"] == "endpoint" and ":" not in path["address"]
    )

    def connect() -> list[socket.socket]:
        made = []
        for _ in range(MANY):
            client = stack.enter_context(socket.socket())
            client.settimeout(0.2)
            with suppress(OSError):
                client.connect((address, PORT))
                client.sendall(b"GET")
                made.append(client)
        return made

    with Path(f"/run/netns/{lab.state.pods[pod].netns}").open() as file:
        assert in_netns(file.fileno(), connect)


def test_a_pod_cannot_use_up_the_agents_descriptors(lab: Lab) -> None:
    hostile, other = "default/hostile", Container(lab)
    wait_for(lambda: lab.request("GET", "/v1/health")["nodes"])
    scarce(lab)
    with ExitStack() as stack:
        crowd(lab, hostile, stack)
        other.add()
        assert hostile in part(lab, "listeners")["message"]
        found = [item for item in lab.request("GET", "/v1/metrics") if "refused_connections" in item["name"]]
        assert [item for item in found if hostile in item["labels"].get("source", "") and item["value"] > 0]
    other.remove()
