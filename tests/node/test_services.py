"""Services in a lab: real agents, pods and packets; flapping backends, kills, what commands say. Tier node."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_harness import new_lab

from ciliate import manifest
from ciliate.api_client import ApiError
from ciliate.lab import netns
from ciliate.lab.lab import Lab
from ciliate.lab.scenario import run_files
from ciliate.lab.traffic import EchoServer, TcpStream, UdpFlow

PODS = """
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: default, labels: {app: client}}
spec: {containers: [{name: main, image: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: default, labels: {app: web}}
spec: {containers: [{name: main, image: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: default, labels: {app: web}}
spec: {containers: [{name: main, image: app}]}
"""
VIP4, VIP6, PORT = "10.96.7.1", "fd00:c11:96::7:1", 80
FAMILIES = [4, 6]
VIPS = {4: VIP4, 6: VIP6}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("s", manifest.loads(PODS)) as made:
        yield made


@pytest.fixture
def clean(lab: Lab) -> Iterator[Lab]:
    yield lab
    lab.request("DELETE", "/v1/service?all=true")


def place(lab: Lab, pod: str) -> Path:
    return netns.path(lab.namespace_of(pod))


def address(lab: Lab, pod: str, family: int) -> str:
    return next(text for text in lab.state.pods[f"default/{pod}"].addresses if (":" in text) == (family == 6))


def spec(lab: Lab, family: int, pods: list[str], port: int = PORT, target: int = 8080, **fields: Any) -> dict[str, Any]:
    protocol = fields.pop("protocol", "TCP")
    return {
        "frontend-address": {"ip": VIPS[family], "port": port, "protocol": protocol},
        "backend-addresses": [{"ip": address(lab, pod, family), "port": target} for pod in pods],
        **fields,
    }


def put(lab: Lab, *specs: dict[str, Any]) -> list[int]:
    ids: list[int] = lab.request("PUT", "/v1/service", {"services": list(specs)})["ids"]
    return ids


def ask(
    lab: Lab, pod: str, family: int, protocol: str = "TCP", port: int = PORT, count: int = 1
) -> list[dict[str, Any]]:
    probe = {"protocol": protocol, "address": VIPS[family], "port": port, "source": None, "timeout": 3.0}
    return lab.helper(pod).probe([{"id": index, **probe} for index in range(count)], 40.0)


def serve(lab: Lab, *pods: str, protocols: tuple[str, ...] = ("TCP", "UDP"), port: int = 8080) -> None:
    for pod in pods:
        lab.helper(pod).serve([(protocol, port) for protocol in protocols], lab.state.pods[f"default/{pod}"].addresses)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_every_backend_answers(clean: Lab, family: int, protocol: str) -> None:
    serve(clean, "web-1", "web-2")
    put(clean, spec(clean, family, ["web-1", "web-2"], protocol=protocol))
    seen = Counter(item["who"] for item in ask(clean, "client", family, protocol, count=40))
    assert set(seen) == {"default/web-1", "default/web-2"}, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_that_reaches_itself_sees_another_peer(clean: Lab, family: int) -> None:
    serve(clean, "client")
    put(clean, spec(clean, family, ["client"]), spec(clean, family, ["client"], protocol="UDP"))
    for protocol in ("TCP", "UDP"):
        (answer,) = ask(clean, "client", family, protocol)
        assert answer["who"] == "default/client"
        assert answer["saw"] not in ("", address(clean, "client", family))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_backends_means_refused_at_once(clean: Lab, family: int) -> None:
    put(clean, spec(clean, family, []), spec(clean, family, [], protocol="UDP"))
    before = dropped(clean)
    for protocol in ("TCP", "UDP"):
        (answer,) = ask(clean, "client", family, protocol)
        assert answer["note"] == "connection refused"
        assert answer["ms"] < 900
    assert dropped(clean) > before


def test_the_scenarios_of_services_pass() -> None:
    files = sorted((Path(__file__).parents[2] / "examples" / "scenarios").glob("services*.yaml"))
    report = run_files(files, f"v{uuid.uuid4().hex[:6]}", jobs=2)
    assert [item.name for item in report.results] == [file.stem for file in files]
    assert [str(item) for result in report.results for item in result.flows if not item.good] == []
    assert len(files) >= 5
    assert all("SCTP" in item.reason for item in report.skipped)


def dropped(lab: Lab) -> int:
    rows = lab.request("GET", "/v1/metrics/datapath")
    return sum(row["packets"] for row in rows if row["text"] == "Service backend not found")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_stays_with_its_backend(clean: Lab, family: int) -> None:
    serve(clean, "web-1", "web-2")
    put(clean, spec(clean, family, ["web-1", "web-2"], **{"session-affinity-timeout": 60}))
    seen = {item["who"] for item in ask(clean, "client", family, count=20)}
    assert len(seen) == 1
    left = ({"default/web-1", "default/web-2"} - seen).pop()
    put(clean, spec(clean, family, [left.split("/")[1]], **{"session-affinity-timeout": 60}))
    assert {item["who"] for item in ask(clean, "client", family, count=5)} == {left}


def test_what_is_wrong_changes_nothing(clean: Lab) -> None:
    put(clean, spec(clean, 4, ["web-1"]))
    before = clean.request("GET", "/v1/service")
    good = spec(clean, 4, ["web-1"], port=81)
    for wrong, status, field in (
        (
            {**good, "frontend-address": {"ip": VIP4, "port": 81, "protocol": "GRE"}},
            400,
            "services[1].frontend-address.protocol",
        ),
        ({**good, "backend-addresses": [{"ip": "fd00::1", "port": 1}]}, 400, "services[1].backend-addresses[0].ip"),
        ({**spec(clean, 4, ["web-2"]), "id": 900}, 409, "services[1].frontend-address"),
    ):
        with pytest.raises(ApiError) as refused:
            clean.client().request("PUT", "/v1/service", {"services": [spec(clean, 4, [], port=99), wrong]})
        assert (refused.value.status, refused.value.problem["field"]) == (status, field)
        assert clean.request("GET", "/v1/service") == before


def test_commands(clean: Lab) -> None:
    pods = str(clean.directory.node("node1").bpf_dir)

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "ciliate.cli.main", "-H", str(clean.directory.api_socket), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    made = run(
        "service",
        "update",
        "--id",
        "5",
        "--frontend",
        f"{VIP4}:80",
        "--backends",
        "198.51.100.1:8080,198.51.100.2:8080",
    )
    assert "198.51.100.2:8080" in made
    run("service", "update", "--id", "6", "--frontend", f"[{VIP6}]:53", "--protocol", "UDP")
    assert json.loads(run("service", "get", "5", "-o", "json"))["spec"]["id"] == 5
    assert f"[{VIP6}]:53/UDP" in run("service", "list")
    rows = json.loads(run("bpf", "--bpf-root", pods, "lb", "list", "-o", "json"))
    assert [(row["id"], row["frontend"], len(row["backends"])) for row in rows] == [
        (5, f"{VIP4}:80/TCP", 2),
        (6, f"[{VIP6}]:53/UDP", 0),
    ]
    assert f"{VIP4}:80/TCP" in run("bpf", "--bpf-root", pods, "lb", "list", "--revnat")
    assert "198.51.100.1:8080/TCP" in run("bpf", "--bpf-root", pods, "lb", "list", "--backends")
    assert "2 services, 2 backends" in run("status")
    assert "1 services deleted" in run("service", "delete", "6")


def test_a_flapping_backend_costs_only_its_own_flows(clean: Lab) -> None:
    """Flows that have the backend that stays lose no packet, and every answer is the right one."""
    servers = [EchoServer(place(clean, pod), 8081) for pod in ("web-1", "web-2")]

    def all_four(*pods: str) -> list[dict[str, Any]]:
        pairs = [(family, protocol) for family in FAMILIES for protocol in ("TCP", "UDP")]
        return [spec(clean, family, list(pods), protocol=protocol, target=8081) for family, protocol in pairs]

    try:
        put(clean, *all_four("web-1"))
        flows = [
            kind(place(clean, "client"), VIPS[family], PORT) for family in FAMILIES for kind in (TcpStream, UdpFlow)
        ]
        changes, end = 0, time.monotonic() + 3.0
        while time.monotonic() < end:
            due = time.monotonic() + 0.01
            put(clean, *all_four("web-1") if changes % 2 else all_four("web-1", "web-2"))
            changes += 1
            time.sleep(max(0.0, due - time.monotonic()))
        lost = {flow.name: flow.stop() for flow in flows}
    finally:
        for server in servers:
            server.stop()
    assert changes > 100
    assert sum(lost.values()) == 0, lost
    assert all(flow.records > 50 for flow in flows)


def many(count: int, backends: int = 2, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "frontend-address": {"ip": f"10.97.{number >> 8}.{number & 255}", "port": 80},
            "backend-addresses": [
                {
                    "ip": f"172.20.{(number * 5 + index) >> 8 & 255}.{(number * 5 + index) & 255}",
                    "port": 8000 + (number >> 12),
                }
                for index in range(backends)
            ],
        }
        for number in range(first, first + count)
    ]


def test_an_agent_that_is_killed_amid_thousands_of_updates_converges(clean: Lab) -> None:
    """Established connections never notice; afterwards disk and kernel agree, nothing is left over, ids stayed."""
    server = EchoServer(place(clean, "web-1"), 8082)
    try:
        (mine,) = put(clean, spec(clean, 4, ["web-1"], target=8082))
        stream = TcpStream(place(clean, "client"), VIP4, PORT)
        clean.client().request("PUT", "/v1/service", {"services": many(3000)})
        before = {
            item["spec"]["frontend-address"]["ip"]: item["spec"]["id"]
            for item in clean.request("GET", "/v1/service")["services"]
        }
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(clean.directory.api_socket))
            body = json.dumps({"services": [*many(3000, backends=3), *many(6000, first=3000)]}).encode()
            raw.sendall(b"PUT /v1/service HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(0.15)
            clean.stop_agent(signal.SIGKILL)
        clean.start_agent()
        assert stream.stop() == 0
    finally:
        server.stop()
    after = clean.request("GET", "/v1/service")["services"]
    assert len(after) in (3001, 9001)
    ids = {item["spec"]["frontend-address"]["ip"]: item["spec"]["id"] for item in after}
    assert before.items() <= ids.items()
    assert ids[VIP4] == mine
    maps = {item["name"]: item["entries"] for item in clean.request("GET", "/v1/map")["maps"]}
    backends = {(b["ip"], b["port"]) for item in after for b in item["spec"]["backend-addresses"]}
    slots = sum(len(item["spec"]["backend-addresses"]) for item in after)
    assert maps["ciliate_lb_services"] == maps["ciliate_lb_reverse"] == len(after)
    assert maps["ciliate_lb_slots"] == slots
    assert maps["ciliate_lb_backends"] == len(backends)
