"""Health between the nodes of a lab: who answers, who is told not to, and what comes back. Tier node."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab_harness import new_lab

from ciliate.health import PORT
from ciliate.lab import netns
from ciliate.lab.command import run
from ciliate.lab.lab import Lab
from ciliate.lab.placement import Shape

PATIENCE = 60.0
PATHS = {("node", 4), ("node", 6), ("endpoint", 4), ("endpoint", 6)}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("health", shape=Shape(nodes=2, tunnel="vxlan")) as made:
        yield made


def probe(lab: Lab, node: str = "node1") -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in lab.client(node).request("PUT", "/v1/health/probe")["nodes"]}


def wait_for(lab: Lab, condition: Callable[[dict[str, dict[str, Any]]], bool]) -> dict[str, dict[str, Any]]:
    deadline = time.monotonic() + PATIENCE
    found = probe(lab)
    while not condition(found):
        assert time.monotonic() < deadline, found
        found = probe(lab)
    return found


def all_answer(found: dict[str, dict[str, Any]]) -> bool:
    paths = [{(path["kind"], 6 if ":" in path["address"] else 4) for path in item["paths"]} for item in found.values()]
    return paths == [PATHS, PATHS] and all(item["reachable"] for item in found.values())


def listeners(lab: Lab, node: str) -> set[str]:
    lines = run(*netns.inside(lab.directory.namespace(node)), "ss", "-Hltn").splitlines()
    return {line.split()[3].rpartition(":")[0].strip("[]") for line in lines if line.split()[3].endswith(f":{PORT}")}


def test_every_node_answers_at_every_address(lab: Lab) -> None:
    found = wait_for(lab, all_answer)
    assert [item["local"] for item in found.values()] == [True, False]
    for item in found.values():
        assert all(0 < path[kind]["latency"] < 3 for path in item["paths"] for kind in ("icmp", "http"))


def test_the_health_endpoint_is_an_endpoint_with_an_identity_of_its_own(lab: Lab) -> None:
    wait_for(lab, all_answer)
    for node in ("node1", "node2"):
        (endpoint,) = lab.client(node).request("GET", "/v1/endpoint")
        assert (endpoint["status"]["identity"]["id"], endpoint["status"]["labels"]) == (4, ["reserved:health"])
    known = lab.client("node1").request("GET", "/v1/node")
    assert all(item["health-address"]["ipv4"] and item["health-address"]["ipv6"] for item in known)


def test_nodes_listen_at_their_own_addresses_alone(lab: Lab) -> None:
    wait_for(lab, all_answer)
    own = lab.client("node1").request("GET", "/v1/node")[0]["primary-address"]
    assert listeners(lab, "node1") == set(own.values())


def test_a_killed_agent_is_noticed_and_its_return_too(lab: Lab) -> None:
    wait_for(lab, all_answer)
    lab.stop_agent(signal.SIGKILL, "node2")
    try:
        found = probe(lab)
        assert found["node1"]["reachable"] and not found["node2"]["reachable"]
        assert "endpoint" in found["node2"]["problem"] and "HTTP 4240" in found["node2"]["problem"]
        part = next(
            item for item in lab.client().request("GET", "/v1/healthz?detail=true")["parts"] if item["name"] == "health"
        )
        assert part["state"] == "warning" and "node2" in part["message"]
        metrics = {item["name"]: item["value"] for item in lab.client().request("GET", "/v1/metrics")}
        assert metrics["ciliate_unreachable_nodes"] == metrics["ciliate_unreachable_health_endpoints"] == 1
    finally:
        lab.start_agent("node2")
    wait_for(lab, all_answer)
    (endpoint,) = lab.client("node2").request("GET", "/v1/endpoint")
    assert endpoint["status"]["state"] == "ready"


def test_an_agent_that_ends_leaves_no_health_endpoint(lab: Lab) -> None:
    wait_for(lab, all_answer)
    lab.stop_agent(node="node2")
    try:
        assert listeners(lab, "node2") == set()
        assert "lxc" not in run("ip", "-n", lab.directory.namespace("node2"), "-o", "link")
        assert not probe(lab)["node2"]["reachable"]
    finally:
        lab.start_agent("node2")
    wait_for(lab, all_answer)


def test_alone_a_node_opens_nothing() -> None:
    with new_lab("alone") as lab:
        assert lab.client().request("PUT", "/v1/health/probe") == {"enabled": False, "nodes": []}
        assert listeners(lab, "node1") == set()
        assert lab.client().request("GET", "/v1/endpoint") == []
