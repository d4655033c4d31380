"""What goes wrong around an agent: each fault has a clear error, and no packet notices."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ciliate.api_client import ApiError
from ciliate.datapath import layout
from ciliate.lab import audit, netns
from ciliate.lab.command import run
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE

from .faults_harness import (
    Container,
    ensure_agent,
    lab_with_pods,
    looks,
    part,
    settled,
    start_in_vain,
    undisturbed,
    wait_for,
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_with_pods("fault") as made:
        yield made


@pytest.fixture(autouse=True)
def agent(lab: Lab) -> None:
    ensure_agent(lab)


@contextlib.contextmanager
def full_disk(lab: Lab) -> Iterator[None]:
    """No byte is left where the agent keeps its state."""
    filler = lab.directory.state_dir / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(lab: Lab) -> Iterator[None]:
    """The state directory cannot be written."""
    state = str(lab.directory.state_dir)
    # the threads of a killed agent may hold its files for a moment
    wait_for(lambda: remounted(state))
    try:
        yield
    finally:
        run("mount", "-o", "remount,rw", state)


def remounted(state: str) -> bool:
    try:
        run("mount", "-o", "remount,ro", state)
    except LabError:
        return False
    return True


@contextlib.contextmanager
def content(path: Path, data: str) -> Iterator[None]:
    """A file has this content for a while."""
    before = path.read_bytes()
    path.write_text(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def state_file(name: str, data: str) -> Callable[[Lab], contextlib.AbstractContextManager[None]]:
    return lambda lab: content(next(lab.directory.state_dir.glob(name)), data)


@contextlib.contextmanager
def running(lab: Lab) -> Iterator[None]:
    """The lab's own agent runs meanwhile."""
    lab.start_agent()
    yield
    lab.stop_agent(signal.SIGKILL)


@contextlib.contextmanager
def open_directory(lab: Lab) -> Iterator[None]:
    path = lab.directory.path / "open"
    path.mkdir()
    path.chmod(0o777)
    yield
    path.rmdir()


@contextlib.contextmanager
def file_at_socket(lab: Lab) -> Iterator[None]:
    path = lab.directory.path / "plain"
    path.write_text("somebody's file")
    yield
    assert path.read_text() == "somebody's file"
    path.unlink()


@contextlib.contextmanager
def somebody_listens(lab: Lab) -> Iterator[None]:
    path = lab.directory.path / "taken.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield
    assert path.is_socket()
    path.unlink()


@contextlib.contextmanager
def old_clang(lab: Lab) -> Iterator[None]:
    path = lab.directory.path / "clang-old"
    path.write_text("#!/bin/sh\necho 'clang version 9.0.1'\n")
    path.chmod(0o755)
    yield
    path.unlink()


@contextlib.contextmanager
def nothing(lab: Lab) -> Iterator[None]:
    yield


class Fault:
    """One line of the table. In ``options`` and ``environ``, ``{lab}`` is the lab's directory."""

    def __init__(
        self,
        name: str,
        says: str,
        around: Callable[[Lab], contextlib.AbstractContextManager[None]] = nothing,
        prefix: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
        **options: str,
    ) -> None:
        self.name, self.says, self.around, self.prefix = name, says, around, prefix
        self.environ = environ or {}
        self.options = {key.replace("_", "-"): value for key, value in options.items()}


