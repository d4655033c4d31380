"""Agents of other versions on one node, under traffic: maps of an earlier or later layout are taken over, and back."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lab_harness import new_lab
from upgrade_harness import BEFORE_PLACES, MAPS, of_history, to_come, version

from ciliate.cli import bpf
from ciliate.datapath import mapview
from ciliate.datapath.bpf import Map, pin
from ciliate.datapath.mapversions import RECORDS
from ciliate.lab import audit, netns, processes
from ciliate.lab.command import ip_batch, run
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE, WORLD
from ciliate.lab.traffic import EchoServer, NewFlows, PingFlow, TcpStream, Traffic, UdpFlow
from ciliate.lab.world import NODE_ADDRESSES, NODE_DEVICE, WORLD_LINK
from ciliate.manifest import loads

from .faults_harness import settled, start_in_vain, wait_for

PORT, WORLD_PORT = 80, 7171
SERVICE = ("10.96.0.80", "fd96::80")
MANIFESTS = """
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: friend, labels: {app: friend}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, labels: {app: stranger}}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: friend}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}, {port: "80", protocol: UDP}, {port: "8", protocol: ICMP},
      {port: "128", protocol: ICMPv6}]}]
  - fromCIDR: [203.0.113.0/24, "2001:db8:7::/48"]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: friend, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: friend}}
  ingress:
  - fromCIDR: [203.0.113.0/24]
"""


@pytest.fixture(scope="module")
def next_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_come(tmp_path_factory.mktemp("versions") / "next")


@contextlib.contextmanager
def lab_of(tree: Path | None, **options: str) -> Iterator[Lab]:
    """A lab whose first agent is of a version, with pods, policy, a service and a world that knows no pod."""
    with version(tree), new_lab("upgrade", loads(MANIFESTS, "upgrade"), {"masquerade": "bpf", **options}) as lab:
        ip_batch(lab.namespace_of(WORLD), [f"route del default via {address}" for address in NODE_ADDRESSES])
        backends = lab.state.pods["default/server"].addresses
        fronts = [(*ends, protocol) for ends in zip(SERVICE, backends, strict=True) for protocol in ("TCP", "UDP")]
        lab.request("PUT", "/v1/service", {"services": [service(*front) for front in fronts]})
        yield lab


def service(address: str, backend: str, protocol: str) -> dict[str, Any]:
    front = {"ip": address, "port": PORT, "protocol": protocol}
    return {"frontend-address": front, "backend-addresses": [{"ip": backend, "port": PORT}]}


def grown(before: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Sizes of keys and values in the version to come."""
    return {name: (key + 8 * MAPS[name][0], value + 8 * MAPS[name][1]) for name, (key, value) in before.items()}


def beside(lab: Lab) -> list[str]:
    """Directories of pins that a change left."""
    return [path.name for path in audit.pins(lab).parent.iterdir() if "~" in path.name]


class Flows:
    """Everything that must go on: pod to pod, pings, a service, the world behind masquerading; and what is denied."""

    def __init__(self, lab: Lab, services: bool = True) -> None:
        pods = lab.state.pods
        places = {name: netns.path(pods[f"default/{name}"].netns) for name in ("server", "friend", "stranger")}
        addresses = pods["default/server"].addresses
        self._world = EchoServer(netns.path(lab.namespace_of(WORLD)), WORLD_PORT)
        self.traffic = Traffic(places["server"], places["friend"], places["stranger"], addresses, PORT)
        friend = places["friend"]
        self.others: list[Any] = [PingFlow(friend, address) for address in addresses]
        fronts = SERVICE if services else ()
        ends = [(address, PORT) for address in fronts] + [(address, WORLD_PORT) for address in WORLD_LINK]
        for end in ends:
            self.others += [kind(friend, *end) for kind in (TcpStream, UdpFlow, NewFlows)]

    @property
    def all(self) -> list[Any]:
        return [*self.traffic.allowed, *self.others]

    def progress(self) -> None:
        """Every flow goes on."""
        before = [flow.records for flow in self.all]
        wait_for(lambda: all(flow.records > count for flow, count in zip(self.all, before, strict=True)))

    def stop(self) -> tuple[dict[str, int], dict[str, int]]:
        lost = {flow.name: flow.stop() for flow in self.others}
        try:
            more, through = self.traffic.stop()
        finally:
            self._world.stop()
        return lost | more, through


@contextlib.contextmanager
def undisturbed(lab: Lab) -> Iterator[Flows]:
    """Flows of every kind lose nothing while the block runs, and none that is denied gets through."""
    flows = Flows(lab)
    try:
        flows.progress()
        yield flows
        flows.progress()
    finally:
        lost, through = flows.stop()
    assert {name: count for name, count in lost.items() if count} == {}
    assert {name: count for name, count in through.items() if count} == {}


def sizes(lab: Lab) -> dict[str, tuple[int, int]]:
    """Of each map that the lab's agent has: one of before may know fewer."""
    found = {}
    for path in sorted(audit.pins(lab).iterdir()):
        if path.name not in MAPS:
            continue
        name, table = path.name, Map.open(path)
        found[name] = table.key_size, table.width
        table.close()
    return found


