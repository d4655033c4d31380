"""Two nodes in every routing mode: policy, services, entities, the wire, faults. Tier modes runs every scenario."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import pytest

from ciliate import atomicfile
from ciliate.lab import netns, underlay, world
from ciliate.lab.changes import populate
from ciliate.lab.lab import Lab
from ciliate.lab.placement import Shape
from ciliate.lab.propagation import ipcache_of, wait_propagated
from ciliate.lab.scenario import run_files
from ciliate.lab.traffic import TcpStream, Traffic
from ciliate.manifest import loads

LEASE = 2.0
PORT = 8090
PATIENCE = 30.0
OUTER_PORT = {"vxlan": 8472, "geneve": 6081}


def pod(name: str, node: str, app: str) -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: c}}]}}
---"""


# server (node1) is the subject of ingress, sender (node2) of egress; each has a friend and a stranger at either node
SCENARIO = (
    "".join(
        pod(*item)
        for item in [
            ("server", "node1", "server"),
            ("near", "node1", "friend"),
            ("far", "node2", "friend"),
            ("stranger", "node2", "stranger"),
            ("sender", "node2", "sender"),
        ]
    )
    + """
apiVersion: v1
kind: Pod
metadata: {name: daemon, labels: {app: daemon}}
spec: {nodeName: node2, hostNetwork: true, containers: [{name: c, image: c}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: friend}}]
    toPorts:
    - ports:
      - {port: "8080", protocol: ANY}
      - {port: "8090", protocol: ANY}
      - {port: "8", protocol: ICMP}
      - {port: "128", protocol: ICMPv6}
  - fromEndpoints: [{matchLabels: {app: sender}}]
  - fromEntities: [world]
    toPorts: [{ports: [{port: "82", protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: sender, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: sender}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts: [{ports: [{port: "8080", protocol: ANY}]}]
  - toEntities: [world]
    toPorts: [{ports: [{port: "53", protocol: UDP}]}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  selector: {app: server}
  ports:
  - {name: tcp, port: 80, targetPort: 8080, nodePort: 30080}
  - {name: udp, port: 80, targetPort: 8080, nodePort: 30080, protocol: UDP}
  - {name: open, port: 82, targetPort: 82, nodePort: 30082}
---
apiVersion: ciliate.io/v1alpha1
kind: Expectation
spec:
  flows:
  - {from: default/far, to: default/server, port: 8080, protocol: TCP, verdict: allow}
  - {from: default/far, to: default/server, port: 8080, protocol: UDP, verdict: allow}
  - {from: default/far, to: default/server, protocol: ICMP, verdict: allow}
  - {from: default/far, to: default/server, protocol: ICMPv6, verdict: allow}
  - {from: default/far, to: default/server, port: 8081, protocol: TCP, verdict: deny}
  - {from: default/far, to: default/server, port: 8081, protocol: UDP, verdict: deny}
  - {from: default/near, to: default/server, port: 8080, protocol: TCP, verdict: allow}
  - {from: default/stranger, to: default/server, port: 8080, protocol: TCP, verdict: deny}
  - {from: default/stranger, to: default/server, port: 8080, protocol: UDP, verdict: deny}
  - {from: default/stranger, to: default/server, protocol: ICMP, verdict: deny}
  - {from: default/stranger, to: default/server, protocol: ICMPv6, verdict: deny}
  - {from: default/sender, to: default/server, port: 8080, protocol: TCP, verdict: allow}
  - {from: default/sender, to: default/server, port: 8081, protocol: UDP, verdict: deny}
  - {from: default/sender, to: default/near, port: 8080, protocol: TCP, verdict: deny}
  - {from: default/sender, to: default/far, port: 8080, protocol: UDP, verdict: deny}
  - {from: default/sender, to: entity/world, port: 53, protocol: UDP, verdict: allow}
  - {from: default/sender, to: entity/world, port: 53, protocol: TCP, verdict: deny}
  - {from: default/sender, to: entity/host, port: 80, protocol: TCP, verdict: deny}
  - {from: default/far, to: entity/host, port: 80, protocol: TCP, verdict: allow}
  - {from: entity/host, to: default/server, port: 81, protocol: TCP, verdict: allow}
  - {from: entity/host, to: default/server, port: 8080, protocol: UDP, verdict: allow}
  - {from: entity/world, to: default/server, port: 82, protocol: TCP, verdict: allow}
  - {from: entity/world, to: default/server, port: 81, protocol: TCP, verdict: deny}
  - {from: default/stranger, to: default/daemon, port: 80, protocol: TCP, verdict: allow}
  - {from: default/near, to: default/daemon, port: 80, protocol: UDP, verdict: allow}
  - {from: default/far, to: service/default/web, port: 80, protocol: TCP, verdict: allow}
  - {from: default/far, to: service/default/web, port: 80, protocol: UDP, verdict: allow}
  - {from: default/stranger, to: service/default/web, port: 80, protocol: TCP, verdict: deny}
  - {from: default/sender, to: service/default/web, port: 80, protocol: UDP, verdict: allow}
  - {from: default/far, to: entity/host, port: 30080, protocol: TCP, verdict: allow}
  - {from: default/far, to: entity/host, port: 30080, protocol: UDP, verdict: allow}
  - {from: entity/world, to: entity/host, port: 30082, protocol: TCP, verdict: allow}
  - {from: entity/world, to: entity/host, port: 30080, protocol: TCP, verdict: deny}
"""
)