FAULTS = [
    Fault(
        "disk full, new directory",
        r"state-dir \S+/new: agent.lock cannot be written: No space left on device; free some space",
        full_disk,
        state_dir="{state}/new",
    ),
    Fault(
        "read-only state", r"state-dir \S+: agent.lock cannot be written: Read-only file system; expected", read_only
    ),
    Fault(
        "state directory is a file", r"state-dir \S+/lab.json: cannot be made: File exists", state_dir="{lab}/lab.json"
    ),
    Fault("run directory in vain", r"run-dir /proc/none: cannot be made: No such file", run_dir="/proc/none"),
    Fault("two agents, one directory", r"state-dir \S+: agent \d+ is using it; stop it", running),
    Fault(
        "two agents, one namespace",
        r"another agent \(process \d+\) serves this network namespace; stop it",
        running,
        state_dir="{lab}/other",
        run_dir="{lab}/other",
    ),
    Fault(
        "bpf-root is full of files", r"bpf-root \S+: holds files and is no BPF file system; expected", bpf_root="/etc"
    ),
    Fault("bpf-root is a file", r"bpf-root /etc/passwd: cannot be made: File exists", bpf_root="/etc/passwd"),
    Fault(
        "bpf-root cannot be mounted",
        r"bpf-root \S+: is no BPF file system and one cannot be mounted: Operation not permitted",
        prefix=("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"),
        bpf_root="{lab}/nobpf",
    ),
    Fault(
        "no clang",
        r"clang is not installed; install the package clang-\d+",
        environ={"PATH": "/nonexistent"},
        state_dir="{lab}/empty",
    ),
    Fault(
        "clang too old",
        r"clang-old: clang version 9.0.1; expected 11 or newer",
        old_clang,
        environ={"CILIATE_CLANG": "{lab}/clang-old"},
        state_dir="{lab}/empty",
    ),
    Fault("policies damaged", r"policies.json: not JSON: .*; restore it", state_file("policies.json", "{")),
    Fault(
        "policies of a newer version",
        r"policies.json: schema 7 found, expected 1: a newer version wrote it; run that version",
        state_file("policies.json", '{"schema": 7, "data": []}'),
    ),
    Fault("workloads damaged", r"workloads.json: .*; restore it", state_file("workloads.json", "[]")),
    Fault(
        "endpoint of a newer version",
        r"endpoints/0000\d.json: schema 2 found, expected 1: a newer version",
        state_file("endpoints/*.json", '{"schema": 2, "data": {}}'),
    ),
    Fault(
        "addresses of a newer version",
        r"ipam-host-scope.json: schema 3 found, expected 1: a newer version",
        state_file("ipam-host-scope.json", '{"schema": 3, "data": {}}'),
    ),
    Fault(
        "prefix identities of a newer version",
        r"cidr-identities.json: schema 3 found",
        state_file("cidr-identities.json", '{"schema": 3, "data": {}}'),
    ),
    Fault(
        "store damaged",
        r"store \S+: cannot be opened: file is not a database; restore",
        state_file("kvstore.db", "x" * 4096),
    ),
    Fault(
        "range too small",
        r"ipv4-range: '10.9.0.0/30' given .*expected a network of at least 8",
        ipv4_range="10.9.0.0/30",
    ),
    Fault("range is no network", r"ipv6-range: 'fd00::1' given|ipv6-range: 'fd00::/z' given", ipv6_range="fd00::/z"),
    Fault(
        "metrics address that is not ours",
        r"prometheus-serve-addr 192.0.2.77:9964: cannot listen there: .*assign",
        prometheus_serve_addr="192.0.2.77:9964",
    ),
    Fault("run directory of everybody", r"run-dir \S+/open: everybody may write", open_directory, run_dir="{lab}/open"),
    Fault(
        "socket in vain",
        r"socket-path /proc/x.sock: cannot be made: No such file or directory; choose another path",
        socket_path="/proc/x.sock",
    ),
    Fault(
        "socket without directory", r"socket-path \S+: /nonexistent is no directory", socket_path="/nonexistent/x.sock"
    ),
    Fault("file at the socket", r"socket-path \S+/plain: is no socket", file_at_socket, socket_path="{lab}/plain"),
    Fault(
        "CNI socket taken",
        r"cni-socket-path \S+: another process listens",
        somebody_listens,
        cni_socket_path="{lab}/taken.sock",
    ),
    Fault(
        "socket path too long", r"socket-path \S+: has \d+ bytes, expected at most 107", socket_path="/tmp/" + "x" * 120
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_an_agent_that_cannot_start_says_why_and_harms_nothing(lab: Lab, fault: Fault) -> None:
    before = audit.endpoints(lab)
    places = {"lab": str(lab.directory.path), "state": str(lab.directory.state_dir)}
    options = {key: value.format(**places) for key, value in fault.options.items()}
    environ = {key: value.format(**places) for key, value in fault.environ.items()}
    with undisturbed(lab):
        lab.stop_agent(signal.SIGKILL)
        try:
            with fault.around(lab):
                words = start_in_vain(lab, *fault.prefix, options=options, **environ)
        finally:
            lab.start_agent()
        assert re.search(fault.says, words), words
        assert audit.endpoints(lab) == before
        settled(lab)


def damage(lab: Lab, name: str, data: str) -> list[Path]:
    found = sorted(lab.directory.state_dir.glob(name))
    for path in found:
        path.write_text(data)
    return found


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("endpoints/*.json", "{"),
        ("endpoints/*.json", '{"schema": 1, "data": {"id": "x"}}'),
        ("endpoints/*.json", ""),
        ("ipam-host-scope.json", "{"),
        ("ipam-host-scope.json", '{"schema": 1, "data": {"owners": {"x": "y"}}}'),
        ("cidr-identities.json", "nonsense"),
        ("cni/*.json", "{"),
    ],
)
def test_what_the_kernel_still_knows_is_rebuilt(lab: Lab, name: str, data: str) -> None:
    before = audit.endpoints(lab)
    with undisturbed(lab):
        lab.stop_agent(signal.SIGKILL)
        damaged = damage(lab, name, data)
        assert damaged
        lab.start_agent()
        assert audit.endpoints(lab) == before
        for path in lab.directory.state_dir.rglob("*.broken"):
            path.unlink()
        settled(lab)
        if not name.startswith("cni"):
            assert damaged[0].name in lab.directory.agent_log.read_text()
        container = Container(lab)
        given = {item["address"].partition("/")[0] for item in container.add()["ips"]}
        assert not given & {address for endpoint in before.values() for address in endpoint.addresses}
        container.remove()
    settled(lab)


