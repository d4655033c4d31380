"""Pods reach a world that knows no way back to them: masqueraded by BPF, by iptables, and by both during a switch."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cni_harness import reached
from lab_harness import new_lab

from ciliate.cli.bpf import command
from ciliate.datapath import kernelct
from ciliate.datapath.netlink import in_netns
from ciliate.lab import netns
from ciliate.lab.changes import populate
from ciliate.lab.command import ip_batch, run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE, WORLD
from ciliate.lab.traffic import EchoServer, NewFlows, TcpStream, UdpFlow, make_socket, namespace
from ciliate.lab.world import NODE_ADDRESSES, WORLD_LINK
from ciliate.manifest import loads

PORT, HIGH = 7070, 42222
POD = "default/talker"
MANIFESTS = """
apiVersion: v1
kind: Pod
metadata: {name: talker}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: second}
spec: {containers: [{name: c, image: c}]}
"""
PATIENCE = 20.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("masq", loads(MANIFESTS, "masquerade"), options={"masquerade": "bpf"}) as made:
        # whatever leaves the node unmasqueraded gets no answer
        ip_batch(made.namespace_of(WORLD), [f"route del default via {address}" for address in NODE_ADDRESSES])
        made.helper(WORLD).serve([("TCP", PORT), ("UDP", PORT)], [*WORLD_LINK, "172.31.254.2"])
        yield made


@pytest.fixture(params=["bpf", "iptables"])
def engine(lab: Lab, request: pytest.FixtureRequest) -> str:
    switch(lab, request.param)
    return str(request.param)


def switch(lab: Lab, name: str) -> None:
    lab.request("POST", "/v1/plugins/switch", {"kind": "masquerade", "name": name})


def wait_for(condition: Any, text: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


def inside(lab: Lab, place: str, *command: str) -> str:
    return run(*netns.inside(lab.namespace_of(place)), *command)


def probe(lab: Lab, protocol: str, address: str, port: int | None, place: str = POD) -> dict[str, Any]:
    request = {"id": uuid.uuid4().int % 65536, "protocol": protocol, "address": address, "port": port}
    (result,) = lab.helper(place).probe([{**request, "source": None, "timeout": 3.0}], 10.0)
    return result


def nat_list(lab: Lab, *options: str) -> list[dict[str, Any]]:
    """`ciliate bpf nat list`, which asks no agent."""
    pins = lab.directory.bpf_dir
    done = CliRunner().invoke(command, ["--bpf-root", str(pins), "nat", "list", "-o", "json", *options])
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.output)
    return found


@pytest.mark.parametrize("number", [0, 1], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_the_world_sees_the_nodes_address(lab: Lab, engine: str, protocol: str, number: int) -> None:
    result = probe(lab, protocol, WORLD_LINK[number], PORT)
    assert (result["reached"], result["who"]) == (True, WORLD), result
    assert result["saw"].removeprefix("::ffff:") == NODE_ADDRESSES[number]


@pytest.mark.parametrize("number", [0, 1], ids=["ipv4", "ipv6"])
def test_ping_is_answered(lab: Lab, engine: str, number: int) -> None:
    assert probe(lab, "ICMP", WORLD_LINK[number], None)["reached"]


def test_nat_list_shows_who_is_behind_a_port(lab: Lab) -> None:
    switch(lab, "bpf")
    for number in (0, 1):
        for protocol, port in (("TCP", PORT), ("UDP", PORT), ("ICMP", None)):
            assert probe(lab, protocol, WORLD_LINK[number], port)["reached"]
    addresses = set(lab.state.pods[POD].addresses)
    found = {
        (item["protocol"], item["node"].split()[0], item["peer"]): item
        for item in nat_list(lab)
        if item["source"].split()[0] in addresses
    }
    for number, echo in ((0, "ICMP"), (1, "ICMPv6")):
        for protocol, port in (("TCP", PORT), ("UDP", PORT), (echo, 0)):
            item = found[protocol, NODE_ADDRESSES[number], f"{WORLD_LINK[number]} {port}"]
            assert item["age"] < 60 and item["idle"] < 60


def pings(lab: Lab, address: str) -> subprocess.Popen[str]:
    command = [*netns.inside(lab.namespace_of(POD)), "ping", "-i", "0.01", "-q", "-W", "2", address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lost_pings(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Sent and lost, once the flood was ended."""
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=PATIENCE)[0]
    sent, received = map(int, re.search(r"(\d+) packets transmitted, (\d+) received", text).groups())  # type: ignore[union-attr]
    return sent, sent - received


