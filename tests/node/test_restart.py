"""The agent goes and comes back: the same endpoints, programs in place throughout, and nothing of vanished pods."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ciliate import atomicfile
from ciliate.lab import audit, netns
from ciliate.lab.command import run
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE

from .faults_harness import Container, ensure_agent, lab_with_pods, settled, undisturbed

KILLS = 10
LONGEST = 0.1
"""Seconds after the beginning of a call within which the agent is killed."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_with_pods("restart") as made:
        yield made


@pytest.fixture(autouse=True)
def agent(lab: Lab) -> None:
    ensure_agent(lab)


def programs(lab: Lab) -> dict[str, list[Any]]:
    """Device and direction -> the filters there, with the ids of their programs."""
    node = lab.directory.namespace(NODE)
    return {
        f"{item.device} {side}": [
            (part["options"]["bpf_name"], part["options"]["prog"]["id"])
            for part in json.loads(run("tc", "-n", node, "-j", "filter", "show", "dev", item.device, side))
            if "options" in part
        ]
        for item in audit.endpoints(lab).values()
        for side in ("ingress", "egress")
    }


def attached(lab: Lab, devices: set[str]) -> set[str]:
    return {device for device in devices if audit.filters_of(lab, device) == (1, 1)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_endpoints_and_programs_are_the_same_afterwards(lab: Lab, number: signal.Signals) -> None:
    before, filters = audit.endpoints(lab), programs(lab)
    devices = {item.device for item in before.values()}
    pins = set(audit.pins(lab).iterdir())
    assert len(before) == 3 and all(len(found) == 1 for found in filters.values())
    with undisturbed(lab):
        lab.stop_agent(number)
        assert attached(lab, devices) == devices
        assert set(audit.pins(lab).iterdir()) == pins
        lab._start_agent(NODE)
        for _ in range(20):
            assert attached(lab, devices) == devices
        lab.client()
    assert audit.endpoints(lab) == before
    assert programs(lab) == filters
    assert set(audit.pins(lab).iterdir()) == pins
    settled(lab)


def test_a_stopped_agent_leaves_no_socket(lab: Lab) -> None:
    lab.stop_agent()
    assert list(lab.directory.run_dir.glob("*.sock")) == []
    lab.start_agent()


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_a_kill_at_any_moment_of_a_call_leaves_all_or_nothing(lab: Lab, command: str) -> None:
    """The moments are spread over the call; which ones the agent's steps fall on differs from run to run."""
    before = audit.endpoints(lab)
    moments = [LONGEST * (number + random.random()) / KILLS for number in range(KILLS)]
    with undisturbed(lab), ThreadPoolExecutor(1) as pool:
        for moment in moments:
            container = Container(lab)
            if command == "DEL":
                container.add()
            call = pool.submit(container.add if command == "ADD" else container.delete)
            time.sleep(moment)
            lab.stop_agent(signal.SIGKILL)
            lab.start_agent()
            known = audit.endpoints(lab)
            if command == "ADD":
                check_add(call, container, known)
                container.delete()
            else:
                call.result()  # DEL succeeds whether or not there is an agent
            settled(lab)
            assert audit.endpoints(lab) == before
            netns.remove(container.namespace)


def check_add(call: Any, container: Container, known: dict[str, audit.Endpoint]) -> None:
    """An ADD that said yes has its endpoint, with what it said."""
    try:
        given = {item["address"].partition("/")[0] for item in call.result()["ips"]}
    except LabError:
        return  # refused: the runtime says DEL, and nothing may stay
    # it may have been answered by the agent that came after, after we looked
    endpoint = known.get(container.id) or audit.endpoints(container.lab)[container.id]
    assert set(endpoint.addresses) == given


def test_pods_that_vanished_while_nobody_looked_are_collected(lab: Lab) -> None:
    before = audit.endpoints(lab)
    gone = [Container(lab) for _ in range(3)]
    for container in gone:
        container.add()
    vanished = [endpoint for container, endpoint in audit.endpoints(lab).items() if container not in before]
    assert len(vanished) == 3
    with undisturbed(lab):
        lab.stop_agent(signal.SIGKILL)
        for container in gone:
            netns.remove(container.namespace)
        lab.start_agent()
        settled(lab)
    assert audit.endpoints(lab) == before
    for container in gone:
        container.delete()  # the runtime's own DEL comes late, and finds nothing to do
    settled(lab)


def test_what_nobody_owns_is_collected_and_what_others_own_is_left_alone(lab: Lab) -> None:
    node, state = lab.directory.namespace(NODE), lab.directory.state_dir
    lab.stop_agent(signal.SIGKILL)
    for name in ("lxc0123456789ab", "lxcbr0", "lxcadmin"):
        run("ip", "-n", node, "link", "add", name, "type", "veth", "peer", "name", f"p{name[-6:]}")
    (state / ".policies.json.99.tmp").write_text("half")
    (state / "endpoints" / ".00001.json.99.tmp").write_text("half")
    edit(state / "ipam-host-scope.json", lambda data: data["owners"].update({"10.200.0.77": "default/ghost c:eth0"}))
    lab.start_agent()
    links = {link["ifname"] for link in json.loads(run("ip", "-n", node, "-j", "link"))}
    assert "lxc0123456789ab" not in links and {"lxcbr0", "lxcadmin"} <= links
    for name in ("lxcbr0", "lxcadmin"):
        run("ip", "-n", node, "link", "del", name)
    assert "10.200.0.77" not in {item["ip"] for item in lab.request("GET", "/v1/ipam")["addresses"]}
    settled(lab)


def edit(path: Path, change: Any) -> None:
    data = atomicfile.read_json(path)
    change(data)
    atomicfile.write_json(path, data)


def test_every_state_file_has_the_number_of_its_schema(lab: Lab) -> None:
    state = lab.directory.state_dir
    files = [*state.glob("*.json"), *state.glob("endpoints/*.json")]
    assert len(files) >= 7
    assert {json.loads(path.read_bytes())["schema"] for path in files} == {1}


def test_labels_and_policies_survive(lab: Lab) -> None:
    policies = lab.request("GET", "/v1/policy")
    labels = {item["id"]: item["status"]["labels"] for item in lab.request("GET", "/v1/endpoint")}
    lab.stop_agent(signal.SIGKILL)
    lab.start_agent()
    assert {item["id"]: item["status"]["labels"] for item in lab.request("GET", "/v1/endpoint")} == labels
    assert {**lab.request("GET", "/v1/policy"), "revision": 0} == {**policies, "revision": 0}
