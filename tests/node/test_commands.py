"""The `ciliate` command against a running agent: tables, JSON, exit codes, clear errors. Tier node."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_harness import ciliate as run_ciliate
from lab_harness import new_lab

from ciliate import manifest
from ciliate.cli.main import main
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
        (["endpoint", "log", "1"], ["ready"]),
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
        (["endpoint", "config", "1", "MonitorAggregationLevel=high"], 1, "options.MonitorAggregationLevel"),
        (["config", "set", "mtu=1400"], 1, "mtu: '1400' given, expected one of enable-policy"),
        (["config", "get", "nothing"], 2, "expected an option"),
        (["endpoint", "get"], 2, "either ENDPOINT or --label"),
        (["identity", "get", "99"], 1, "not known to this node"),
        (["identity", "get", "--label", "no=body"], 1, "no identity has"),
        (["identity", "get"], 2, "either NUMBER or --label"),
        (["identity", "list", "a=b", "--endpoints"], 2, "either LABELS or --endpoints"),
        (["map", "get", "nothing"], 1, "there is no map"),
        (["metrics", "list", "-p", "("], 2, "expected a regular expression"),
        (["debuginfo", "-f", "/nowhere/at/all"], 2, "/nowhere/at/all: cannot be written"),
        (["debuginfo", "-f", "/dev/full"], 2, "/dev/full: cannot be written"),
        (["endpoint", "list", "-l", ""], 1, "with a key"),
        (["endpoint", "labels", "1", "-a", "x\ny"], 1, "none of control"),
        (["endpoint", "labels", "1", "-a", "\udcff"], 2, "expected UTF-8"),
        (["node", "get", "a b"], 1, "node 'a b' is not known"),
        (["node", "get", "../v1/config"], 1, "is not known"),
        (["node", "delete", "x?y=1"], 1, "node 'x?y=1' is not known"),
        (["node", "get", ""], 2, "NAME is empty"),
        (["status", "--wait", "-1"], 2, "--wait"),
        (["status", "--wait", "nan"], 2, "--wait"),
        (["policy", "wait", "99", "--max-wait-time", "nan"], 2, "--max-wait-time"),
        (["policy", "wait", "99", "--max-wait-time", "0.01"], 1, "not realised"),
        (["policy", "trace", "-s", "a", "-d", "b", "--dport", "x/y"], 2, "port: 'x/y' given"),
        (["policy", "import", ""], 2, "FILES"),
        (["service", "update", "--id", "1", "--frontend", "10.96.0.1:²"], 2, "--frontend"),
        (["service", "update", "--id", "1", "--frontend", "fd00::1:80"], 2, "in brackets"),
        (["service", "apply", str(ROOT / "examples/bad/not-yaml.yaml")], 2, "not YAML"),
        (["service", "apply", str(FILES[1])], 2, "no EndpointSlice"),
        (["plugins", "check", "../x"], 2, "neither an installed plugin nor a module"),
        (["plugins", "list", "--kind", "nope"], 2, "expected one of"),
        (["cni", "install", "--name", "a/b"], 2, "--name"),
        (["cni", "install", "--bin-dir", "/proc/x"], 1, "/proc/x: cannot be written"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_what_is_refused(
    lab: Lab,
    command: list[str],
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: there are many, and starting Python is the slowest part of each."""
    monkeypatch.setattr(sys, "argv", ["ciliate", "-H", str(lab.directory.api_socket), *command])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (code, "")
    assert told in err and "Traceback" not in err


def test_nothing_is_deleted_where_one_is_not_there(lab: Lab) -> None:
    code, _, err = ciliate(lab, "service", "update", "--id", "7", "--frontend", "[fd00::7]:80")
    assert (code, err) == (0, "")
    code, out, err = ciliate(lab, "service", "delete", "7", "999")
    assert (code, out) == (1, "") and "no service 999" in err
    assert ciliate(lab, "service", "delete", "7")[1] == "1 services deleted\n"


@pytest.mark.parametrize(
    ("arguments", "where", "code", "told"),
    [
        ("status", ">/dev/full", 1, "ciliate: output: No space left on device\n"),
        ("config show", "| true", 0, ""),
        ("debuginfo", "| true", 0, ""),
        ("--help", ">&-", 0, ""),
    ],
)
def test_where_output_goes(lab: Lab, arguments: str, where: str, code: int, told: str) -> None:
    command = f"{sys.executable} -m ciliate.cli.main -H {lab.directory.api_socket} {arguments}"
    done = subprocess.run(
        ["bash", "-c", f"{command} {where}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", told)


@pytest.mark.parametrize(
    ("heard", "ctrl_c", "code", "told"),
    [
        (b"", True, 130, ""),
        (b"", False, 3, "no agent answers"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", False, 3, "went away"),
    ],
)
def test_an_agent_that_breaks_off(tmp_path: Path, heard: bytes, ctrl_c: bool, code: int, told: str) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(path))
        agent.listen()
        # whoever runs the tests may ignore Ctrl-C, and what it starts would, too
        ciliate = [sys.executable, "-m", "ciliate.cli.main", "-H", str(path), "policy", "wait", "99"]
        command = ["env", "--default-signal=INT", *ciliate]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
            agent.settimeout(30)
            connection, _ = agent.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(heard)
                if ctrl_c:
                    waiting.send_signal(signal.SIGINT)
                    waiting.wait(30)
            out, err = waiting.communicate(timeout=30)
    assert (waiting.returncode, out) == (code, "") and told in err and "Traceback" not in err


@pytest.mark.parametrize(
    "sequence",
    [
        [
            (["endpoint", "config", "1", "DropNotification=off"], ["DropNotification", "Disabled", "its own"]),
            (["endpoint", "config", "1", "DropNotification=default"], ["Enabled"]),
        ],
        [
            (["config", "set", "debug=true", "monitor-aggregation=low"], ["until the agent ends"]),
            (["config", "get", "debug", "monitor-aggregation"], ["True", "low"]),
            (["config", "set", "debug=false", "monitor-aggregation=medium"], ["debug=false"]),
        ],
    ],
    ids=["of an endpoint", "of the agent"],
)
def test_options_are_set_and_set_back(lab: Lab, sequence: list[tuple[list[str], list[str]]]) -> None:
    for command, told in sequence:
        test_what_is_shown(lab, command, told)


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


def test_a_device_that_is_gone_shows() -> None:
    with new_lab("gone", manifest.load(FILES)) as lab:
        _a_device_goes(lab)


def _a_device_goes(lab: Lab) -> None:
    _, log, _ = ciliate(lab, "endpoint", "log", "1")  # of an agent that made the endpoint itself
    assert "waiting-for-identity" in log and "ready with identity" in log
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
