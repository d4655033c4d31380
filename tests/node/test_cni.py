"""The CNI executable against a real agent: what a container runtime does, and what it must never see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab_harness import new_lab

from ciliate.cni.modes import host_interface_name
from ciliate.lab import netns
from ciliate.lab.command import run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE

VERSIONS = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("cni") as made:
        yield made


class Container:
    """A network namespace and the calls that a runtime makes for it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.id = uuid.uuid4().hex
        self.namespace = f"cni-test-{os.getpid()}-{self.id[:8]}"
        self.network = "net"
        self.version = "1.1.0"
        netns.create(self.namespace)

    def call(self, command: str, ifname: str = "eth0", wait: str = "30", **fields: Any) -> tuple[int, Any]:
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.id,
            "CNI_NETNS": str(netns.path(self.namespace)),
            "CNI_IFNAME": ifname,
            "CNI_PATH": "/opt/cni/bin",
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p{self.id[:8]}",
            "CILIATE_CNI_WAIT": wait,
        }
        config = {"cniVersion": self.version, "name": self.network, "type": "ciliate-cni", **fields}
        done = subprocess.run(
            [self.lab.directory.path / "cni-bin" / "ciliate-cni"],
            env=environment,
            input=json.dumps(config).encode(),
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.stderr == b""
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def inside(self, *command: str) -> Any:
        return json.loads(run(*netns.inside(self.namespace), *command))

    def remove(self) -> None:
        self.call("DEL")
        netns.remove(self.namespace)


@pytest.fixture
def containers(lab: Lab) -> Iterator[Any]:
    made: list[Container] = []

    def make() -> Container:
        made.append(Container(lab))
        return made[-1]

    yield make
    for container in made:
        container.remove()
    assert leftovers(lab) == ({"router", "health"}, [], [])


def leftovers(lab: Lab) -> tuple[set[str], list[str], list[Any]]:
    """Owners of addresses, endpoint devices and endpoints: what must be as before once every container is gone."""
    client = lab.client()
    owners = {item["owner"] for item in client.request("GET", "/v1/ipam")["addresses"]}
    links = json.loads(run("ip", "-n", lab.directory.namespace(NODE), "-j", "link"))
    devices = [link["ifname"] for link in links if link["ifname"].startswith("lxc")]
    return owners, devices, client.request("GET", "/v1/endpoint")


def connected(lab: Lab) -> set[str]:
    """The container ids of all endpoints."""
    endpoints = lab.client().request("GET", "/v1/endpoint")
    return {item["status"]["external-identifiers"]["container-id"] for item in endpoints}


def addresses(result: dict[str, Any]) -> list[str]:
    return [item["address"].partition("/")[0] for item in result["ips"]]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_gets_a_network_and_loses_it(containers: Any, lab: Lab, version: str) -> None:
    container = containers()
    container.version = version
    code, result = container.call("ADD")
    assert code == 0 and result["cniVersion"] == version
    assert [item.get("version") for item in result["ips"]] == (["4", "6"] if version < "1" else [None, None])
    assert result["interfaces"][1]["sandbox"] == str(netns.path(container.namespace))

    (link,) = container.inside("ip", "-j", "address", "show", "dev", "eth0")
    assert link["operstate"] == "UP" and link["address"] == result["interfaces"][1]["mac"]
    assert set(addresses(result)) <= {item["local"] for item in link["addr_info"]}
    routes = container.inside("ip", "-j", "route") + container.inside("ip", "-j", "-6", "route")
    assert {item["gateway"] for item in routes if item["dst"] == "default"} == {
        item["gateway"] for item in result["ips"]
    }

    reached = lab.helper("node1").probe(
        [
            {"id": index, "protocol": "ICMP", "address": address, "port": None, "timeout": 5.0}
            for index, address in enumerate(addresses(result))
        ],
        30,
    )
    assert [item["reached"] for item in reached] == [True, True]

    if version != "0.3.1":
        assert container.call("CHECK", prevResult=result) == (0, None)
    assert container.call("DEL", prevResult=result) == (0, None)
    assert container.call("DEL") == (0, None)
    links = container.inside("ip", "-j", "link")
    assert [item["ifname"] for item in links] == ["lo"]


def test_a_second_add_is_refused_and_harms_nothing(containers: Any) -> None:
    container = containers()
    _, result = container.call("ADD")
    code, answer = container.call("ADD")
    assert code == 1 and answer["code"] == 101 and container.id in answer["msg"]
    assert container.call("CHECK", prevResult=result) == (0, None)


def test_two_interfaces_of_one_container(containers: Any) -> None:
    container = containers()
    _, first = container.call("ADD")
    code, second = container.call("ADD", ifname="net1")
    # the second default route of the same namespace replaces the first; both interfaces are ours
    assert code == 0 and not set(addresses(first)) & set(addresses(second))
    assert container.call("DEL", ifname="net1") == (0, None)


def test_a_name_that_is_taken_inside_leaves_nothing_behind(containers: Any, lab: Lab) -> None:
    container = containers()
    run("ip", "-n", container.namespace, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    code, answer = container.call("ADD")
    assert code == 1 and answer["code"] == 102 and "eth0" in answer["msg"]
    assert leftovers(lab) == ({"router", "health"}, [], [])
    (link,) = container.inside("ip", "-j", "link", "show", "dev", "eth0")
    assert link["link_type"] == "ether"


def test_del_when_the_namespace_is_gone(containers: Any, lab: Lab) -> None:
    container = containers()
    assert container.call("ADD")[0] == 0
    netns.remove(container.namespace)
    assert container.call("DEL") == (0, None)
    assert leftovers(lab) == ({"router", "health"}, [], [])


def test_check_tells_what_is_wrong(containers: Any) -> None:
    container = containers()
    code, answer = container.call("CHECK", prevResult={"ips": []})
    assert code == 1 and answer["code"] == 3 and container.id in answer["msg"]
    _, result = container.call("ADD")
    other = {**result, "ips": [{"address": "10.200.9.9/32"}]}
    code, answer = container.call("CHECK", prevResult=other)
    assert code == 1 and answer["code"] == 103 and "prevResult.ips" in answer["msg"]
    gone = addresses(result)[0]
    run("ip", "-n", container.namespace, "address", "del", f"{gone}/32", "dev", "eth0")
    code, answer = container.call("CHECK", prevResult=result)
    assert code == 1 and answer["code"] == 103 and gone in answer["msg"]


def test_a_configuration_for_the_middle_of_a_chain_is_refused(containers: Any) -> None:
    code, answer = containers().call("ADD", prevResult={"ips": []})
    assert code == 1 and answer["code"] == 7 and "prevResult" in answer["msg"]


def test_labels_from_the_configuration_make_the_identity(containers: Any, lab: Lab) -> None:
    container = containers()
    assert container.call("ADD", args={"cni": {"labels": [{"key": "org", "value": "empire"}]}})[0] == 0
    (endpoint,) = lab.client().request("GET", "/v1/endpoint")
    assert "k8s:org=empire" in endpoint["status"]["labels"]


def test_mtu(containers: Any) -> None:
    container = containers()
    assert container.call("ADD", mtu=1400)[0] == 0
    (link,) = container.inside("ip", "-j", "link", "show", "dev", "eth0")
    assert link["mtu"] == 1400


def test_the_mtu_of_pods_is_that_of_the_nodes_links(containers: Any, lab: Lab) -> None:
    node = lab.directory.namespace(NODE)
    (uplink, *_) = json.loads(run("ip", "-j", "-n", node, "route", "show", "default"))
    try:
        run("ip", "-n", node, "link", "set", "dev", uplink["dev"], "mtu", "1404")
        lab.stop_agent()
        lab.start_agent()
        container = containers()
        code, result = container.call("ADD")
        assert code == 0
        (link,) = container.inside("ip", "-j", "link", "show", "dev", "eth0")
        assert (link["mtu"], [item["mtu"] for item in result["interfaces"]]) == (1404, [1404, 1404])
    finally:
        run("ip", "-n", node, "link", "set", "dev", uplink["dev"], "mtu", "1500")
        lab.stop_agent()
        lab.start_agent()


def test_a_burst_gives_every_container_its_own_addresses(containers: Any, lab: Lab) -> None:
    burst = [containers() for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        results = [result for _, result in pool.map(lambda container: container.call("ADD"), burst)]
    given = [address for result in results for address in addresses(result)]
    assert len(given) == len(set(given)) == 40
    with ThreadPoolExecutor(20) as pool:
        assert {code for code, _ in pool.map(lambda container: container.call("DEL"), burst)} == {0}
    assert leftovers(lab) == ({"router", "health"}, [], [])


def test_garbage_collection_knows_networks_apart(containers: Any, lab: Lab) -> None:
    valid, stale, foreign = containers(), containers(), containers()
    foreign.network = "other"
    for container in (valid, stale, foreign):
        assert container.call("ADD")[0] == 0
    attachments = [{"containerID": valid.id, "ifname": "eth0"}]
    assert valid.call("GC", **{"cni.dev/valid-attachments": attachments}) == (0, None)
    left = {
        item["status"]["external-identifiers"]["container-id"] for item in lab.client().request("GET", "/v1/endpoint")
    }
    assert left == {valid.id, foreign.id}


def test_status(containers: Any) -> None:
    assert containers().call("STATUS") == (0, None)


def test_del_while_the_agent_is_dead_is_done_by_the_next_one(containers: Any, lab: Lab) -> None:
    gone, stays = containers(), containers()
    assert gone.call("ADD")[0] == stays.call("ADD")[0] == 0
    lab.stop_agent(signal.SIGKILL)
    try:
        assert gone.call("DEL") == (0, None)
        code, answer = stays.call("STATUS")
        assert code == 1 and answer["code"] == 50
        code, answer = stays.call("ADD", wait="0")
        assert code == 1 and answer["code"] == 11
    finally:
        lab.start_agent()
    assert connected(lab) == {stays.id}
    owners, devices, _ = leftovers(lab)
    assert devices == [host_interface_name(stays.id, "eth0")]
    assert not [owner for owner in owners if gone.id in owner]


def test_add_waits_for_an_agent_that_starts(containers: Any, lab: Lab) -> None:
    container = containers()
    lab.stop_agent()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(container.call, "ADD")
        lab.start_agent()
        assert waiting.result()[0] == 0


def test_a_kill_in_the_middle_of_a_burst_leaks_nothing(containers: Any, lab: Lab) -> None:
    """Every ADD that said yes survives; every one that said no, or nothing, leaves nothing once its DEL is done."""
    burst = [containers() for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(container.call, "ADD", wait="60") for container in burst]
        # as soon as the first answers, others are at every step
        calls[0].result()
        lab.stop_agent(signal.SIGKILL)
        lab.start_agent()
        outcomes = [call.result() for call in calls]
    succeeded = {container.id: result for container, (code, result) in zip(burst, outcomes, strict=True) if code == 0}
    given = [address for result in succeeded.values() for address in addresses(result)]
    assert len(given) == len(set(given))
    left = {
        item["status"]["external-identifiers"]["container-id"] for item in lab.client().request("GET", "/v1/endpoint")
    }
    assert succeeded.keys() <= left
    for container, (code, answer) in zip(burst, outcomes, strict=True):
        assert code == 0 or answer["code"] == 11
        if code == 0:
            assert container.call("CHECK", prevResult=answer) == (0, None)
