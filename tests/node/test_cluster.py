"""Three nodes that share an etcd: what each knows of the others, and what losses of agents, store and links do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cni_harness import reached
from lab_harness import ciliate

from ciliate.datapath.compiler import find_clang
from ciliate.lab import etcd, netns, underlay
from ciliate.lab.changes import populate
from ciliate.lab.command import run
from ciliate.lab.errors import LabError
from ciliate.lab.etcdserver import any_binary
from ciliate.lab.lab import Lab
from ciliate.lab.manifests import sort_documents
from ciliate.lab.placement import Shape
from ciliate.lab.propagation import ipcache_of, pods_of, wait_propagated
from ciliate.lab.traffic import PACE, Traffic, make_socket
from ciliate.manifest import loads

LEASE = 2.0
OPTIONS = ",".join(f"{client}.address={etcd.ADDRESS},{client}.timeout=2" for client in ("etcd", "etcd3"))
"""Both clients, so that agents can change over."""
PORT, OTHER_PORT = 8080, 8081
PATIENCE = 30.0


def pod(name: str, node: str, role: str) -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{role: {role}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: c}}]}}
---"""


PODS = [
    ("server1", "node1", "server"),
    ("client1", "node1", "client"),
    ("other1", "node1", "other"),
    ("client2", "node2", "client"),
    ("other2", "node2", "other"),
    ("server3", "node3", "server"),
    ("client3", "node3", "client"),
    ("other3", "node3", "other"),
]
POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: servers}
spec:
  podSelector: {matchLabels: {role: server}}
  ingress: [{from: [{podSelector: {matchLabels: {role: client}}}]}]
"""
VAULTS = """---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: vaults}
spec:
  endpointSelector: {matchLabels: {role: server}}
  ingress: [{fromEndpoints: [{matchLabels: {"reserved:vault": ""}}]}]
