"""Everything that docs/cni.md says, done with the real executable and a real agent."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lab_harness import new_lab

from ciliate.cni.install import install_executable
from ciliate.lab import netns
from ciliate.lab.command import run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE

DOCUMENT = Path(__file__).parents[2] / "docs" / "cni.md"
VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
COMMANDS = {"ADD": "0.3.1", "DEL": "0.3.1", "CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0", "VERSION": "0.3.1"}
CONFIG = {"cniVersion": "1.1.0", "name": "net", "type": "ciliate-cni"}
BEFORE = {"interfaces": [], "ips": []}
PODS = 4
"""Room for pods in the range below: 8 addresses without network, broadcast, router and health."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("cni", options={"ipv4-range": "10.201.0.0/29"}) as lab:
        yield lab


class Call:
    """Calls for one container; its namespace and connection are gone afterwards."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.id = uuid.uuid4().hex
        self.namespace = f"cni-test-{self.id[:12]}"
        netns.create(self.namespace)

    def __call__(
        self, command: str | None, config: Any = None, stdin: Any = None, **variables: str | None
    ) -> tuple[int, Any]:
        """One call; exit code and answer. ``None`` takes a variable away."""
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.id,
            "CNI_NETNS": str(netns.path(self.namespace)),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
            "CILIATE_CNI_WAIT": "0",
            **variables,
        }
        text = config if isinstance(config, bytes) else json.dumps({**CONFIG, **(config or {})}).encode()
        done = subprocess.run(
            [self.lab.directory.path / "cni-bin" / "ciliate-cni"],
            env={key: value for key, value in environment.items() if value is not None},
            **({"input": text} if stdin is None else {"stdin": stdin}),
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.stderr == b""
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def remove(self) -> None:
        assert self("DEL") == (0, None)
        netns.remove(self.namespace)


@pytest.fixture
def make(lab: Lab) -> Iterator[Callable[[], Call]]:
    made: list[Call] = []

    def one() -> Call:
        made.append(Call(lab))
        return made[-1]

    yield one
    for call in made:
        call.remove()
    assert lab.request("GET", "/v1/endpoint") == []
    assert {item["owner"] for item in lab.request("GET", "/v1/ipam")["addresses"]} == {"router", "health"}


@pytest.fixture
def call(make: Callable[[], Call]) -> Call:
    return make()


def documented(heading: str, column: int = 0) -> list[str]:
    """A column of the table under a heading of the document."""
    section = DOCUMENT.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [row[column].strip().strip("`") for row in rows[2:]]


LABELS = {"args": {"cni": {"labels": [{"key": "io.kubernetes.pod.namespace", "value": "kube-system"}]}}}
REFUSED: list[tuple[int, str, str, Any, dict[str, str | None]]] = [
    (1, "cniVersion", "ADD", {"cniVersion": "2.0.0"}, {}),
    (1, "cniVersion", "ADD", {"cniVersion": None}, {}),
    (1, "cniVersion", "CHECK", {"cniVersion": "0.3.1", "prevResult": BEFORE}, {}),
    (1, "cniVersion", "GC", {"cniVersion": "1.0.0"}, {}),
    (1, "cniVersion", "STATUS", {"cniVersion": "0.4.0"}, {}),
    (2, "mtu", "ADD", {"chaining-mode": "generic-veth", "mtu": 1400, "prevResult": BEFORE}, {}),
    (3, "CNI_CONTAINERID", "CHECK", {"prevResult": BEFORE}, {}),
    (4, "CNI_COMMAND", "", {}, {}),
    (4, "CNI_COMMAND", "add", {}, {}),
    (4, "CNI_CONTAINERID", "ADD", {}, {"CNI_CONTAINERID": None}),
    (4, "CNI_CONTAINERID", "ADD", {}, {"CNI_CONTAINERID": "../x"}),
    (4, "CNI_CONTAINERID", "ADD", {}, {"CNI_CONTAINERID": "a/b"}),
    (4, "CNI_CONTAINERID", "DEL", {}, {"CNI_CONTAINERID": "a\\b"}),
    (4, "CNI_CONTAINERID", "ADD", {}, {"CNI_CONTAINERID": "a b"}),
    (4, "CNI_IFNAME", "ADD", {}, {"CNI_IFNAME": None}),
    (4, "CNI_IFNAME", "DEL", {}, {"CNI_IFNAME": "../eth0"}),
    (4, "CNI_IFNAME", "ADD", {}, {"CNI_IFNAME": "a-name-of-16-char"}),
    (4, "CNI_NETNS", "ADD", {}, {"CNI_NETNS": None}),
    (4, "CNI_NETNS", "ADD", {}, {"CNI_NETNS": "/run/netns/there-is-none"}),
    (4, "CNI_NETNS", "ADD", {}, {"CNI_NETNS": "/etc/hostname"}),
    (4, "CNI_NETNS", "ADD", {}, {"CNI_NETNS": "the node's"}),
    (4, "CNI_ARGS", "ADD", {}, {"CNI_ARGS": "K8S_POD_NAME"}),
    (4, "CNI_IFNAME", "ADD", {"chaining-mode": "generic-veth", "prevResult": BEFORE}, {}),
    (6, "standard input", "VERSION", b"{", {}),
    (6, "JSON", "ADD", b"{", {}),
    (6, "JSON", "DEL", b"[]", {}),
    (7, "name", "ADD", {"name": None}, {}),
    (7, "name", "ADD", {"name": "a/b"}, {}),
    (7, "type", "ADD", {"type": None}, {}),
    (7, "mtu", "ADD", {"mtu": 500}, {}),
    (7, "chaining-mode", "ADD", {"chaining-mode": "no-such-mode"}, {}),
    (7, "args.cni.labels[0].key", "ADD", LABELS, {}),
    (7, "prevResult", "ADD", {"prevResult": BEFORE}, {}),
    (7, "prevResult", "ADD", {"chaining-mode": "generic-veth"}, {}),
    (7, "prevResult", "CHECK", {}, {}),
    (7, "cni.dev/valid-attachments", "GC", {}, {}),
]
ELSEWHERE = {
    5: "test_reading_or_writing_fails",
    11: "test_without_an_agent",
    50: "test_without_an_agent",
    100: "test_every_address_is_used",
    101: "test_connected_already",
    102: "test_the_kernel_refuses",
    103: "test_check_finds_a_difference",
    110: "tests/unit/cni/test_server.py: no call can provoke a mistake that is not there",
}


@pytest.mark.parametrize(("code", "word", "command", "config", "variables"), REFUSED)
def test_refused(
    call: Call, lab: Lab, code: int, word: str, command: str, config: Any, variables: dict[str, str | None]
) -> None:
    if variables.get("CNI_NETNS") == "the node's":
        variables = {"CNI_NETNS": str(netns.path(lab.directory.namespace(NODE)))}
    status, answer = call(command, config, **variables)
    assert status == 1 and answer["code"] == code and word in answer["msg"], answer
    given = config.get("cniVersion", "1.1.0") if isinstance(config, dict) else None
    assert answer["cniVersion"] == (given or "1.1.0") and set(answer) <= {"cniVersion", "code", "msg", "details"}


def test_every_error_of_the_document_is_tested() -> None:
    assert {int(code) for code in documented("Errors")} == {item[0] for item in REFUSED} | ELSEWHERE.keys()
    assert {name for name in ELSEWHERE.values() if "/" not in name} <= globals().keys()


def test_the_commands_of_the_document() -> None:
    assert dict(zip(documented("Commands"), documented("Commands", 1), strict=True)) == COMMANDS
    fields = set(documented("Configuration"))
    assert set(re.findall(r'"([\w-]+)":', DOCUMENT.read_text().split("```json")[1].split("```")[0])) <= fields


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_in_each_version(call: Call, command: str, version: str) -> None:
    _, result = call("ADD", {"cniVersion": version})
    more = {"ADD": {}, "CHECK": {"prevResult": result}, "GC": {"cni.dev/valid-attachments": []}}.get(command, {})
    variables: dict[str, str | None] = {"CNI_IFNAME": "net1"} if command == "ADD" else {}
    status, answer = call(command, {"cniVersion": version, **more}, **variables)
    if version < COMMANDS[command]:
        assert (status, answer["code"]) == (1, 1)
    elif command == "ADD":
        assert status == 0 and answer["cniVersion"] == version and len(answer["ips"]) == 2
        assert call("DEL", {"cniVersion": version}, CNI_IFNAME="net1") == (0, None)
    elif command == "VERSION":
        assert (status, answer) == (0, {"cniVersion": version, "supportedVersions": list(VERSIONS)})
    else:
        assert (status, answer) == (0, None)


def test_del_always_succeeds(call: Call, lab: Lab) -> None:
    """Never added; added; again; without a namespace; with one that is gone."""
    assert call("DEL") == (0, None)
    for variables in ({}, {"CNI_NETNS": None}, {"CNI_NETNS": ""}, {"CNI_NETNS": "/run/netns/there-is-none"}):
        assert call("ADD")[0] == 0
        assert call("DEL", **variables) == (0, None)
        assert call("DEL", **variables) == (0, None)
        assert lab.request("GET", "/v1/endpoint") == []
    assert call("ADD")[0] == 0
    netns.remove(call.namespace)
    assert call("DEL") == (0, None)
    assert lab.request("GET", "/v1/endpoint") == []


def test_reading_or_writing_fails(call: Call, lab: Lab) -> None:
    with Path("/proc/self/mem").open("rb") as unreadable:
        status, answer = call("ADD", stdin=unreadable)
    assert (status, answer["code"]) == (1, 5)
    directory = lab.directory.state_dir / "cni"
    aside = directory.with_suffix(".aside")
    directory.mkdir(exist_ok=True)
    directory.rename(aside)
    directory.write_text("in the way")
    try:
        status, answer = call("ADD")
        assert (status, answer["code"]) == (1, 5) and str(directory) in answer["msg"]
    finally:
        directory.unlink()
        aside.rename(directory)
    assert call("ADD")[0] == 0


def test_every_address_is_used(make: Callable[[], Call]) -> None:
    calls = [make() for _ in range(PODS + 1)]
    for call in calls[:PODS]:
        assert call("STATUS") == (0, None)
        assert call("ADD")[0] == 0
    last = calls[PODS]
    status, answer = last("ADD")
    assert (status, answer["code"]) == (1, 100) and "10.201.0.0/29" in answer["msg"]
    status, answer = last("STATUS")
    assert (status, answer["code"]) == (1, 50) and "address" in answer["msg"]
    assert calls[0]("DEL") == (0, None)
    assert last("STATUS") == (0, None)
    assert last("ADD")[0] == 0


def test_connected_already(call: Call) -> None:
    _, result = call("ADD")
    status, answer = call("ADD")
    assert (status, answer["code"]) == (1, 101) and call.id in answer["msg"]
    assert call("CHECK", {"prevResult": result}) == (0, None)


def test_the_kernel_refuses(call: Call, lab: Lab) -> None:
    run("ip", "-n", call.namespace, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    status, answer = call("ADD")
    assert (status, answer["code"]) == (1, 102) and "eth0" in answer["msg"]
    assert lab.request("GET", "/v1/endpoint") == []


def test_check_finds_a_difference(call: Call) -> None:
    """On the node's side nothing stays different: the agent mends it as soon as it happens (test_faults)."""
    _, result = call("ADD")
    inside = ["ip", "-n", call.namespace]
    router = result["ips"][0]["gateway"]
    damages = [
        (
            [*inside, "route", "del", "default"],
            [*inside, "route", "add", "default", "via", router],
            "prevResult.routes",
        ),
        ([*inside, "link", "set", "eth0", "down"], [], "eth0: is down"),
    ]
    for damage, repair, word in damages:
        assert call("CHECK", {"prevResult": result}) == (0, None)
        run(*damage)
        status, answer = call("CHECK", {"prevResult": result})
        assert (status, answer["code"]) == (1, 103) and word in answer["msg"], answer
        if not repair:
            call("DEL")
            _, result = call("ADD")
        else:
            run(*repair)