@contextlib.contextmanager
def undisturbed(lab: Lab) -> Iterator[Callable[[], None]]:
    """A transfer, datagrams, pings and new flows in both families, of which nothing may be lost.

    Gives what waits until every flow got further.
    """
    pod, world = (netns.path(lab.namespace_of(place)) for place in (POD, WORLD))
    port = HIGH + 1
    server = EchoServer(world, port)
    flows = [kind(pod, address, port) for address in WORLD_LINK for kind in (TcpStream, UdpFlow, NewFlows)]
    floods = [pings(lab, address) for address in WORLD_LINK]
    progress(flows)
    try:
        yield lambda: progress(flows)
        progress(flows)
    finally:
        lost = {flow.name: flow.stop() for flow in flows}
        echoes = [lost_pings(flood) for flood in floods]
        server.stop()
    assert not any(lost.values()), lost
    for sent, missing in echoes:
        # the last one may be under way when the flood is ended
        assert sent > 50 and missing <= 1, echoes


def progress(flows: list[Any]) -> None:
    """Every flow gets further."""
    before = [flow.records for flow in flows]
    wait_for(
        lambda: all(flow.records > count + 3 for flow, count in zip(flows, before, strict=True)), "a flow stands still"
    )


@pytest.mark.parametrize("names", [("bpf", "iptables"), ("iptables", "bpf")], ids="-".join)
def test_a_switch_and_back_loses_no_packet(lab: Lab, names: tuple[str, str]) -> None:
    switch(lab, names[0])
    with undisturbed(lab) as further:
        for name in (names[1], names[0], names[1]):
            switch(lab, name)
            further()
            text = str(lab.request("GET", "/v1/healthz?detail=true"))
            assert f"{name} on uplink" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_agent_that_goes_and_comes_back_loses_no_packet(lab: Lab, engine: str, number: signal.Signals) -> None:
    lab.state.options["masquerade"] = engine
    with undisturbed(lab) as further:
        lab.stop_agent(number)
        further()
        lab.start_agent()
        further()


def test_a_configuration_with_another_engine_serves_the_flows_of_the_last_one(lab: Lab) -> None:
    switch(lab, "bpf")
    with undisturbed(lab):
        for name in ("iptables", "bpf"):
            lab.stop_agent()
            lab.state.options["masquerade"] = name
            lab.start_agent()


def test_a_listener_of_the_node_on_a_high_port_stays_reachable(lab: Lab) -> None:
    switch(lab, "bpf")
    lab.helper(NODE).serve([("TCP", HIGH), ("UDP", HIGH)], NODE_ADDRESSES)
    for address in NODE_ADDRESSES:
        for protocol in ("TCP", "UDP"):
            assert probe(lab, protocol, address, HIGH, WORLD)["who"] == NODE
    # and a pod that sends from the same port gets another one
    pod = netns.path(lab.namespace_of(POD))
    connection = make_socket(
        pod, lambda: socket.create_connection((WORLD_LINK[0], PORT), 5, (lab.state.pods[POD].addresses[0], HIGH))
    )
    with connection:
        connection.sendall(b"?\n")
        assert json.loads(connection.recv(1000))["saw"].endswith(NODE_ADDRESSES[0])
    (item,) = [item for item in nat_list(lab) if item["source"].endswith(f" {HIGH}") and item["protocol"] == "TCP"]
    assert not item["node"].endswith(f" {HIGH}")


def test_two_pods_with_one_port_to_one_remote(lab: Lab, engine: str) -> None:
    def connect(place: str) -> socket.socket:
        # below those that the kernel chooses from: one of an earlier connection may be it
        source = (lab.state.pods[place].addresses[0], 23333 + (engine == "bpf"))
        made: socket.socket = socket.create_connection((WORLD_LINK[0], PORT), 5, source)
        return made

    connections = [
        make_socket(netns.path(lab.namespace_of(place)), lambda place=place: connect(place))  # type: ignore[misc]
        for place in (POD, "default/second")
    ]
    for connection in connections:
        with connection:
            connection.sendall(b"?\n")
            assert json.loads(connection.recv(1000))["who"] == WORLD


SERVICE = 30080