"""
MANIFESTS = "".join(pod(*item) for item in PODS) + POLICY + VAULTS
ASSIGNED = """
kind: Pod
metadata: {name: dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec: {nodeName: node2, serviceAccountName: coredns, containers: [{name: c, image: c}]}
---
kind: Pod
metadata: {name: vault, labels: {role: new-to-everybody, io.cilium.fixed-identity: vault}}
spec: {nodeName: node2, containers: [{name: c, image: c}]}
"""
NUMBERS = {"kube-system/dns": 112, "default/vault": 128}
"""112: core-dns in a namespace that carries its own name."""


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file: the time of day of every agent is as many seconds ahead as it says."""
    directory = tmp_path_factory.mktemp("clock")
    library, ahead = directory / "clock.so", directory / "ahead"
    source = Path(__file__).with_name("clock.c")
    run(find_clang()[0], "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(source))
    ahead.write_text("0")
    with pytest.MonkeyPatch.context() as preloaded:
        preloaded.setenv("CLOCK_AHEAD", str(ahead))
        preloaded.setenv("LD_PRELOAD", str(library))
        yield ahead


@pytest.fixture(scope="module")
def lab(clock: Path) -> Iterator[Lab]:
    name = f"c{os.getpid()}-{uuid.uuid4().hex[:5]}"
    try:
        options = {"kvstore-lease-ttl": f"{LEASE}s", "fixed-identity-mapping": "128=vault", "kvstore-opt": OPTIONS}
        options["address-reuse-grace"] = "1s"
        made = Lab.create(name, options=options, shape=Shape(nodes=3, kvstore="etcd", tunnel="disabled"))
        populate(made, loads(MANIFESTS, "cluster.yaml"))
        yield made
    finally:
        assert Lab.take_down(name, force=True) == []
        assert netns.named(f"cl-{name}.") == []


def traffic(lab: Lab, server: str, allowed: str, denied: str) -> Traffic:
    server_pod = lab.state.pods[f"default/{server}"]
    places = (netns.path(lab.state.pods[f"default/{name}"].netns) for name in (server, allowed, denied))
    return Traffic(*places, server_pod.addresses, PORT)


def harmless(flows: Traffic) -> None:
    """No allowed packet was lost and no denied one answered while the flows ran."""
    lost, through = flows.stop()
    assert {name: count for name, count in lost.items() if count} == {}
    assert {name: count for name, count in through.items() if count} == {}


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


def part(lab: Lab, node: str, name: str) -> dict[str, str]:
    parts = lab.request("GET", "/v1/healthz?detail=true", node=node)["parts"]
    found: dict[str, str] = next(item for item in parts if item["name"] == name)
    return found


def add_pods(lab: Lab, manifests: str) -> None:
    """As an orchestrator does: everybody is told of the pods, and they are made."""
    told = sort_documents(loads(manifests, "later.yaml"))
    lab.everywhere("PUT", "/v1/workloads", {"objects": told.workloads(told)})
    lab.add_pods(list(told.pods.values()))


def identities(lab: Lab, node: str) -> dict[str, int]:
    """Pods of a node with the numbers of their identities."""
    status = [document["status"] for document in lab.request("GET", "/v1/endpoint", node=node)]
    return {item["external-identifiers"]["pod-name"]: item["identity"]["id"] for item in status}


def routes(lab: Lab, node: str) -> set[str]:
    namespace = lab.directory.namespace(node)
    shown = [run("ip", "-n", namespace, "-j", family, "route", "show", "proto", "193") for family in ("-4", "-6")]
    found = [json.loads(text) if text.strip() else [] for text in shown]
    return {item["dst"] for family in found for item in family}


def test_every_node_knows_every_other_and_its_pods(lab: Lab) -> None:
    for node in lab.nodes:
        listed = json.loads(ciliate(lab, "node", "list", "-o", "json", node=node).stdout)
        assert {item["name"] for item in listed} == set(lab.nodes)
        assert [item["name"] for item in listed if item["local"]] == [node]
        assert {item["problem"] for item in listed} == {""}
        others = [other for other in lab.nodes if other != node]
        assert routes(lab, node) == {text for other in others for text in underlay.pod_ranges(other)}
        assert part(lab, node, "cluster")["state"] == "ok"
    table = ciliate(lab, "node", "list", node="node2").stdout
    assert "node2 (this node)" in table and "10.200.3.0/24" in table
    assert ciliate(lab, "node", "get", "node9", node="node1").returncode == 1
    wait_propagated(lab)


def test_policy_holds_between_nodes_while_an_agent_restarts(lab: Lab) -> None:
    flows = traffic(lab, "server1", "client2", "other2")
    before = {node: ipcache_of(lab, node) for node in ("node2", "node3")}
    lab.stop_agent(signal.SIGKILL)
    lab.start_agent()
    wait_propagated(lab)
    harmless(flows)
    assert {node: ipcache_of(lab, node) for node in before} == before


def test_ip_blocks_tell_pods_of_equal_labels_apart(lab: Lab) -> None:
    """All clients have one identity; one may come by IPv4, one by IPv6, one not at all."""
    clients = [f"default/client{number}" for number in (1, 2, 3)]
    second, third = (lab.state.pods[name].addresses for name in clients[1:])
    blocks = [f"{second[0]}/32", f"{third[1]}/128"]
    around = [{"cidr": "10.0.0.0/8", "except": [f"{lab.state.pods[name].addresses[0]}/32" for name in clients]}]
    peers = [{"ipBlock": block} for block in [*({"cidr": cidr} for cidr in blocks), *around]]
    spec = {"podSelector": {"matchLabels": {"role": "other"}}, "ingress": [{"from": peers}]}
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "blocks"},
        "spec": spec,
    }
    lab.everywhere("PUT", "/v1/policy", {"documents": [{"object": policy}]})
    other = lab.state.pods["default/other1"]
    lab.helper("default/other1").serve([("TCP", PORT)], other.addresses)

    def reach() -> list[list[bool]]:
        return [reached(lab.helper(name), other.addresses, PORT, 0.5) for name in clients]

    assert reach() == [[False, False], [True, False], [False, True]]
    ends = ["--src-k8s-pod", "client1", "--dst-k8s-pod", "other1", "--dport", f"{PORT}/TCP"]
    assert "isolated by NetworkPolicy default/blocks" in ciliate(lab, "policy", "trace", *ends, node="node1").stdout
    counted = json.loads(ciliate(lab, "policy", "counters", "-o", "json", node="node1").stdout)
    assert {row["place"] for row in counted if row["packets"] and "default/blocks" in row["rule"]} == set(blocks)
    lab.stop_agent(signal.SIGKILL)
    lab.start_agent()
    assert reach() == [[False, False], [True, False], [False, True]]
    lab.everywhere("DELETE", "/v1/policy?name=default/blocks")
    assert reach() == [[True, True]] * 3
    assert mapped(lab, "ciliate_place") == []