def test_a_cached_template_needs_no_clang(lab: Lab) -> None:
    with undisturbed(lab), pytest.MonkeyPatch.context() as patch:
        lab.stop_agent()
        patch.setenv("CILIATE_CLANG", "")
        patch.setenv("PATH", f"{tools(lab)}")
        lab.start_agent()
    settled(lab)


def tools(lab: Lab) -> Path:
    """A directory with what a lab needs of the system, and no compiler."""
    directory = lab.directory.path / "tools"
    directory.mkdir(exist_ok=True)
    for name in ("nsenter", "ip", "tc", "sh"):
        link = directory / name
        if not link.exists():
            link.symlink_to(
                next(path for path in map(Path, (f"/usr/bin/{name}", f"/usr/sbin/{name}")) if path.exists())
            )
    return directory


def test_a_full_disk_refuses_what_is_new_and_keeps_what_is_there(lab: Lab) -> None:
    before, policies = audit.endpoints(lab), lab.request("GET", "/v1/policy")
    container, leaves = Container(lab), Container(lab)
    leaves.add()
    body = {"documents": [{"object": policy} for policy in more_policy()]}
    with undisturbed(lab), full_disk(lab):
        with pytest.raises(LabError, match="No space left on device"):
            container.add()
        with pytest.raises(ApiError, match=r"No space left on device.*policies.json"):
            lab.client().request("PUT", "/v1/policy", body)
        assert without_revision(lab.request("GET", "/v1/policy")) == without_revision(policies)
        lab.stop_agent(signal.SIGKILL)
        lab.start_agent()
        assert {key: value for key, value in audit.endpoints(lab).items() if key != leaves.id} == before
    leaves.remove()
    container.remove()
    settled(lab)


def without_revision(document: Any) -> Any:
    return {key: value for key, value in document.items() if key != "revision"}


