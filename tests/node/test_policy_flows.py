"""Policies change under traffic: nothing lost that both versions allow, nothing passed that both deny. Needs root."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from lab_harness import new_lab
from tests.node.faults_harness import wait_for
from tests.node.traffic import Asking, Flood, Place, Server, Talking, retransmissions

from ciliate.lab import netns
from ciliate.lab.command import run
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE
from ciliate.lab.traffic import make_socket
from ciliate.manifest import loads

CHANGES = int(os.environ.get("CILIATE_POLICY_CHANGES", "50"))
PORT = 8080
FAMILIES = (4, 6)
KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
ENDED = 0.5
"""Seconds after a change within which what it forbids has to end; the promise is one second."""
PODS = "\n---\n".join(
    f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{role: {name}}}}}\n"
    "spec: {containers: [{name: c, image: c}]}"
    for name in ("server", "friend", "former", "stranger")
)
ANY_8080 = {"ports": [{"port": "8080", "protocol": "ANY"}]}
RANGE = {"ports": [{"port": "8000", "endPort": 8999, "protocol": "TCP"}, {"port": "8080", "protocol": "UDP"}]}


def _role(*names: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": "role", "operator": "In", "values": list(names)}]}


def _policy(subject: str, **sections: Any) -> dict[str, Any]:
    spec = {"endpointSelector": {"matchLabels": {"role": subject}}, **sections}
    return {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": subject}, "spec": spec}


FRIENDS = {"fromEndpoints": [_role("friend", "former")], "toPorts": [ANY_8080]}
RANGES = [{"fromEndpoints": [_role(name)], "toPorts": [RANGE]} for name in ("friend", "former")]
NARROW = [{"fromEndpoints": [_role("friend", "absent")], "toPorts": [ANY_8080]}, {"fromCIDR": ["198.51.100.0/24"]}]
TO_SERVER = {"toEndpoints": [_role("server")], "toPorts": [ANY_8080]}
VERSIONS: list[tuple[bool, list[dict[str, Any]]]] = [
    # whether the former friend may come, and the policies; the friend may come to 8080 in each
    (True, [_policy("server", ingress=[FRIENDS])]),
    (False, [_policy("server", ingress=[{"fromEndpoints": [_role("friend")]}])]),
    (True, [_policy("server", ingress=RANGES), _policy("friend", egress=[TO_SERVER])]),
    (
        False,
        [
            _policy("server", ingress=NARROW, egress=[{"toEndpoints": [_role("friend", "former")]}]),
            _policy("friend", egress=[{"toEntities": ["all"]}]),
        ],
    ),
]


def apply(lab: Lab, policies: list[dict[str, Any]]) -> None:
    """Make these the policies in force: first what is new or different, then away with the rest."""
    lab.request("PUT", "/v1/policy", {"documents": [{"object": policy} for policy in policies]})
    names = {policy["metadata"]["name"] for policy in policies}
    for gone in {"server", "friend"} - names:
        there = [item["name"] for item in lab.request("GET", "/v1/policy")["policies"]]
        if gone in there:
            lab.request("DELETE", f"/v1/policy?name=default/{gone}")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("change", loads(PODS)) as made:
        yield made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_fifty_changes_under_traffic(lab: Lab, stack: ExitStack) -> None:
    apply(lab, VERSIONS[0][1])
    places = {name: Place(lab, name, stack) for name in ("server", "friend", "former", "stranger")}
    server = Server(places["server"], PORT, stack)
    asking = [
        Asking(places["friend"], places["server"].address(family, PORT), kind, stack)
        for family in FAMILIES
        for kind in KINDS
    ]
    floods = [
        Flood(places[name], places["server"].address(family, port), stack)
        for family in FAMILIES
        for name, port in (("stranger", PORT), ("former", PORT + 1010))
    ]
    for open_to_former, policies in itertools.islice(itertools.cycle(VERSIONS), 1, CHANGES + 1):
        flows = [] if open_to_former else _talk(places)
        apply(lab, policies)
        if not open_to_former:
            _has_ended(flows, server, places["former"])
    for item in asking:
        assert item.asked > 5 * CHANGES
        assert item.lost == 0, f"{item.lost} of {item.asked} requests without an answer"
    assert [retransmissions(item.socket) for item in asking if item.socket.type == socket.SOCK_STREAM] == [0, 0]
    _nothing_denied_passed(server, floods, places["stranger"])


def _talk(places: dict[str, Place]) -> list[Talking]:
    target, former = places["server"], places["former"]
    flows = [Talking(former, target.address(family, PORT), kind) for family in FAMILIES for kind in KINDS]
    deadline = time.monotonic() + 5
    while not all(flow.heard > 3 for flow in flows):
        assert time.monotonic() < deadline, [flow.heard for flow in flows]
        time.sleep(0.01)
    return flows


def _has_ended(flows: list[Talking], server: Server, former: Place) -> None:
    def heard() -> list[int]:
        at_server = [server.heard.get(former.address(family, 0)[0], 0) for family in FAMILIES]
        return [*(flow.heard for flow in flows), *at_server]

    # what was on its way is read before: a busy machine reads late, and a flow that goes on is never quiet
    deadline, before = time.monotonic() + 5, None
    while before != (before := heard()):
        assert time.monotonic() < deadline, "flows of the former friend go on"
        time.sleep(0.1)
    time.sleep(ENDED)
    after = heard()
    for flow in flows:
        flow.stop()
    assert after == before, "flows of the former friend go on"


def _nothing_denied_passed(server: Server, floods: list[Flood], stranger: Place) -> None:
    assert min(flood.sent for flood in floods) > 5 * CHANGES
    assert [flood.opened for flood in floods if flood.opened] == []
    assert [
        address for address in server.heard if address in {stranger.address(family, 0)[0] for family in FAMILIES}
    ] == []


def test_what_is_for_everybody_is_for_the_node(lab: Lab) -> None:
    """A pod that may send to the world, but not to the node, does not reach its sockets by broadcast either."""
    everywhere = [{"toEntities": ["world"]}, {"toCIDR": ["0.0.0.0/0"]}]
    node, pod = (netns.path(name) for name in (lab.directory.namespace(NODE), lab.state.pods["default/stranger"].netns))
    with ExitStack() as made:
        listener, sender = (
            made.enter_context(make_socket(place, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
            for place in (node, pod)
        )
        listener.bind(("0.0.0.0", 0))
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        seen = []
        for allowed in (everywhere, [*everywhere, {"toEntities": ["host"]}]):
            apply(lab, [_policy("stranger", egress=allowed)])
            for target in ("255.255.255.255", "172.31.255.3", "10.200.0.1"):
                sender.sendto(target.encode(), (target, listener.getsockname()[1]))
            listener.settimeout(0.5)
            with suppress(TimeoutError):
                while True:
                    seen.append(listener.recv(100).decode())
        lab.request("DELETE", "/v1/policy?name=default/stranger")
    assert seen == ["255.255.255.255", "172.31.255.3", "10.200.0.1"]


OWN = {
    # what is done on the node -> prefixes that it delivers to itself by that
    "addr add 169.254.99.1/32 dev lo": ["169.254.99.1/32"],
    "addr add 198.51.100.77/32 dev lo": ["198.51.100.77/32"],
    "route add local 203.0.113.128/28 dev lo": ["203.0.113.128/28"],
    "addr add 2001:db8:77::1/64 dev ciliate_host nodad": ["2001:db8:77::1/128", "2001:db8:77::/128"],
}


def test_whatever_the_node_takes_for_itself_is_the_host(lab: Lab) -> None:
    """Link-local and anycast addresses and local routes too, as soon as they are there, and no longer."""
    node, pod = (netns.path(name) for name in (lab.directory.namespace(NODE), lab.state.pods["default/stranger"].netns))
    targets = ["169.254.99.1", "198.51.100.77", "203.0.113.130", "2001:db8:77::1", "2001:db8:77::"]
    families = {"4": (socket.AF_INET, "0.0.0.0"), "6": (socket.AF_INET6, "::")}
    inside, seen = netns.inside(lab.directory.namespace(NODE)), []
    with ExitStack() as made:
        listeners, senders = (
            {
                version: made.enter_context(
                    make_socket(place, lambda kind=kind: socket.socket(kind, socket.SOCK_DGRAM))
                )  # type: ignore[misc]
                for version, (kind, _) in families.items()
            }
            for place in (node, pod)
        )
        for version, (_, everywhere) in families.items():
            listeners[version].bind((everywhere, 0))
        for change in OWN:
            run(*inside, "ip", *change.split())
            made.callback(run, *inside, "ip", *change.replace(" add ", " del ").removesuffix(" nodad").split())
        wait_for(lambda: _of_the_host(lab) >= {prefix for found in OWN.values() for prefix in found})
        for allowed in ([{"toEntities": ["world"]}], [{"toEntities": ["world"]}, {"toEntities": ["host"]}]):
            apply(lab, [_policy("stranger", egress=allowed)])
            for target in targets:
                version = "6" if ":" in target else "4"
                senders[version].sendto(target.encode(), (target, listeners[version].getsockname()[1]))
            for listener in listeners.values():
                listener.settimeout(0.3)
                with suppress(TimeoutError):
                    while True:
                        seen.append(listener.recv(100).decode())
        lab.request("DELETE", "/v1/policy?name=default/stranger")
    assert sorted(seen) == sorted(targets), "each once, and only where the host is allowed"
    wait_for(lambda: not _of_the_host(lab) & {prefix for found in OWN.values() for prefix in found})


def _of_the_host(lab: Lab) -> set[str]:
    """Prefixes that the kernel's ipcache has as the node's own."""
    entries = lab.request("GET", "/v1/map/ciliate_ipcache?limit=10000")["cache"]
    return {entry["key"] for entry in entries if entry["value"].split()[:2] == ["identity", "1"]}
