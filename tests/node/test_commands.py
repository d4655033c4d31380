"""The `ciliate` command against a running agent: tables, JSON, exit codes, clear errors. Tier node."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_harness import ciliate as run_ciliate
from lab_harness import new_lab

from ciliate import manifest
from ciliate.datapath.bpf import Map
from ciliate.datapath.layout import ipcache_key
from ciliate.lab.command import run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "examples/demo/pods.yaml", ROOT / "examples/policies/deathstar.yaml"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("cmd", manifest.load(FILES)) as made:
        yield made


def ciliate(lab: Lab, *arguments: str) -> tuple[int, str, str]:
    done = run_ciliate(lab, *arguments)
    return done.returncode, done.stdout, done.stderr


def data(lab: Lab, *arguments: str) -> Any:
    code, out, err = ciliate(lab, *arguments, "-o", "json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["status"], ["all is well", "endpoints", "3 ready", "maps", "loader shared"]),
        (["status", "--all-addresses"], ["default/xwing", "router"]),
        (["status", "--verbose"], ["CONTROLLER", "resync", "ciliate_lxc"]),
        (["status", "--brief"], ["OK"]),
        (["endpoint", "list"], ["default/deathstar", "ready", "k8s:org=empire"]),
        (["endpoint", "list", "-l", "class=xwing", "--no-headers"], ["default/xwing"]),
        (["endpoint", "get", "-l", "class=xwing"], ['"pod-name": "default/xwing"']),
        (["endpoint", "config", "pod-name:default/deathstar"], ["PolicyEnforcement", "ingress"]),
        (["endpoint", "labels", "1"], ["identity", "k8s:"]),
        (["endpoint", "log", "1"], ["waiting-for-identity", "ready with identity"]),
        (["endpoint", "health", "1"], ["overall", "OK"]),
        (["endpoint", "regenerate", "1", "2"], ["endpoint 2: regenerated"]),
        (["identity", "list"], ["reserved:host", "k8s:class=xwing"]),
        (["identity", "list", "--endpoints"], ["ENDPOINTS", "k8s:class=xwing"]),
        (["identity", "get", "2"], ["reserved:world"]),
        (["identity", "get", "--label", "reserved:health"], ["reserved:health"]),
        (["ip", "list"], ["default/xwing", "health"]),
        (["map", "list"], ["ciliate_ipcache", "512000", "%"]),
        (["map", "list", "--verbose"], ["PATH", "lru-hash"]),
        (["map", "get", "ciliate_ep"], ["enforces ingress"]),
        (["map", "get", "policy", "--limit", "1"], ["allow", "more entries than --limit"]),
        (["map", "get", "entry"], ["no entries"]),
        (["metrics", "list"], ["ciliate_endpoint_count", "process_cpu_seconds_total"]),
        (["metrics", "list", "-p", "^ciliate_policy_count$"], ["1"]),
        (["health", "status"], ["endpoint 1", "kvstore"]),
        (["health", "status", "--succinct"], ["all is well"]),
        (["health", "ping", "-c", "2"], [" ms"]),
        (["debuginfo"], ["## endpoints", "## maps", "## tasks"]),
    ],
    ids=" ".join,
)
def test_what_is_shown(lab: Lab, command: list[str], told: list[str]) -> None:
    code, out, err = ciliate(lab, *command)
    assert (code, err) == (0, "")
    assert [text for text in told if text not in out] == []


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        (["endpoint", "get", "999"], 1, "endpoint 999 does not exist"),
        (["endpoint", "get", "pod-name:default/nobody"], 1, "no endpoint has pod-name default/nobody"),
        (["endpoint", "log", "x"], 1, "expected a number"),
        (["endpoint", "health", "999"], 1, "does not exist"),
        (["endpoint", "disconnect", "999"], 1, "does not exist"),
        (["endpoint", "list", "-l", "no=body"], 1, "no endpoint has"),
        (["endpoint", "labels", "1", "-a", "reserved:host"], 1, "only the system may set"),
        (["endpoint", "labels", "1", "-d", "nothing"], 1, "expected one that the endpoint has"),
        (["endpoint", "config", "1", "NAT46=on"], 1, "options.NAT46"),
        (["endpoint", "config", "1", "NAT46"], 2, "expected OPTION=VALUE"),
        (["endpoint", "get"], 2, "either ENDPOINT or --label"),
        (["identity", "get", "99"], 1, "not known to this node"),
        (["identity", "get", "--label", "no=body"], 1, "no identity has"),
        (["identity", "get"], 2, "either NUMBER or --label"),
        (["identity", "list", "a=b", "--endpoints"], 2, "either LABELS or --endpoints"),
        (["map", "get", "nothing"], 1, "there is no map"),
        (["metrics", "list", "-p", "("], 2, "expected a regular expression"),
        (["debuginfo", "-f", "/nowhere/at/all"], 2, "/nowhere/at/all: cannot be written"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_what_is_refused(lab: Lab, command: list[str], code: int, told: str) -> None:
    done, out, err = ciliate(lab, *command)
    assert (done, out) == (code, "")
    assert told in err


def test_json_is_for_programs(lab: Lab, tmp_path: Path) -> None:
    assert len(data(lab, "endpoint", "list")) == 3
    assert data(lab, "endpoint", "health", "1")["overallHealth"] == "OK"
    assert {item["pod"] for item in data(lab, "ip", "list")["addresses"]} >= {"default/xwing", ""}
    assert data(lab, "status")["state"] == "ok"
    assert all(item["refCount"] == 1 for item in data(lab, "identity", "list", "--endpoints"))
    assert data(lab, "map", "get", "ipcache")["cache"]
    code, out, _ = ciliate(lab, "debuginfo", "--file-per-command", "--output-directory", str(tmp_path), "-o", "json")
    assert code == 0 and len(out.splitlines()) == len(list(tmp_path.iterdir())) > 10
    assert json.loads((tmp_path / "debuginfo-version.json").read_text())["ciliate"]


def test_labels_by_command(lab: Lab) -> None:
    code, out, _ = ciliate(lab, "endpoint", "labels", "1", "-a", "color=red", "-a", "k8s:tier=one")
    assert code == 0 and "unspec:color=red" in out and "of a user" in out
    code, out, _ = ciliate(lab, "endpoint", "labels", "1", "-d", "color", "-d", "k8s:tier")
    assert code == 0 and "color" not in out and "tier" not in out


def test_a_map_that_differs_from_what_the_agent_wants(lab: Lab) -> None:
    import ipaddress

    table = Map.open(lab.directory.bpf_dir / "ciliate" / "default" / "ciliate_ipcache")
    try:
        key = ipcache_key(ipaddress.ip_network("127.0.0.1/32"))
        value = table.lookup(key)
        assert value is not None and table.delete(key)
        code, out, _ = ciliate(lab, "map", "get", "ipcache")
        assert code == 1 and "insert" in out
        table.update(key, value)
    finally:
        table.close()
    assert ciliate(lab, "map", "get", "ipcache")[0] == 0


def test_a_device_that_is_gone_shows(lab: Lab) -> None:
    endpoint = data(lab, "endpoint", "list", "-l", "class=tiefighter")[0]
    device = endpoint["status"]["networking"]["interface-name"]
    run("ip", "-n", lab.directory.namespace(NODE), "link", "del", device)
    number = str(endpoint["id"])
    code, out, _ = ciliate(lab, "endpoint", "health", number)
    assert code == 1 and f"device {device} is gone" in out
    code, out, _ = ciliate(lab, "health", "status", "--succinct")
    assert code == 1 and f"endpoint {number} (default/tiefighter)" in out and "kvstore" not in out
    code, out, _ = ciliate(lab, "status")
    assert code == 1 and "FAIL" in out.splitlines()[3] and "-> their runtime should have said DEL; `ciliate" in out
    code, out, _ = ciliate(lab, "endpoint", "disconnect", number)
    assert (code, out) == (0, f"endpoint {number}: disconnected\n")


def test_without_an_agent(lab: Lab) -> None:
    lab.stop_agent(signal.SIGKILL)
    try:
        for command in (["status"], ["status", "--brief"], ["endpoint", "list"], ["map", "list"], ["health", "ping"]):
            code, out, err = ciliate(lab, *command)
            assert (code, out) == (3, "") and "no agent answers" in err
    finally:
        lab.start_agent()
