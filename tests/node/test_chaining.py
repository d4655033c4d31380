"""Chains with Debian's reference plugins: policy on devices of others, port mappings on ours."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cni_harness import Pod, Refused, answers, put_policy, reached
from lab_harness import new_lab
from link_frames import SECRET, End, allowed, forbidden, heard, link
from scapy.layers.l2 import ARP, Ether

from ciliate.lab.command import run
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE, WORLD
from ciliate.lab.world import NODE_ADDRESSES, WORLD_LINK

VERSIONS = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
VETH = {"type": "ciliate-cni"}
POLICY_ONLY = {"type": "ciliate-cni", "chaining-mode": "generic-veth"}
FRIENDS = {"fromEndpoints": [{"matchLabels": {"role": "friend"}}]}
WEB = {"toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}]}]}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("cni") as lab:
        yield lab


@pytest.fixture
def pods(lab: Lab) -> Iterator[Any]:
    yield from pods_of(lab)


def pods_of(lab: Lab) -> Iterator[Any]:
    """Makes pods; each is gone afterwards, and with them every endpoint and policy."""
    made: list[Pod] = []

    def make(*plugins: dict[str, Any], **options: str) -> Pod:
        made.append(Pod(lab, plugins, **options))
        return made[-1]

    try:
        yield make
    finally:
        for pod in made:
            pod.remove()
        lab.request("DELETE", "/v1/policy?all=true")
    assert lab.request("GET", "/v1/endpoint") == []


def below(kind: str, data: Path) -> dict[str, Any]:
    """The configuration of an earlier plugin, with addresses of its own for each test."""
    number = uuid.uuid4().int % 200 + 20
    ranges = [[{"subnet": f"10.{number}.7.0/24"}], [{"subnet": f"fd{number:02x}:7::/64"}]]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    ipam = {"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": str(data)}
    if kind == "bridge":
        return {"type": "bridge", "bridge": f"br{number}", "isGateway": True, "ipam": ipam}
    return {"type": "ptp", "ipam": ipam}


@pytest.fixture(params=["bridge", "ptp"])
def base(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path) -> Iterator[dict[str, Any]]:
    plugin = below(request.param, tmp_path)
    yield plugin
    if "bridge" in plugin:
        run("ip", "-n", lab.directory.namespace(NODE), "link", "del", plugin["bridge"])


def network_of(pod: Pod) -> list[Any]:
    """Devices, addresses and routes on both sides, as far as an earlier plugin made them; no counters, no filters."""
    commands = (["link"], ["address"], ["route"], ["-6", "route"])
    node = ["ip", "-n", pod.lab.directory.namespace(NODE), "-j"]
    found = [pod.inside("ip", "-j", *command) for command in commands]
    return found + [_plain(json.loads(run(*node, *command))) for command in commands]


def _plain(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # the kernel itself gives a device without a queue length one, as soon as anything filters on it
    return [{key: item[key] for key in item if key not in ("qdisc", "txqlen")} for item in items]


def test_policy_on_a_device_of_another_plugin(pods: Any, lab: Lab, base: dict[str, Any]) -> None:
    server, friend = (pods(base, POLICY_ONLY, role=role) for role in ("server", "friend"))
    stranger, own = pods(base, POLICY_ONLY, role="stranger"), pods(VETH, role="friend")
    for pod in (server, friend, stranger, own):
        pod.add()
        pod.check()
        pod.serve(80, 81)
    world, node = lab.helper(WORLD), lab.helper(NODE)
    everybody = [friend.helper(), stranger.helper(), own.helper(), world, node]

    for asker in everybody:
        assert reached(asker, server.addresses(), 80, 5.0) == [True, True]
        assert reached(asker, server.addresses(), None, 5.0) == [True, True]
    for pod in (friend, own):
        assert reached(server.helper(), pod.addresses(), 80, 5.0) == [True, True]
    assert reached(server.helper(), WORLD_LINK, None, 5.0) == [True, True]

    put_policy(lab, ingress=[{**FRIENDS, **WEB}])
    allowed = [reached(asker, server.addresses(), 80) for asker in everybody]
    assert allowed == [[True, True], [False, False], [True, True], [False, False], [True, True]]
    assert reached(friend.helper(), server.addresses(), 81) == [False, False]
    # answers to what it began itself come back
    assert reached(server.helper(), stranger.addresses(), 80) == [True, True]

    put_policy(lab, egress=[{"toEndpoints": [{"matchLabels": {"role": "friend"}}]}])
    assert reached(server.helper(), friend.addresses(), 80) == [True, True]
    assert reached(server.helper(), own.addresses(), 80) == [True, True]
    assert reached(server.helper(), stranger.addresses(), 80) == [False, False]
    assert reached(server.helper(), WORLD_LINK, None) == [False, False]


def test_the_device_of_the_other_plugin_stays_as_it_is(pods: Any, base: dict[str, Any]) -> None:
    pod = pods(base, POLICY_ONLY)
    made = pod.call("ADD", base)
    before = network_of(pod)
    pod.result = made
    assert pod.call("ADD", POLICY_ONLY, made) == made
    assert network_of(pod) == before
    (endpoint,) = pod.lab.request("GET", "/v1/endpoint")
    networking = endpoint["status"]["networking"]
    inside = next(item for item in made["interfaces"] if item.get("sandbox"))
    assert networking["mac"] == inside["mac"]
    assert networking["interface-name"] in {item["name"] for item in made["interfaces"]}
    (given,) = networking["addressing"]
    assert [given["ipv4"], given["ipv6"]] == pod.addresses()

    assert pod.call("DEL", POLICY_ONLY, made) is None
    assert network_of(pod) == before
    assert filters(pod, networking["interface-name"]) == []
    pod.call("CHECK", base, made)
    assert pod.call("DEL", POLICY_ONLY, made) is None


def filters(pod: Pod, device: str) -> list[Any]:
    """The queueing disciplines of one of the node's devices that filters hang on."""
    answer = json.loads(run("tc", "-n", pod.lab.directory.namespace(NODE), "-j", "qdisc", "show", "dev", device))
    return [item for item in answer if item["kind"] == "clsact"]