@contextlib.contextmanager
def services(lab: Lab, ports: list[int]) -> Iterator[None]:
    """Node ports on both of the node's addresses, with a pod behind them."""
    backends = {address.count(":") > 0: address for address in lab.state.pods["default/second"].addresses}
    lab.helper("default/second").serve([("TCP", PORT), ("UDP", PORT)], list(backends.values()))
    specs = [
        {
            "frontend-address": {"ip": address, "port": port, "protocol": protocol},
            "backend-addresses": [{"ip": backends[":" in address], "port": PORT}],
            "type": "NodePort",
        }
        for address in NODE_ADDRESSES
        for port in ports
        for protocol in ("TCP", "UDP")
    ]
    lab.request("PUT", "/v1/service", {"services": specs})
    try:
        yield
    finally:
        lab.request("DELETE", "/v1/service?all=true")


def asked_from(lab: Lab, place: str, number: int, protocol: str, port: int) -> str:
    """Who answers what is asked from a port; raises TimeoutError where nobody does."""
    source = (NODE_ADDRESSES if place == NODE else lab.state.pods[place].addresses)[number]
    kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if number else socket.AF_INET, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.settimeout(5)
        made.bind((source, port))
        made.connect((WORLD_LINK[number], PORT))
        return made

    with make_socket(netns.path(lab.namespace_of(place)), make) as asking:
        asking.sendall(b"?\n")
        who: str = json.loads(asking.recv(1000))["who"]
        return who


