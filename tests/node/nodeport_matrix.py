"""A lab of two nodes with node ports, and who reaches which backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from lab_harness import new_lab

from ciliate import manifest
from ciliate.lab import underlay
from ciliate.lab.lab import Lab
from ciliate.lab.placement import Shape

HERE, THERE = "node1", "node2"
"""The node whose node port is asked, and the other one."""
CLIENTS = ("default/here", "default/there", "world", HERE, THERE)
ENGINES = ("none", "bpf", "iptables")
NODE_PORTS = {"server-here": 30080, "server-there": 30081}
TARGET = 8080


def pod(name: str, node: str) -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec: {{nodeName: {node}, containers: [{{name: c, image: c}}]}}
---"""


def service(name: str, port: int) -> str:
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  type: NodePort
  selector: {{app: {name}}}
  ports:
  - {{name: tcp, port: 80, targetPort: {TARGET}, nodePort: {port}}}
  - {{name: udp, port: 80, targetPort: {TARGET}, nodePort: {port}, protocol: UDP}}
---"""


MANIFESTS = (
    pod("here", HERE)
    + pod("there", THERE)
    + pod("server-here", HERE)
    + pod("server-there", THERE)
    + "".join(service(*item) for item in NODE_PORTS.items())
)


@contextmanager
def nodeport_lab(tunnel: str) -> Iterator[Lab]:
    """Two nodes in a routing mode, a client and a backend on each."""
    shape = Shape(nodes=2, tunnel=tunnel)
    with new_lab("np", manifest.loads(MANIFESTS), shape=shape, options={"masquerade": ENGINES[0]}) as made:
        for name in NODE_PORTS:
            addresses = made.state.pods[f"default/{name}"].addresses
            made.helper(f"default/{name}").serve([("TCP", TARGET), ("UDP", TARGET)], addresses)
        yield made


def switch(lab: Lab, engine: str) -> None:
    for node in lab.nodes:
        lab.request("POST", "/v1/plugins/switch", {"kind": "masquerade", "name": engine}, node)


def ask(lab: Lab, client: str, addresses: tuple[str, ...]) -> dict[tuple[str, str, str], str]:
    """Who answers this client at each node port, by service, protocol and address; "" for nobody."""
    places = list(product(NODE_PORTS, ("TCP", "UDP"), addresses))
    probes: list[dict[str, Any]] = [
        {
            "id": number,
            "protocol": protocol,
            "address": address,
            "port": NODE_PORTS[name],
            "source": None,
            "timeout": 2.0,
        }
        for number, (name, protocol, address) in enumerate(places)
    ]
    answers = lab.helper(client).probe(probes, 30.0)
    return {place: answer["who"] or "" for place, answer in zip(places, answers, strict=True)}


def lost(lab: Lab) -> set[tuple[str, ...]]:
    """Client, service, protocol and address of everything that is not answered by the backend that should."""
    addresses = underlay.addresses(HERE)
    return {
        (client, *place)
        for client in CLIENTS
        for place, who in ask(lab, client, addresses).items()
        if who != f"default/{place[0]}"
    }
