"""Lists of plugins that people use, with Debian's reference plugins: packets flow, and every command succeeds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cni_harness import Pod, Refused, answers, put_policy, reached
from lab_harness import ciliate, new_lab

from ciliate.datapath.netlink import in_netns
from ciliate.lab import netns
from ciliate.lab.command import run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE, WORLD
from ciliate.lab.world import NODE_ADDRESSES

from .test_chaining import FRIENDS, POLICY_ONLY, below, pods_of

OURS = {"type": "ciliate-cni", "capabilities": {"bandwidth": True, "portMappings": True}}
MAC = "c2:b0:57:49:47:f1"
RATE, BURST = 2_000_000, 200_000
"""Bits a second, and bits at once."""
LIMITS = {"ingressRate": RATE, "ingressBurst": BURST, "egressRate": 2 * RATE, "egressBurst": BURST}
PORTS = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
PORTMAP = {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}}
TUNING = {"type": "tuning", "mac": MAC, "mtu": 1400, "promisc": True}
LISTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "portmap": ([OURS, PORTMAP], {"portMappings": PORTS}),
    "bandwidth": ([OURS], {"bandwidth": LIMITS}),
    "tuning": ([OURS, TUNING], {}),
    "firewall": ([OURS, {"type": "firewall", "backend": "iptables"}], {}),
    "sbr": ([OURS, {"type": "sbr"}], {}),
    "all": (
        [OURS, TUNING, PORTMAP, {"type": "firewall", "backend": "iptables"}],
        {"portMappings": PORTS, "bandwidth": LIMITS},
    ),
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("cni") as lab:
        yield lab


@pytest.fixture
def pods(lab: Lab) -> Iterator[Any]:
    yield from pods_of(lab)


def with_runtime(plugins: list[dict[str, Any]], given: dict[str, Any]) -> list[dict[str, Any]]:
    """A list as a runtime hands it over: each plugin gets what it said that it can do."""
    found = []
    for plugin in plugins:
        able = {name: given[name] for name in plugin.get("capabilities", {}) if name in given}
        found.append({**plugin, "runtimeConfig": able} if able else plugin)
    return found


def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


def queues(namespace: str, device: str) -> dict[str, dict[str, Any]]:
    """A device's queueing disciplines by kind, with counters."""
    found = json.loads(run("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device))
    return {item["kind"]: item for item in found}


def send(pod: Pod, address: str, count: int) -> None:
    """Send so many datagrams of 1,000 bytes; whoever limits them holds them back."""
    file = os.open(netns.path(pod.namespace), os.O_RDONLY)
    try:
        sender = in_netns(file, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    finally:
        os.close(file)
    with sender:
        for _ in range(count):
            sender.sendto(bytes(1000), (address, 9))


def device_of(pod: Pod) -> str:
    """The node's end of a pod's device."""
    return next(item["name"] for item in (pod.result or {})["interfaces"] if item["name"].startswith(("lxc", "veth")))


@pytest.mark.parametrize("name", LISTS)
def test_packets_flow_and_every_command_succeeds(pods: Any, lab: Lab, name: str) -> None:
    plugins, given = LISTS[name]
    pod = pods(*with_runtime(plugins, given), version="1.0.0", role="server")
    friend, stranger = pods(OURS, role="friend"), pods(OURS, role="stranger")
    for item in (pod, friend, stranger):
        item.add()
    pod.serve(80)
    everybody = [lab.helper(WORLD), lab.helper(NODE), friend.helper(), stranger.helper()]
    for asker in everybody:
        assert reached(asker, pod.addresses(), 80, 10.0) == [True, True]
    put_policy(lab, ingress=[FRIENDS])
    verdicts = [reached(asker, pod.addresses(), 80)[0] for asker in everybody]
    assert verdicts == [False, True, True, False]
    if "portMappings" in given:
        mapped = [answers(asker, NODE_ADDRESSES[:1], 8080)[0]["reached"] for asker in everybody]
        assert mapped == [False, True, True, False]
    if "bandwidth" in given:
        limited(pod, friend, lab)
    pod.call("CHECK", pod.plugins[0], pod.result)
    if name == "tuning":
        pod.call("CHECK", TUNING, pod.result)
    for plugin in reversed(pod.plugins[1:]):
        pod.call("DEL", plugin, pod.result)
    del pod.plugins[1:]
    # libcni has null where no container is left, and the list of them else
    pod.version = "1.1.0"
    kept = [{"containerID": item.id, "ifname": "eth0"} for item in (friend, stranger)]
    pod.call("GC", {**OURS, "cni.dev/valid-attachments": kept})
    assert {item["status"]["external-identifiers"]["container-id"] for item in lab.request("GET", "/v1/endpoint")} == {
        friend.id,
        stranger.id,
    }
    pod.call("GC", {**OURS, "cni.dev/valid-attachments": None})
    pod.version = "1.0.0"  # Debian's plugins know nothing newer
    assert lab.request("GET", "/v1/endpoint") == []


def limited(pod: Pod, friend: Pod, lab: Lab) -> None:
    """What the pod gets and what it sends waits for its turn, also between pods of the node."""
    node, device = lab.directory.namespace(NODE), device_of(pod)
    for sender, receiver, namespace, name, rate in (
        (friend, pod, node, device, RATE),
        (pod, friend, pod.namespace, "eth0", 2 * RATE),
    ):
        before = queues(namespace, name)["tbf"]
        assert before["options"]["rate"] == rate // 8
        send(sender, receiver.addresses()[0], 100)
        until(lambda: queues(namespace, name)["tbf"]["overlimits"] > before["overlimits"], "packets wait")  # noqa: B023
        until(lambda: queues(namespace, name)["tbf"]["backlog"] == 0, "what waited has gone")  # noqa: B023
        assert queues(namespace, name)["tbf"]["bytes"] > before["bytes"]


def test_bandwidth_before_us_is_refused_by_name(pods: Any, lab: Lab, tmp_path: Path) -> None:
    base = below("bridge", tmp_path)
    bandwidth = {"type": "bandwidth", "runtimeConfig": {"bandwidth": LIMITS}}
    pod = pods(base, role="server")
    pod.add()
    pod.result = pod.call("ADD", bandwidth, pod.result)
    with pytest.raises(Refused, match=r"ingress.*bandwidth.*capability") as refused:
        pod.call("ADD", POLICY_ONLY, pod.result)
    assert refused.value.code == 2
    assert lab.request("GET", "/v1/endpoint") == []
    pod.call("DEL", bandwidth, pod.result)
    run("ip", "-n", lab.directory.namespace(NODE), "link", "del", base["bridge"])


def test_limits_on_a_device_of_another_plugin(pods: Any, lab: Lab, tmp_path: Path) -> None:
    base = below("bridge", tmp_path)
    ours = {**POLICY_ONLY, "capabilities": {"bandwidth": True}}
    pod, friend = (
        pods(base, *with_runtime([ours], {"bandwidth": LIMITS}), role="server"),
        pods(base, ours, role="friend"),
    )
    for item in (pod, friend):
        item.add()
    limited(pod, friend, lab)
    pod.check()
    run("tc", "-n", pod.namespace, "qdisc", "del", "dev", "eth0", "root")
    with pytest.raises(Refused, match="egressRate"):
        pod.call("CHECK", pod.plugins[1], pod.result)
    pod.call("DEL", pod.plugins[1], pod.result)
    assert "tbf" not in queues(lab.directory.namespace(NODE), device_of(pod))
    for item in (pod, friend):
        item.remove()
    run("ip", "-n", lab.directory.namespace(NODE), "link", "del", base["bridge"])


def test_a_mac_that_changes_on_a_link_of_others_is_named(pods: Any, lab: Lab, tmp_path: Path) -> None:
    """Who may have which MAC there is no pod's choice: tuning has its place before us."""
    base = below("bridge", tmp_path)
    before, behind = pods(base, TUNING, POLICY_ONLY, role="server"), pods(base, POLICY_ONLY, TUNING, role="other")
    before.add()
    before.serve(80)
    behind.add()
    assert reached(lab.helper(NODE), before.addresses(), 80, 5.0) == [True, True]

    def said() -> str:
        return str([item["status"]["log"] for item in lab.request("GET", "/v1/endpoint")])

    until(lambda: f"has MAC {MAC}, expected" in said(), "the endpoint's log names it")
    found = ciliate(lab, "endpoint", "health", str(lab.request("GET", "/v1/endpoint")[1]["id"])).stdout
    assert "tuning" in found
    for item in (before, behind):
        item.remove()
    with contextlib.suppress(Exception):
        run("ip", "-n", lab.directory.namespace(NODE), "link", "del", base["bridge"])