def change_to(lab: Lab, tree: Path | None, number: signal.Signals = signal.SIGTERM) -> None:
    """The agent ends, and one of another version starts."""
    lab.stop_agent(number)
    with version(tree):
        lab.start_agent()


def test_flows_go_on_over_the_last_change_of_a_key(tmp_path: Path) -> None:
    """From the commit before policy keys had places; that agent itself could not come back."""
    old = of_history(BEFORE_PLACES, tmp_path / "old")
    with lab_of(old) as lab:
        before = sizes(lab)
        with undisturbed(lab):
            change_to(lab, None)
        after = sizes(lab)
        assert after.keys() == MAPS.keys()
        assert after["ciliate_policy"] == (before["ciliate_policy"][0] + 4, before["ciliate_policy"][1])
        settled(lab)
        with undisturbed(lab):
            change_to(lab, None)


@pytest.mark.parametrize("loader", ["shared", "template"])
def test_flows_go_on_to_a_later_version_and_back(next_version: Path, loader: str) -> None:
    """Keys and values of conntrack, masquerading and services, and keys of policy, grow and shrink again."""
    with lab_of(None, **{"datapath-loader": loader}) as lab:
        before = sizes(lab)
        assert before.keys() == MAPS.keys()
        with undisturbed(lab):
            change_to(lab, next_version)
            assert (sizes(lab), beside(lab)) == (grown(before), [])
            change_to(lab, None, signal.SIGKILL)
            assert (sizes(lab), beside(lab)) == (before, [])
        settled(lab)


def test_an_earlier_version_refuses_what_it_must_not_read(tmp_path: Path) -> None:
    """It names the map and what to do, and traffic goes on as it was; the later version goes on afterwards."""
    later = to_come(tmp_path / "later", since=0)
    with lab_of(later) as lab:
        before = sizes(lab)
        with undisturbed(lab):
            lab.stop_agent()
            refused(lab, r"layout \d+, which only agents of layout \d+ and later can read")
            with without_records(lab):
                refused(lab, r"a key of \d+ and a value of \d+ bytes and no record of its layout")
            assert (sizes(lab), beside(lab)) == (before, [])
            lab.start_agent()
        # the commands of this version say that they cannot read the other one's maps
        done = CliRunner().invoke(bpf.command, ["--bpf-root", str(lab.directory.bpf_dir), "ct", "list"])
        assert done.exit_code == 1 and "its agent is of another version" in done.output
        shown = mapview.read(audit.pins(lab), "ciliate_policy", 1)
        assert shown is not None and all(set(entry.key) <= set("0123456789abcdef ") for entry in shown[1])


def refused(lab: Lab, why: str) -> None:
    """An agent of the version under test says which map it cannot read, and what to do."""
    with version(None):
        said = start_in_vain(lab)
    assert re.search(rf"map ciliate_\w+ has {why}; this agent knows layouts 1 to \d+", said), said
    assert "pods' traffic goes on as it was" in said and str(audit.pins(lab)) in said


@contextlib.contextmanager
def without_records(lab: Lab) -> Iterator[None]:
    """Nothing says meanwhile which layouts the maps have."""
    path = audit.pins(lab) / RECORDS
    with contextlib.closing(Map.open(path)) as records:
        path.unlink()
        yield
        assert not path.exists()
        pin(records.descriptor, path)


def test_an_upgrade_by_a_reboot(tmp_path: Path) -> None:
    """Pins, devices and pods are gone, state and store are of the version before: what it knew holds from the start."""
    old = of_history(BEFORE_PLACES, tmp_path / "old")
    with lab_of(old) as lab:
        lab.stop_agent(signal.SIGKILL)
        reboot(lab)
        with version(None):
            lab.start_agent()
            assert audit.endpoints(lab) == {}
            settled(lab)
            lab.add_pods([item.object for item in loads(MANIFESTS, "upgrade") if item.object["kind"] == "Pod"])
            flows = Flows(lab, services=False)
            flows.progress()
            lost, through = flows.stop()
        assert not any(lost.values()) and not any(through.values()), (lost, through)


def reboot(lab: Lab) -> None:
    """What a node loses: every pod, every device of ours, every pin."""
    node, pods = lab.directory.namespace(NODE), lab.state.pods
    helpers = [item for item in lab.state.processes if item.role in {f"helper {name}" for name in pods}]
    processes.end(helpers, number=signal.SIGKILL)
    gone = {pod.netns for pod in pods.values()}
    for namespace in gone:
        netns.remove(namespace)
        lab.directory.helper_socket(namespace).unlink()
    lab.state.namespaces = [name for name in lab.state.namespaces if name not in gone]
    lab.state.processes = [item for item in lab.state.processes if item not in helpers]
    pods.clear()
    lab.save()
    left = {"lo", NODE_DEVICE}
    for name in links(node) - left:
        with contextlib.suppress(LabError):  # a pair goes at once, and one with its namespace
            run("ip", "-n", node, "link", "del", name)
    wait_for(lambda: links(node) == left, "every device of ours goes")
    run("tc", "-n", node, "qdisc", "del", "dev", NODE_DEVICE, "clsact")
    shutil.rmtree(audit.pins(lab))


def links(node: str) -> set[str]:
    return {link["ifname"] for link in json.loads(run("ip", "-n", node, "-j", "link"))}