def more_policy() -> list[dict[str, Any]]:
    spec = {"endpointSelector": {}, "ingress": [{"fromEntities": ["all"]}]}
    metadata = {"name": "everybody", "namespace": "default"}
    return [{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": metadata, "spec": spec}]


def test_addresses_that_run_out_are_named(lab: Lab) -> None:
    before = audit.endpoints(lab)
    lab.stop_agent()
    lab.state.options["ipv4-range"] = "10.200.0.0/29"
    made: list[Container] = []
    try:
        lab.start_agent()
        assert audit.endpoints(lab) == before
        with undisturbed(lab), pytest.raises(LabError, match=r"no address is free: range 10.200.0.0/29: all 6"):
            for _ in range(6):
                made.append(Container(lab))
                made[-1].add()
        assert len(made) > 1
    finally:
        for container in made:
            container.remove()
        lab.stop_agent()
        del lab.state.options["ipv4-range"]
        lab.start_agent()
    assert audit.endpoints(lab) == before
    settled(lab)


def on_node(lab: Lab, *command: str) -> None:
    run(*netns.inside(lab.directory.namespace(NODE)), *command)


def endpoint_of(lab: Lab, pod: str) -> audit.Endpoint:
    return audit.endpoints(lab)[lab.state.pods[f"default/{pod}"].container_id]


def clear_entry(lab: Lab, number: int) -> None:
    with audit.open_map(lab, "ciliate_ep") as table:
        table.update(number.to_bytes(4, "little"), bytes(layout.EP_CONFIG.size))


def delete_policy(lab: Lab, number: int) -> None:
    with audit.open_map(lab, "ciliate_policy") as table:
        mine = [key for key, _ in table.items() if layout.policy_key_of(key)[0] == number]
        assert mine and table.delete_many(mine) == len(mine)


def policy_entries(lab: Lab, number: int) -> set[bytes]:
    with audit.open_map(lab, "ciliate_policy") as table:
        return {key for key, _ in table.items() if layout.policy_key_of(key)[0] == number}


def remove_pins(lab: Lab, endpoint: audit.Endpoint) -> None:
    """Every pin goes, the program array's too. Nobody is told of that: another loss makes the agent look."""
    for path in (lab.directory.bpf_dir / "ciliate").glob("*/*"):
        path.unlink()
    on_node(lab, "ip", "neigh", "del", endpoint.addresses[0], "dev", endpoint.device)


def unmount_pins(lab: Lab, endpoint: audit.Endpoint) -> None:
    run("umount", "-l", str(lab.directory.bpf_dir))
    on_node(lab, "ip", "neigh", "del", endpoint.addresses[0], "dev", endpoint.device)


LOSSES: list[tuple[str, str, Callable[[Lab, audit.Endpoint], None]]] = [
    ("filter of the server", "server", lambda lab, it: on_node(lab, "tc", "filter", "del", "dev", it.device, "egress")),
    (
        "filter of the denied",
        "stranger",
        lambda lab, it: on_node(lab, "tc", "filter", "del", "dev", it.device, "ingress"),
    ),
    (
        "all filters of a device",
        "friend",
        lambda lab, it: on_node(lab, "tc", "qdisc", "del", "dev", it.device, "clsact"),
    ),
    ("IPv4 route", "server", lambda lab, it: on_node(lab, "ip", "route", "del", it.addresses[0])),
    ("IPv6 route", "server", lambda lab, it: on_node(lab, "ip", "-6", "route", "del", it.addresses[1])),
    ("neighbour", "friend", lambda lab, it: on_node(lab, "ip", "neigh", "del", it.addresses[0], "dev", it.device)),
    ("router device", "friend", lambda lab, it: on_node(lab, "ip", "link", "del", "ciliate_host")),
    ("pins", "server", remove_pins),
    ("BPF file system", "server", unmount_pins),
]


@pytest.mark.parametrize(("name", "pod", "take"), LOSSES, ids=[name for name, _, _ in LOSSES])
def test_what_somebody_takes_away_is_put_back(lab: Lab, name: str, pod: str, take: Callable[..., None]) -> None:
    with undisturbed(lab):
        take(lab, endpoint_of(lab, pod))
        settled(lab)
        wait_for(lambda: router_is_up(lab))


def router_is_up(lab: Lab) -> bool:
    with contextlib.suppress(LabError):
        text = run("ip", "-n", lab.directory.namespace(NODE), "-br", "address", "show", "dev", "ciliate_host")
        return "10.200.0.1/32" in text and "fd00:c11:a7e::1/128" in text
    return False


def test_what_others_put_before_policy_is_told(lab: Lab) -> None:
    """It may be meant so, and stays. Nobody is told when it comes: another loss makes the agent look."""
    endpoint = endpoint_of(lab, "friend")
    rule = ["dev", endpoint.device, "egress", "prio", "3", "protocol", "ip", "u32", "match", "u32", "1", "0xffffffff"]
    look = lambda: on_node(lab, "ip", "neigh", "del", endpoint.addresses[0], "dev", endpoint.device)  # noqa: E731
    on_node(lab, "tc", "filter", "add", *rule)
    look()
    wait_for(lambda: part(lab, "kernel")["state"] == "warning")
    assert f"a u32 filter of priority 3 at egress of {endpoint.device}" in part(lab, "kernel")["message"]
    on_node(lab, "tc", "filter", "del", "dev", endpoint.device, "egress", "prio", "3")
    wait_for(lambda: part(lab, "kernel")["state"] == "ok")
    settled(lab)


def test_an_agent_that_finds_no_pins_connects_every_pod_again(lab: Lab) -> None:
    """Without a holder the program array is empty and nothing passes; the dispatchers of the devices lead there."""
    before = audit.endpoints(lab)
    lab.stop_agent(signal.SIGKILL)
    (lab.directory.bpf_dir / "ciliate" / "default" / "ciliate_entry").unlink()
    lab.start_agent()
    assert audit.endpoints(lab) == before
    with undisturbed(lab):
        settled(lab)


def test_sockets_that_somebody_removes_are_made_again(lab: Lab) -> None:
    container = Container(lab)
    with undisturbed(lab):
        shutil.rmtree(lab.directory.run_dir)
        wait_for(lambda: lab.directory.run_dir.joinpath("cni.sock").exists())
        container.add()
        wait_for(lambda: answers(lab))
        container.remove()
    settled(lab)


def test_state_that_somebody_removes_is_written_again(lab: Lab) -> None:
    before, policies = audit.endpoints(lab), without_revision(lab.request("GET", "/v1/policy"))
    state, looked = lab.directory.state_dir, looks(lab)
    wait_for(lambda: looks(lab) > looked)
    with undisturbed(lab):
        for path in state.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        wait_for(lambda: part(lab, "state")["state"] == "warning")
        assert "endpoint records" in part(lab, "state")["message"]
        lab.stop_agent(signal.SIGKILL)
        lab.start_agent()
        assert audit.endpoints(lab) == before
        assert without_revision(lab.request("GET", "/v1/policy")) == policies
        assert part(lab, "state")["state"] == "ok"
    settled(lab)


def answers(lab: Lab) -> bool:
    with contextlib.suppress(ApiError, LabError):
        return bool(lab.request("GET", "/v1/healthz"))
    return False


def test_a_device_that_is_set_down_comes_up_again(lab: Lab) -> None:
    endpoint = endpoint_of(lab, "server")
    on_node(lab, "ip", "link", "set", endpoint.device, "down")
    settled(lab)
    with undisturbed(lab):
        settled(lab)


def test_entries_of_the_maps_come_back(lab: Lab) -> None:
    """Nobody is told of changed maps: they are compared every minute, and when something else has gone."""
    endpoint = endpoint_of(lab, "server")
    entries = policy_entries(lab, endpoint.id)
    delete_policy(lab, endpoint.id)
    clear_entry(lab, endpoint.id)
    on_node(lab, "ip", "route", "del", endpoint.addresses[0])
    wait_for(lambda: policy_entries(lab, endpoint.id) == entries)
    settled(lab)
    with undisturbed(lab):
        settled(lab)


def test_a_device_that_is_removed_is_reported_until_its_pod_goes(lab: Lab) -> None:
    container = Container(lab)
    container.add()
    endpoint = audit.endpoints(lab)[container.id]
    with undisturbed(lab):
        on_node(lab, "ip", "link", "del", endpoint.device)
        wait_for(lambda: part(lab, "endpoints")["state"] == "failure")
        assert container.name in part(lab, "endpoints")["message"]
        wait_for(lambda: any(endpoint.device in entry["message"] for entry in status_log(lab, endpoint.id)))
        container.remove()
        wait_for(lambda: part(lab, "endpoints")["state"] == "ok")
    settled(lab)


def status_log(lab: Lab, number: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = lab.request("GET", f"/v1/endpoint/{number}/log")
    return found