def mapped(lab: Lab, name: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = lab.request("GET", f"/v1/map/{name}")["cache"]
    return found


def test_without_the_store_everything_goes_on_and_new_pods_come_as_soon_as_it_is_back(lab: Lab) -> None:
    flows = traffic(lab, "server1", "client2", "other2")
    lab.stop_store()
    until(lambda: part(lab, "node2", "cluster")["state"] == "warning", "node2 sees that the store is away")
    # its labels have a number already, so nobody has to be asked
    add_pods(lab, pod("late", "node2", "client"))
    assert identities(lab, "node2")["default/late"] == identities(lab, "node2")["default/client2"]
    # nobody has heard of these label sets, and every node knows their numbers
    add_pods(lab, ASSIGNED)
    assert identities(lab, "node2").items() >= NUMBERS.items()
    packets = int(LEASE / PACE)
    until(lambda: all(flow.records > packets for flow in flows.denied), "a lease's time without the store")
    assert all(part(lab, node, "agent")["state"] == "ok" for node in lab.nodes)
    assert set(ipcache_of(lab, "node1")) >= set(pods_of(lab, "node3"))
    lab.start_store()
    wait_propagated(lab)
    harmless(flows)
    addresses = lab.state.pods["default/late"].addresses
    late = {prefix for prefix in ipcache_of(lab, "node1") if prefix.partition("/")[0] in addresses}
    assert late
    lab.remove_pods(["default/late", "kube-system/dns", "default/vault"])
    until(lambda: not late & ipcache_of(lab, "node1").keys(), "node1 forgets the pod")


def test_flows_of_a_pod_that_is_gone_end_on_every_node(lab: Lab) -> None:
    """Whoever has its address next has nothing to do with them."""
    add_pods(lab, pod("brief", "node2", "client"))
    brief = lab.state.pods["default/brief"]
    wait_propagated(lab)
    for address in lab.state.pods["default/server1"].addresses:
        sender = make_socket(netns.path(brief.netns), lambda address=address: udp_to(address))  # type: ignore[misc]
        with sender:
            sender.send(b"hello")

    def tracked(node: str) -> str:
        return str(lab.request("GET", "/v1/map/ciliate_ct_any?limit=100000", node=node)["cache"])

    def kept(node: str) -> list[str]:
        return [address for address in brief.addresses if address in tracked(node)]

    until(lambda: kept("node1") == kept("node2") == list(brief.addresses), "both nodes track the flows")
    lab.remove_pods(["default/brief"])
    until(lambda: kept("node1") == kept("node2") == [], "the flows end with the pod")


def udp_to(address: str) -> socket.socket:
    """A socket that is connected to a pod's port."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.connect((address, PORT))
    return made


def test_assigned_identities_are_those_of_every_node_and_outlast_the_agent(lab: Lab) -> None:
    add_pods(lab, ASSIGNED)
    wait_propagated(lab)
    flows = traffic(lab, "server1", "vault", "other2")
    lab.stop_agent(signal.SIGKILL, "node2")
    lab.start_agent("node2")
    assert identities(lab, "node2").items() >= NUMBERS.items()
    wait_propagated(lab)
    shown = ciliate(lab, "identity", "list", "reserved:vault", node="node3").stdout
    assert "128" in shown and "k8s:io.cilium.k8s.policy.cluster=default" in shown
    assert "k8s:k8s-app=kube-dns" in ciliate(lab, "identity", "get", "112", node="node3").stdout
    until(lambda: all(flow.records > 10 for flow in flows.allowed), "traffic of the pod with a fixed identity")
    harmless(flows)
    lab.remove_pods(["kube-system/dns", "default/vault"])


def test_a_node_cut_off_longer_than_its_lease_keeps_all_and_comes_back_by_delta(lab: Lab) -> None:
    wait_propagated(lab)
    near, inside = traffic(lab, "server1", "client2", "other2"), traffic(lab, "server3", "client3", "other3")
    known = {node: ipcache_of(lab, node) for node in lab.nodes}
    underlay.set_link(lab.directory, "node3", up=False)
    try:
        until(lambda: part(lab, "node1", "cluster")["state"] == "warning", "the others miss node3's lease")
        problem = next(item["problem"] for item in lab.request("GET", "/v1/node") if item["name"] == "node3")
        assert "kept" in problem
        assert {node: ipcache_of(lab, node) for node in lab.nodes} == known
        harmless(near)
        harmless(inside)
    finally:
        underlay.set_link(lab.directory, "node3", up=True)
    until(lambda: all(part(lab, node, "cluster")["state"] == "ok" for node in lab.nodes), "all is as before")
    assert {node: ipcache_of(lab, node) for node in lab.nodes} == known
    across = traffic(lab, "server1", "client3", "other3")
    until(lambda: all(flow.records > 10 for flow in across.allowed), "traffic of the node that is back")
    harmless(across)


# faults of the store, under traffic; node2 uses the library's client, changed over while it runs


def switch_over(lab: Lab, node: str) -> None:
    done = ciliate(lab, "plugins", "switch", "kvstore", "etcd3", node=node)
    assert done.returncode == 0, done.stderr


def store_process(lab: Lab) -> int:
    return next(process.pid for process in lab.state.processes if process.role == etcd.ROLE)


@contextlib.contextmanager
def paused(*pids: int) -> Iterator[None]:
    """Processes that stand still, as on a machine that swaps or was suspended."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def etcdctl(lab: Lab, *arguments: str) -> str:
    program = any_binary().with_name("etcdctl")
    inside = netns.inside(lab.directory.namespace(underlay.STORE))
    return run(*inside, "env", "ETCDCTL_API=3", str(program), f"--endpoints={etcd.ADDRESS}", *arguments)


def revision(lab: Lab) -> str:
    return str(json.loads(etcdctl(lab, "get", "x", "-w", "json"))["header"]["revision"])


def whole(lab: Lab) -> bool:
    """Every part of every agent is well, and every node has its keys in the store."""
    for node in lab.nodes:
        if any(part(lab, node, name)["state"] != "ok" for name in ("kvstore", "cluster", "agent")):
            return False
    keys = etcdctl(lab, "get", "--prefix", "--keys-only", "cilium/state/").split()
    addresses = sum(len(pods_of(lab, node)) for node in lab.nodes)
    nodes = [key for key in keys if "/nodes/" in key]
    return len(nodes) == len(lab.nodes) and sum("/ip/v1/" in key for key in keys) >= addresses


def lease_passes(flows: Traffic) -> None:
    packets = flows.denied[0].records + int(1.5 * LEASE / PACE)
    until(lambda: all(flow.records > packets for flow in flows.denied), "more than a lease's time")


def test_agents_change_over_to_the_other_client_while_they_run(lab: Lab) -> None:
    flows, before = traffic(lab, "server1", "client2", "other2"), identities(lab, "node2")
    switch_over(lab, "node2")
    until(lambda: whole(lab), "all is as before")
    assert identities(lab, "node2") == before
    # the first of its labels anywhere, on a node with each client: the numbers agree
    add_pods(lab, pod("new1", "node1", "new") + pod("new2", "node2", "new"))
    assert identities(lab, "node1")["default/new1"] == identities(lab, "node2")["default/new2"]
    wait_propagated(lab)
    lab.remove_pods(["default/new1", "default/new2"])
    harmless(flows)


@pytest.mark.parametrize("what", ["it hangs", "an agent stands still", "it is wiped under an agent that stands still"])
def test_what_stands_still_longer_than_a_lease_loses_nothing(lab: Lab, what: str) -> None:
    wait_propagated(lab)
    known = {node: (identities(lab, node), ipcache_of(lab, node)) for node in lab.nodes}
    flows, near = traffic(lab, "server1", "client2", "other2"), traffic(lab, "server3", "client3", "other3")
    agent = lab.agent_process("node2").pid
    with paused(store_process(lab) if what == "it hangs" else agent):
        if what == "it hangs":
            until(lambda: part(lab, "node2", "cluster")["state"] == "warning", "node2 sees that the store hangs")
            add_pods(lab, pod("late", "node2", "client"))  # a label set with a number waits for nobody
            lab.remove_pods(["default/late"])
        else:
            etcdctl(lab, "put", "cilium/state/ip/v1/default/192.0.2.1", "gone soon")
            etcdctl(lab, "del", "cilium/state/ip/v1/default/192.0.2.1")
            etcdctl(lab, "compact", "--physical", revision(lab))
        lease_passes(flows)
        if what.startswith("it is wiped"):
            lab.stop_store()
            shutil.rmtree(lab.directory.path / "etcd")
            lab.start_store()
    began = time.monotonic()
    until(lambda: whole(lab), "all is as before")
    print(f"{what}: as before after {time.monotonic() - began:.1f} s")
    wait_propagated(lab)
    harmless(flows)
    harmless(near)
    assert {node: (identities(lab, node), ipcache_of(lab, node)) for node in lab.nodes} == known


def test_a_clock_that_jumps_by_hours_changes_nothing(lab: Lab, clock: Path) -> None:
    known = {node: (identities(lab, node), ipcache_of(lab, node)) for node in lab.nodes}
    logs = [lab.directory.node(node).agent_log for node in ("node1", "node2")]
    before = [len(log.read_text()) for log in logs]
    flows, near = traffic(lab, "server1", "client2", "other2"), traffic(lab, "server3", "client3", "other3")
    for hours in (5, -26):
        clock.write_text(str(hours * 3600))
        add_pods(lab, pod("late", "node2", "client"))
        wait_propagated(lab)
        (number,) = (
            item["id"]
            for item in lab.request("GET", "/v1/endpoint", node="node2")
            if item["status"]["external-identifiers"]["pod-name"] == "default/late"
        )
        told = lab.request("GET", f"/v1/endpoint/{number}/log", node="node2")[-1]["time"]
        assert abs(told - time.time() - hours * 3600) < 60, "the agent did not see the jump"
        lease_passes(flows)
        lab.remove_pods(["default/late"])
    clock.write_text("0")
    until(lambda: whole(lab), "all is as before")
    wait_propagated(lab)
    harmless(flows)
    harmless(near)
    said = "".join(log.read_text()[skip:] for log, skip in zip(logs, before, strict=True))
    assert "was lost" not in said and "are gone" not in said and "cannot be followed" not in said, said
    assert {node: (identities(lab, node), ipcache_of(lab, node)) for node in lab.nodes} == known


def test_keys_that_somebody_deletes_are_back_at_once(lab: Lab) -> None:
    near = traffic(lab, "server3", "client3", "other3")
    known = {node: identities(lab, node) for node in lab.nodes}
    for prefix in ("identities/v1/id/", "identities/v1/value/", "nodes/", "ip/"):
        before = set(etcdctl(lab, "get", "--prefix", "--keys-only", f"cilium/state/{prefix}").split())
        used = {key for key in before if prefix != "identities/v1/id/" or int(key.rpartition("/")[2]) in numbers(known)}
        etcdctl(lab, "del", "--prefix", f"cilium/state/{prefix}")
        began = time.monotonic()
        until(
            lambda prefix=prefix, used=used: (
                used  # type: ignore[misc]
                <= set(etcdctl(lab, "get", "--prefix", "--keys-only", f"cilium/state/{prefix}").split())
            ),
            f"keys below {prefix} are back",
            5.0,
        )
        print(f"{prefix}: {len(used)} keys back after {time.monotonic() - began:.2f} s")
    wait_propagated(lab)
    harmless(near)
    assert {node: identities(lab, node) for node in lab.nodes} == known


def fill(lab: Lab, node: str) -> list[str]:
    """Take every IPv4 address that can be had on a node."""
    taken: list[str] = []
    with pytest.raises(LabError, match=r"are in use"):
        while True:
            owner = f"filler-{uuid.uuid4().hex}"  # one that asks again has its own address again
            given = lab.request("POST", f"/v1/ipam?owner={owner}&family=ipv4", node=node)
            taken.append(given["address"]["ipv4"])
    return taken


def refused(lab: Lab, words: str) -> None:
    """No pod comes up on node2, and the error says why."""
    with pytest.raises(LabError, match=words):
        add_pods(lab, pod("heir", "node2", "other"))
    lab.remove_pods(["default/heir"])


def test_an_address_is_nobodys_until_other_nodes_know_that_its_pod_is_gone(lab: Lab) -> None:
    add_pods(lab, pod("trusted", "node2", "client"))
    wait_propagated(lab)
    address, server = lab.state.pods["default/trusted"].addresses[0], lab.state.pods["default/server1"].addresses[:1]
    lab.helper("default/server1").serve([("TCP", OTHER_PORT)], server)
    assert reached(lab.helper("default/trusted"), server, OTHER_PORT, 5.0) == [True]
    lab.stop_store()
    try:
        until(lambda: part(lab, "node2", "cluster")["state"] == "warning", "node2 sees that the store is away")
        lab.remove_pods(["default/trusted"])
        fillers = fill(lab, "node2")
        assert address not in fillers
        # pods of earlier tests may rest, too
        refused(lab, r"addresses of \d+ former pods? rest: the store has not heard")
        state = part(lab, "node2", "ipam")
        assert re.search(r"addresses of \d+ former pods? rest", state["message"]) and state["state"] == "warning"
        assert f"{address} " in ciliate(lab, "ip", "list", node="node2").stdout
    finally:
        lab.start_store()
    until(lambda: f"{address} " not in ciliate(lab, "ip", "list", node="node2").stdout, "the address has rested")
    add_pods(lab, pod("heir", "node2", "other"))
    assert lab.state.pods["default/heir"].addresses[0] == address
    assert reached(lab.helper("default/heir"), server, OTHER_PORT) == [False]
    for filler in fillers:
        lab.request("DELETE", f"/v1/ipam/{filler}", node="node2")
    lab.stop_store()
    try:
        until(lambda: part(lab, "node2", "cluster")["state"] == "warning", "node2 sees that the store is away")
        lab.remove_pods(["default/heir"])
        # the next agent does not know what the others have heard of
        lab.stop_agent(signal.SIGKILL, "node2")
        lab.start_agent("node2")
        shown = ciliate(lab, "ip", "list", node="node2").stdout
        assert any(line.startswith(f"{address} ") and "rests: the store has not" in line for line in shown.splitlines())
    finally:
        lab.start_store()
    # what is deleted while a node does not follow the store is held there, as after a lost lease
    until(lambda: whole(lab), "every node follows the store again")


def numbers(known: dict[str, dict[str, int]]) -> set[int]:
    return {number for node in known.values() for number in node.values()}


def test_a_node_that_is_removed_leaves_nothing_behind(lab: Lab) -> None:
    gone = pods_of(lab, "node3")
    lab.stop_agent(signal.SIGKILL, "node3")
    done = ciliate(lab, "node", "delete", "node3", node="node1")
    assert done.returncode == 0, done.stderr
    assert f"{len(gone)} addresses" in done.stdout
    for node in ("node1", "node2"):
        until(lambda node=node: not gone.keys() & ipcache_of(lab, node).keys(), f"{node} forgets node3's pods")
        until(lambda node=node: not routes(lab, node) & set(underlay.pod_ranges("node3")), f"{node}'s routes go")
        assert {item["name"] for item in lab.request("GET", "/v1/node", node=node)} == {"node1", "node2"}
    assert ciliate(lab, "node", "delete", "node3", node="node1").returncode == 1
    assert ciliate(lab, "node", "delete", "node1", node="node1").returncode == 1
    harmless(traffic(lab, "server1", "client2", "other2"))
    lab.start_agent("node3")
    wait_propagated(lab)