def test_without_an_agent(make: Callable[[], Call], lab: Lab) -> None:
    connected, waiting = make(), make()
    _, result = connected("ADD")
    lab.stop_agent(signal.SIGKILL)
    try:
        for command, config in (
            ("ADD", {}),
            ("CHECK", {"prevResult": result}),
            ("GC", {"cni.dev/valid-attachments": []}),
        ):
            status, answer = waiting(command, config)
            assert (status, answer["code"]) == (1, 11), command
        status, answer = waiting("STATUS")
        assert (status, answer["code"]) == (1, 50)
        assert waiting("VERSION")[1]["supportedVersions"] == list(VERSIONS)
        assert connected("DEL") == (0, None)
        assert connected("DEL") == (0, None)
    except BaseException:
        lab.start_agent()
        raise
    with ThreadPoolExecutor(1) as pool:
        added = pool.submit(waiting, "ADD", CILIATE_CNI_WAIT="30")
        lab.start_agent()
        assert added.result()[0] == 0
    (endpoint,) = lab.request("GET", "/v1/endpoint")
    assert endpoint["status"]["external-identifiers"]["container-id"] == waiting.id


def test_the_configuration_stays_when_the_agent_stops(lab: Lab, tmp_path: Path) -> None:
    """A node without its configuration would get no network for pods, or another's: that is not ours to decide."""
    files = [path for name in ("net.d", "cni-bin") for path in sorted((lab.directory.path / name).iterdir())]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert [path.name for path in files] == ["05-ciliate.conflist", "ciliate-cni", "ciliate-cni.py"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        lab.stop_agent(number)
        try:
            assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
        finally:
            lab.start_agent()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    assert [path.name for path in install_executable(tmp_path, native=False)] == ["ciliate-cni"]