@pytest.mark.parametrize("number", [0, 1], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("place", [POD, NODE])
def test_a_flow_from_the_port_of_a_service_gets_its_answers(
    lab: Lab, engine: str, place: str, protocol: str, number: int
) -> None:
    with services(lab, [SERVICE, 41000]):
        if engine == "iptables":
            # the rules follow the services
            wait_for(lambda: ":32768-40999" in rules(lab), "a range of ports without the services'")
        for port in (SERVICE, 41000):
            assert asked_from(lab, place, number, protocol, port) == WORLD
        for port in (SERVICE, 41000):
            assert probe(lab, protocol, NODE_ADDRESSES[number], port, WORLD)["who"] == "default/second"


def test_the_node_chooses_no_port_of_a_service_for_its_sockets(lab: Lab) -> None:
    def reserved() -> str:
        return inside(lab, NODE, "cat", "/proc/sys/net/ipv4/ip_local_reserved_ports").strip()

    set_reserved = ["sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=45000"]
    inside(lab, NODE, *set_reserved)
    with services(lab, [SERVICE, 41000]):
        wait_for(lambda: reserved() == "41000,45000", "the port is kept from sockets, and others' stay")
        lab.stop_agent(signal.SIGKILL)
        lab.start_agent()
        assert reserved() == "41000,45000"
    wait_for(lambda: reserved() == "45000", "as it was")


def test_a_pod_that_uses_up_its_share_is_named_and_others_go_on(lab: Lab) -> None:
    """A datagram to every port of many addresses: more flows than one pod may have, each of another tuple."""
    switch(lab, "bpf")
    source = lab.state.pods[POD].addresses[0]

    def flood() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setblocking(False)
        for number in range(66_000 + 4_000):
            with contextlib.suppress(BlockingIOError):
                made.sendto(b"", (f"198.18.{number >> 15}.77", 1 + (number & 0x7FFF)))
        return made

    with undisturbed(lab), make_socket(netns.path(lab.namespace_of("default/second")), flood):
        text = ""

        def named() -> bool:
            nonlocal text
            text = str(lab.request("GET", "/v1/healthz?detail=true"))
            return "default/second" in text and "used up its share" in text

        wait_for(named, "status names the pod")
        samples = {
            (item["name"], item["labels"].get("pod")): item["value"] for item in lab.request("GET", "/v1/metrics")
        }
        assert samples["ciliate_masquerade_pod_refused_total", "default/second"] > 0
        assert samples["ciliate_masquerade_pod_share", "default/second"] > 0.5
        assert probe(lab, "TCP", WORLD_LINK[0], PORT)["reached"]
    assert f"{POD} ({source}) used up" not in text, "nobody else is named"
    (flooded, _) = lab.state.pods["default/second"].addresses
    done = CliRunner().invoke(command, ["--bpf-root", str(lab.directory.bpf_dir), "nat", "flush", "--source", flooded])
    assert done.exit_code == 0, done.output


def test_mappings_end_with_the_pod_that_had_the_address(lab: Lab, engine: str) -> None:
    """Answers of a server must not find whoever gets the address next."""
    populate(lab, loads(MANIFESTS.partition("---")[0].replace("talker", f"brief-{engine}"), "brief"))
    place = f"default/brief-{engine}"
    own = set(lab.state.pods[place].addresses)
    for number, protocol in itertools.product((0, 1), ("TCP", "UDP")):
        assert asked_from(lab, place, number, protocol, 40123) == WORLD

    def mapped() -> set[str]:
        if engine == "bpf":
            return own & {item["source"].split()[0] for item in nat_list(lab)}
        with namespace(netns.path(lab.namespace_of(NODE))) as node:
            flows = in_netns(node, lambda: list(kernelct.flows()))
        return own & {str(flow.original.source) for flow in flows if flow.translated}

    assert mapped() == own
    lab.remove_pods([place])
    wait_for(lambda: not mapped(), "the mappings of the pod that went")


def rules(lab: Lab) -> str:
    return inside(lab, NODE, "iptables-save", "-t", "nat") + inside(lab, NODE, "ip6tables-save", "-t", "nat")


def test_the_rules_of_others_stay_and_ours_are_put_back(lab: Lab) -> None:
    theirs = ["-t", "nat", "-A", "POSTROUTING", "-s", "192.0.2.0/24", "-j", "ACCEPT"]
    inside(lab, NODE, "iptables", *theirs)
    switch(lab, "iptables")
    wanted = rules(lab)
    assert "CILIATE-MASQ" in wanted and "192.0.2.0/24" in wanted
    inside(lab, NODE, "iptables", "-t", "nat", "-F", "CILIATE-MASQ")
    inside(lab, NODE, "ip6tables", "-t", "nat", "-F", "POSTROUTING")
    wait_for(lambda: "--to-source" in inside(lab, NODE, "iptables-save", "-t", "nat"), "ours")
    wait_for(lambda: "-j CILIATE-MASQ" in inside(lab, NODE, "ip6tables-save", "-t", "nat"), "the jump")
    switch(lab, "bpf")
    assert "--to-source" not in rules(lab)
    assert "192.0.2.0/24" in rules(lab)


def test_the_address_of_the_node_changes(lab: Lab) -> None:
    switch(lab, "bpf")
    another = "172.31.255.1"
    node, world = (lab.namespace_of(place) for place in (NODE, WORLD))
    assert probe(lab, "TCP", WORLD_LINK[0], PORT)["reached"]
    ip_batch(node, ["address add 172.31.254.1/30 dev uplink", f"address del {another}/30 dev uplink"])
    ip_batch(world, ["address add 172.31.254.2/30 dev eth0"])
    try:
        follows(lab, "172.31.254.1")
        result = probe(lab, "TCP", "172.31.254.2", PORT)
        assert (result["reached"], result["saw"].removeprefix("::ffff:")) == (True, "172.31.254.1")
        assert not [item for item in nat_list(lab) if item["node"].startswith(f"{another} ")]
    finally:
        ip_batch(node, [f"address add {another}/30 dev uplink", "address del 172.31.254.1/30 dev uplink"])
        ip_batch(node, [f"route replace default via {WORLD_LINK[0]}"])
        follows(lab, another)
    assert probe(lab, "TCP", WORLD_LINK[0], PORT)["saw"].removeprefix("::ffff:") == another


def follows(lab: Lab, address: str) -> None:
    """The engine masquerades with this address."""
    wait_for(lambda: f"bpf on uplink ({address}" in str(lab.request("GET", "/v1/healthz?detail=true")), address)


def test_nothing_is_left_after_the_last_flow() -> None:
    """In a lab without services, which have the same program on the uplink once there were any."""
    with new_lab("left", loads(MANIFESTS, "masquerade"), options={"masquerade": "bpf"}) as lab:
        lab.helper(WORLD).serve([("TCP", PORT)], WORLD_LINK)
        assert all(reached(lab.helper(POD), [address], PORT, PATIENCE) == [True] for address in WORLD_LINK)
        switch(lab, "iptables")
        switch(lab, "none")
        pins: Path = lab.directory.bpf_dir
        for address in lab.state.pods[POD].addresses:
            CliRunner().invoke(command, ["--bpf-root", str(pins), "nat", "flush", "--source", address])

        def clean() -> bool:
            names = {path.name for path in pins.rglob("*")}
            return not {name for name in names if "snat" in name or "masq" in name or "netdev" in name}

        wait_for(clean, "pins of masquerading")
        assert "bpf" not in inside(lab, NODE, "tc", "filter", "show", "dev", "uplink", "ingress")