def test_filters_of_an_administrator_stay(pods: Any, base: dict[str, Any]) -> None:
    pod = pods(base, POLICY_ONLY)
    made = pod.result = pod.call("ADD", base)
    device = next(item["name"] for item in made["interfaces"] if item["name"].startswith("veth"))
    tc = ["tc", "-n", pod.lab.directory.namespace(NODE)]
    run(*tc, "qdisc", "add", "dev", device, "clsact")
    rule = ["dev", device, "ingress", "pref", "77", "protocol", "ip", "u32", "match", "u32", "0", "0"]
    run(*tc, "filter", "add", *rule)
    pod.call("ADD", POLICY_ONLY, made)
    pod.call("DEL", POLICY_ONLY, made)
    left = json.loads(run(*tc, "-j", "filter", "show", "dev", device, "ingress"))
    assert {item["pref"] for item in left if item} == {77}
    assert json.loads(run(*tc, "-j", "filter", "show", "dev", device, "egress")) == []


def test_check_compares_with_the_device(pods: Any, base: dict[str, Any]) -> None:
    pod = pods(base, POLICY_ONLY)
    made = pod.add()
    pod.check()
    node = pod.lab.directory.namespace(NODE)
    (endpoint,) = pod.lab.request("GET", "/v1/endpoint")
    device = endpoint["status"]["networking"]["interface-name"]
    mac = endpoint["status"]["networking"]["mac"]
    inside = ["ip", "-n", pod.namespace]
    address = [*inside, "link", "set", "eth0", "address"]
    first, gateway = pod.addresses()[0], made["ips"][0]["gateway"]
    prefix = made["ips"][0]["address"]
    cases = [
        ("default", [*inside, "route", "del", "default"], [*inside, "route", "add", "default", "via", gateway]),
        ("MAC", [*address, "02:00:00:00:00:07"], [*address, mac]),
        (first, [*inside, "address", "del", prefix, "dev", "eth0"], []),
    ]
    for word, damage, repair in cases:
        run(*damage)
        with pytest.raises(Refused) as refused:
            pod.call("CHECK", POLICY_ONLY, made)
        assert refused.value.code == 103 and ("prevResult.routes" if word == "default" else word) in refused.value.text
        if repair:
            run(*repair)
            pod.call("CHECK", POLICY_ONLY, made)
    run(*inside, "address", "add", prefix, "dev", "eth0")
    run(*inside, "route", "replace", "default", "via", gateway)
    run("tc", "-n", node, "filter", "del", "dev", device, "ingress", "pref", "10")
    # the agent mends its own side as soon as it hears of it
    show, deadline = ["tc", "-n", node, "filter", "show", "dev", device, "ingress", "pref", "10"], time.monotonic() + 20
    while "ciliate" not in subprocess.run(show, capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < deadline, "the filter did not come back"
        time.sleep(0.05)
    pod.call("CHECK", POLICY_ONLY, made)


def test_a_killed_agent_comes_back_to_devices_of_others(pods: Any, lab: Lab, base: dict[str, Any]) -> None:
    server, friend = (pods(base, POLICY_ONLY, role=role) for role in ("server", "friend"))
    stranger = pods(base, POLICY_ONLY, role="stranger")
    for pod in (server, friend, stranger):
        pod.add()
        pod.serve(80)
    put_policy(lab, ingress=[FRIENDS])
    before = network_of(server)

    def verdicts() -> list[list[bool]]:
        return [reached(pod.helper(), server.addresses(), 80) for pod in (friend, stranger)]

    device = next(item["name"] for item in (server.result or {})["interfaces"] if item["name"].startswith("veth"))
    rules = ["tc", "-n", lab.directory.namespace(NODE), "filter"]
    lab.stop_agent(signal.SIGKILL)
    try:
        # what earlier versions let pass unread, and somebody's own rule beside it
        for priority, protocol, to in (("1", "arp", "1:1"), ("2", "ipv6", "1:1"), ("3", "arp", "1:7")):
            add = ["add", "dev", device, "ingress", "pref", priority, "protocol", protocol, "u32"]
            run(*rules, *add, "match", "u32", "0", "0", "classid", to)
        assert verdicts() == [[True, True], [False, False]]
        # while no agent answers, the chain can still be taken down
        stranger.delete()
    finally:
        lab.start_agent()
    assert len(lab.request("GET", "/v1/endpoint")) == 2
    assert network_of(server) != [] and network_of(server)[:4] == before[:4]
    left = json.loads(run(*rules[:1], "-j", *rules[1:], "show", "dev", device, "ingress"))
    assert {item["pref"] for item in left if item} == {3, 10}
    assert reached(friend.helper(), server.addresses(), 80) == [True, True]
    server.check()


def test_programs_of_each_endpoints_own_on_devices_of_others(tmp_path: Path) -> None:
    with new_lab("cni", options={"datapath-loader": "template"}) as lab:
        made = pods_of(lab)
        make = next(made)
        base = below("bridge", tmp_path)
        server, friend, stranger = (make(base, POLICY_ONLY, role=role) for role in ("server", "friend", "stranger"))
        for pod in (server, friend, stranger):
            pod.add()
            pod.check()
            pod.serve(80)
        put_policy(lab, ingress=[FRIENDS])
        verdicts = [reached(pod.helper(), server.addresses(), 80) for pod in (friend, stranger)]
        made.close()
        assert verdicts == [[True, True], [False, False]]


def end_of(device: Any, addresses: list[str]) -> End:
    """One end of a link, as ``ip -j address`` shows its device."""
    (local,) = [item["local"] for item in device["addr_info"] if item["scope"] == "link"]
    return End(device["address"], addresses[0], addresses[1], local)


@pytest.fixture
def neighbours(pods: Any, lab: Lab, tmp_path: Path) -> Iterator[tuple[Pod, Pod, End]]:
    """Two pods on a bridge, the second closed to the first, and the bridge, which is their gateway."""
    base = below("bridge", tmp_path)
    sender, victim = pods(base, POLICY_ONLY, role="sender"), pods(base, POLICY_ONLY, role="server")
    for pod in (sender, victim):
        pod.add()
        pod.serve(80)
    put_policy(lab, ingress=[FRIENDS])
    node = lab.directory.namespace(NODE)
    (bridge,) = json.loads(run("ip", "-n", node, "-j", "address", "show", base["bridge"]))
    gateway = end_of(bridge, [item["gateway"] for item in (sender.result or {})["ips"]])
    yield sender, victim, gateway
    run("ip", "-n", node, "link", "del", base["bridge"])


def test_neighbours_hear_of_a_pod_itself_and_nothing_else(neighbours: tuple[Pod, Pod, End], lab: Lab) -> None:
    pod, closed, gateway = neighbours
    sender, victim = (
        end_of(*item.inside("ip", "-j", "address", "show", "eth0"), item.addresses()) for item in (pod, closed)
    )
    markers = (
        bytes(Ether(src=sender.mac, dst=victim.mac) / ARP(hwsrc=sender.mac, psrc=sender.ipv4, pdst=f"192.0.2.{number}"))
        for number in range(1, 255)
    )
    came, missed = {}, []
    with link(pod.namespace) as mouth, link(closed.namespace) as ear:
        for name, frame in forbidden(sender, victim, gateway).items():
            mouth.send(bytes(frame))
            frames = heard(ear, mouth, next(markers))
            plain = bytes(frame).replace(b"\x81\x00\x00\x00", b"")  # the kernel takes the tag of a VLAN out
            if any(SECRET in item or item in (bytes(frame), plain) for item in frames):
                came[name] = frames
        for name, frame in allowed(sender, victim).items():
            mouth.send(bytes(frame))
            if bytes(frame) not in heard(ear, mouth, next(markers)):
                missed.append(name)
    assert (sorted(came), missed) == ([], [])
    for target in (closed, pod):
        run("ip", "-n", target.namespace, "neighbour", "flush", "dev", "eth0")
    assert reached(pod.helper(), closed.addresses(), 80) == [False, False]
    assert reached(closed.helper(), pod.addresses(), 80, 5.0) == [True, True]
    assert reached(lab.helper(NODE), closed.addresses(), 80, 5.0) == [True, True]


@pytest.mark.parametrize("mode", ["none", "portmap"])
def test_port_mappings_meet_the_policy_of_the_pod(pods: Any, lab: Lab, mode: str) -> None:
    ports = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
    portmap = {"type": "portmap", "snat": True, "runtimeConfig": {"portMappings": ports}}
    veth = {**VETH, "chaining-mode": mode}
    server = pods(veth, portmap, role="server")
    server.add()
    # CHECK of Debian's portmap 1.1.1 looks for the rules of one family in both
    server.call("CHECK", veth, server.result)
    server.serve(80)
    friend, stranger = pods(veth, role="friend"), pods(veth, role="stranger")
    for pod in (friend, stranger):
        pod.add()
    node = NODE_ADDRESSES[:1]

    def through(asker: Any) -> tuple[bool, str]:
        (answer,) = answers(asker, node, 8080)
        return answer["reached"], answer["saw"]

    assert through(lab.helper(WORLD)) == (True, WORLD_LINK[0])
    assert through(lab.helper(NODE))[0]
    if mode == "portmap":
        # answers between pods of one node go back through the stack, which undoes the mapping
        assert through(friend.helper()) == (True, friend.addresses()[0])

    put_policy(lab, ingress=[{"fromEntities": ["world"], **WEB}])
    assert through(lab.helper(WORLD)) == (True, WORLD_LINK[0])
    put_policy(lab, ingress=[{"fromCIDR": [f"{WORLD_LINK[0]}/32"], **WEB}])
    assert through(lab.helper(WORLD)) == (True, WORLD_LINK[0])
    put_policy(lab, ingress=[{**FRIENDS, **WEB}])
    assert through(lab.helper(WORLD)) == (False, "")
    assert not through(stranger.helper())[0]
    if mode == "portmap":
        assert through(friend.helper()) == (True, friend.addresses()[0])
        assert reached(friend.helper(), server.addresses(), 80) == [True, True]
        assert reached(stranger.helper(), server.addresses(), 80) == [False, False]

    server.delete()
    rules = run("nsenter", f"--net=/run/netns/{lab.directory.namespace(NODE)}", "iptables-save", "-t", "nat")
    assert server.id not in rules


@pytest.mark.parametrize("version", VERSIONS)
def test_commands_of_every_version(pods: Any, tmp_path: Path, lab: Lab, version: str) -> None:
    """ADD, CHECK, DEL, GC, STATUS and VERSION, with and without an earlier plugin."""
    base = below("ptp", tmp_path)
    for chain in ([VETH], [base, POLICY_ONLY]):
        pod = pods(*chain, version=version)
        ours = chain[-1]
        previous = None
        if len(chain) > 1:
            # Debian's plugins know nothing newer than 1.0.0; a runtime hands a result on in the list's version
            pod.version = min(version, "1.0.0")
            previous = pod.result = pod.call("ADD", base)
            pod.version = version
        result = pod.call("ADD", ours, previous)
        assert result["cniVersion"] == version
        assert [item.get("version") for item in result["ips"]] == (["4", "6"] if version < "1" else [None, None])
        assert [pod.namespace in item.get("sandbox", "") for item in result["interfaces"]] == [False, True]
        if previous is not None:
            assert {**result, "cniVersion": previous["cniVersion"]} == previous
        assert pod.call("VERSION", ours)["supportedVersions"] == VERSIONS
        outcomes = {
            "CHECK": outcome(pod, "CHECK", ours, result),
            "STATUS": outcome(pod, "STATUS", ours),
            "GC": outcome(pod, "GC", {**ours, "cni.dev/valid-attachments": []}),
        }
        since = {"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}
        assert outcomes == {command: None if version >= since[command] else 1 for command in since}
        # what GC was told nothing of is gone
        assert len(lab.request("GET", "/v1/endpoint")) == (0 if version == "1.1.0" else 1)
        assert pod.call("DEL", ours, result) is None
        assert pod.call("DEL", ours) is None
        pod.version = min(version, "1.0.0") if previous else version


def outcome(pod: Pod, command: str, plugin: dict[str, Any], previous: Any = None) -> int | None:
    """None where a command succeeds with no output, else the error's code."""
    try:
        assert pod.call(command, plugin, previous) is None
    except Refused as refused:
        return refused.code
    return None


def test_what_policy_only_cannot_be_put_on(pods: Any, lab: Lab, tmp_path: Path) -> None:
    base = below("ptp", tmp_path)
    pod = pods(base, POLICY_ONLY)
    made = pod.result = pod.call("ADD", base)
    inside = made["interfaces"].index(next(item for item in made["interfaces"] if item.get("sandbox")))
    other = {"address": "10.9.9.9/24", "interface": inside}
    astray = {"address": "10.9.9.9/24", "interface": 17}
    wrong = [
        (POLICY_ONLY, None, {}, 7, "prevResult"),
        ({**POLICY_ONLY, "mtu": 1400}, made, {}, 2, "mtu"),
        (POLICY_ONLY, made, {"CNI_IFNAME": "eth7"}, 4, "CNI_IFNAME"),
        (POLICY_ONLY, {**made, "ips": [other]}, {}, 7, "10.9.9.9"),
        (POLICY_ONLY, {**made, "ips": [astray]}, {}, 7, "prevResult.ips[0].interface"),
        (POLICY_ONLY, {**made, "ips": [{"address": "x"}]}, {}, 7, "prevResult.ips[0].address"),
        (POLICY_ONLY, {**made, "interfaces": 3}, {}, 7, "prevResult.interfaces"),
        ({**POLICY_ONLY, "chaining-mode": "no-such"}, made, {}, 7, "chaining-mode"),
        (VETH, made, {}, 7, "prevResult"),
    ]
    for plugin, previous, changes, code, word in wrong:
        with pytest.raises(Refused) as refused:
            pod.call("ADD", plugin, previous, **changes)
        assert (refused.value.code, word in refused.value.text) == (code, True), refused.value
    run("ip", "-n", pod.namespace, "link", "add", "eth1", "link", "eth0", "type", "macvlan")
    with pytest.raises(Refused) as refused:
        pod.call("ADD", POLICY_ONLY, {"ips": []}, CNI_IFNAME="eth1")
    assert refused.value.code == 2 and "macvlan" in refused.value.text
    run("ip", "-n", pod.namespace, "link", "add", "eth2", "type", "veth", "peer", "name", "eth3")
    with pytest.raises(Refused) as refused:
        pod.call("ADD", POLICY_ONLY, {"ips": []}, CNI_IFNAME="eth2")
    assert refused.value.code == 2 and "not on this node" in refused.value.text
    assert lab.request("GET", "/v1/endpoint") == []
    host = next(item["name"] for item in made["interfaces"] if not item.get("sandbox"))
    assert filters(pod, host) == []
    with pytest.raises(LabError):
        run("ip", "-n", pod.namespace, "link", "show", "eth7")