@pytest.fixture(scope="module", params=["disabled", "vxlan", "geneve"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    name = f"m{os.getpid()}-{uuid.uuid4().hex[:5]}"
    shape = Shape(nodes=2, kvstore="etcd", tunnel=request.param)
    try:
        yield Lab.create(name, options={"kvstore-lease-ttl": f"{LEASE}s"}, shape=shape)
    finally:
        assert Lab.take_down(name, force=True) == []
        assert netns.named(f"cl-{name}.") == []


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


def test_policy_services_and_entities_between_two_nodes(lab: Lab, tmp_path: Path) -> None:
    """Its pods stay for the tests below."""
    file = tmp_path / "modes.yaml"
    file.write_text(SCENARIO)
    report = run_files([file], lab.state.name)
    (result,) = report.results
    assert [str(item) for item in result.flows if not item.good] == []
    assert (len(result.flows), report.skipped) == (33, [])
    lab.state = lab.directory.load()
    # another node itself is the world
    probes = [
        {"id": port, "protocol": "TCP", "address": address, "port": port, "source": None, "timeout": 0.5}
        for port in (81, 82)
        for address in lab.state.pods["default/server"].addresses
    ]
    assert [answer["reached"] for answer in lab.helper("node2").probe(probes, 10)] == [False, False, True, True]


def identities(lab: Lab) -> dict[str, int]:
    """The identity of each pod's address, as `ciliate endpoint list` of its node says."""
    found = {}
    for node in lab.nodes:
        command = [sys.executable, "-m", "ciliate.cli.main", "-H", str(lab.directory.node(node).api_socket)]
        listed = subprocess.run([*command, "endpoint", "list", "-o", "json"], capture_output=True, check=True).stdout
        for status in (item["status"] for item in json.loads(listed)):
            for pair in status["networking"]["addressing"]:
                found.update({text: status["identity"]["id"] for text in pair.values() if text})
    return found


@contextlib.contextmanager
def tcpdump(lab: Lab, node: str, expression: str, file: Path) -> Iterator[None]:
    """Write what tcpdump prints of a node's uplink to a file, as it comes; VXLAN's port has to be told."""
    kind = ["-T", "vxlan"] if lab.state.tunnel == "vxlan" else []
    line = ["tcpdump", "-lnnt", "--immediate-mode", "-i", world.NODE_DEVICE, *kind, expression]
    command = [*netns.inside(lab.directory.namespace(node)), *line]
    with (
        file.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as running,
    ):
        assert running.stderr is not None
        try:
            while "listening on" not in running.stderr.readline():
                assert running.poll() is None
            yield
        finally:
            running.kill()


# what tcpdump prints of an outer packet, and of an echo inside it or alone
OUTER = re.compile(
    r"IP6? (\S+)\.\d+ > (\S+)\.\d+: .*?(?:VXLAN, flags \[I\] \(0x08\)|Geneve, Flags \[none\]), vni (\w+)"
)
INNER = re.compile(r"IP6? (\S+) > (\S+): ICMP6?,? echo re(?:quest|ply)")


def test_tcpdump_reads_the_senders_identity_in_the_tunnel_key(lab: Lab, tmp_path: Path) -> None:
    """Of each family an echo request and its answer, on the uplink inside the node's namespace."""
    port, file = OUTER_PORT.get(lab.state.tunnel), tmp_path / "printed"
    ends = [lab.state.pods[f"default/{name}"].addresses for name in ("far", "server")]
    homes = {text: node for node, own in zip(("node2", "node1"), ends, strict=True) for text in own}
    ways = [way for pair in zip(*ends, strict=True) for way in (pair, pair[::-1])]
    with tcpdump(lab, "node2", f"udp port {port}" if port else "icmp or icmp6", file):
        for source, target in ways[::2]:
            probe = {"id": 7, "protocol": "ICMP", "address": target, "port": None, "source": source, "timeout": 5.0}
            assert lab.helper("default/far").probe([probe], PATIENCE)[0]["reached"]
        until(lambda: len(echoes(file.read_text(), homes)) == len(ways), "tcpdump prints them all")
    numbers = identities(lab)
    for (outer, *way), expected in zip(echoes(file.read_text(), homes), ways, strict=True):
        nodes = [underlay.addresses(homes[end])[0] for end in expected]
        assert (outer, *way) == ((*nodes, numbers[expected[0]]) if port else None, *expected), file.read_text()


def echoes(text: str, ends: Container[str]) -> list[tuple[tuple[str, str, int] | None, str, str]]:
    """Each echo between these that tcpdump printed: nodes and VNI of the packet around it, source, target."""
    seen = []
    outer = None
    for line in text.splitlines():
        if found := OUTER.search(line):
            outer = (found[1], found[2], int(found[3], 0))
        if found := INNER.search(line):
            seen.append((outer, found[1], found[2]))
            outer = None
    return [item for item in seen if item[1] in ends and item[2] in ends]


def across(lab: Lab) -> Traffic:
    if "default/server" not in lab.state.pods:  # this test runs alone
        populate(lab, [item for item in loads(SCENARIO) if item.object["kind"] not in ("Service", "Expectation")])
    places = (netns.path(lab.namespace_of(name)) for name in ("server", "far", "stranger"))
    return Traffic(*places, lab.state.pods["default/server"].addresses, PORT)


def harmless(flows: Traffic) -> None:
    """No allowed packet was lost and no denied one answered while the flows ran."""
    lost, through = flows.stop()
    assert {name: count for name, count in lost.items() if count} == {}
    assert {name: count for name, count in through.items() if count} == {}


def test_agents_are_killed_and_pods_come_and_go_under_traffic(lab: Lab) -> None:
    flows = across(lab)
    for node in lab.nodes:
        lab.stop_agent(signal.SIGKILL, node)
    for node in lab.nodes:
        lab.begin_agent(node)
    new = [item.object for item in loads(pod("late", "node2", "friend") + pod("later", "node1", "other"))]
    lab.add_pods(new)
    wait_propagated(lab)
    late = set(lab.state.pods["default/late"].addresses)
    assert late <= addresses(lab, "node1")
    lab.remove_pods(["default/late", "default/later"])
    until(lambda: not late & addresses(lab, "node1"), "node1 forgets the pod")
    harmless(flows)


def addresses(lab: Lab, node: str) -> set[str]:
    return {prefix.partition("/")[0] for prefix in ipcache_of(lab, node)}


def healthy(lab: Lab, node: str) -> bool:
    parts = lab.request("GET", "/v1/healthz?detail=true", node=node)["parts"]
    return all(item["state"] == "ok" for item in parts if item["name"] == "cluster")


@pytest.mark.parametrize("lab", ["vxlan"], indirect=True)
def test_a_node_that_is_late_is_not_forgotten_by_one_that_never_wrote_it_down(lab: Lab) -> None:
    """Both agents are killed before this node's file has the other one, and are away for longer than their leases."""
    flows = across(lab)
    for node in lab.nodes:
        lab.stop_agent(signal.SIGKILL, node)
    file = lab.directory.node("node1").state_dir / "nodes.json"
    known = atomicfile.read_json(file)
    known.pop("default/node2", None)  # where the agent came to write it down
    atomicfile.write_json(file, known)
    time.sleep(2 * LEASE)  # etcd itself counts these seconds
    lab.start_agent("node1")
    until(lambda: compared(lab, "node1"), "node1 compares its maps with the store")
    lab.start_agent("node2")
    until(lambda: all(healthy(lab, node) for node in lab.nodes), "all is as before")
    harmless(flows)


def compared(lab: Lab, node: str) -> bool:
    """Whether the agent has heard the store and made its maps equal to what it says."""
    listed = lab.request("GET", "/v1/healthz?detail=true", node=node)["controllers"]
    duties = {item["name"]: item for item in listed}
    settled, last = duties["cluster-settle"], duties["node-sync"]
    return bool(settled["success_count"]) and last["last_success"] >= settled["last_success"]


@pytest.mark.parametrize("lab", ["vxlan"], indirect=True)
def test_a_cable_is_out_for_longer_than_the_lease(lab: Lab) -> None:
    """Connections go on afterwards, and what is denied stays so. test_cluster.py has it for nodes without tunnel."""
    known = {node: ipcache_of(lab, node) for node in lab.nodes}
    flows = across(lab)
    streams = [flow for flow in flows.allowed if isinstance(flow, TcpStream)]
    until(lambda: all(flow.records for flow in streams), "connections are there")
    underlay.set_link(lab.directory, "node2", up=False)
    try:
        until(lambda: not healthy(lab, "node1"), "node1 misses node2's lease")
        assert {node: ipcache_of(lab, node) for node in lab.nodes} == known
    finally:
        underlay.set_link(lab.directory, "node2", up=True)
    sent = [flow.records for flow in streams]
    until(lambda: all(healthy(lab, node) for node in lab.nodes), "all is as before")
    assert {node: ipcache_of(lab, node) for node in lab.nodes} == known
    until(lambda: all(flow.records > before for flow, before in zip(streams, sent, strict=True)), "connections go on")
    _, through = flows.stop()
    assert not any(through.values()), through
