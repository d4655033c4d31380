"""Strategies that make whole small clusters: pods, policies of both dialects, flows."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from tests.unit.policy.oracle import Party

KEYS = ("app", "tier", "env")
VALUES = ("a", "b", "c")
SPACES = {"ns1": {"team": "red"}, "ns2": {"team": "blue"}, "ns3": {}}
WORLD = ("198.51.100.1", "198.51.100.40", "198.51.100.200", "203.0.113.9", "2001:db8::1", "2001:db8:1::1")
CIDRS = (
    "198.51.100.0/24",
    "198.51.100.32/27",
    "198.51.100.128/25",
    "0.0.0.0/0",
    "10.0.0.0/29",
    "10.0.0.2/31",
    "fd00::/125",
    "2001:db8::/32",
    "2001:db8::/64",
    "::/0",
)
HOLES = {
    "10.0.0.0/29": ["10.0.0.2/31", "10.0.0.4/32"],
    "fd00::/125": ["fd00::2/127"],
    "198.51.100.0/24": ["198.51.100.32/27", "198.51.100.200/32"],
    "2001:db8::/32": ["2001:db8:1::/48"],
    "0.0.0.0/0": ["203.0.113.0/24"],
}
PORTS = (1, 53, 79, 80, 81, 443, 8000, 8080, 9000, 65535)
RANGES = ((80, 81), (1, 1023), (8000, 8999), (8080, 65535), (53, 80))
NAMES = {"http": ("TCP", 80), "dns": ("UDP", 53), "alt": ("TCP", 8080)}

labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=3)


def _some(strategy: Any, low: int = 1, high: int = 2) -> Any:
    return st.lists(strategy, min_size=low, max_size=high)


@st.composite
def selectors(draw: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found["matchLabels"] = draw(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=2))
    if draw(st.integers(0, 3)) == 0:
        operator = draw(st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]))
        item: dict[str, Any] = {"key": draw(st.sampled_from(KEYS)), "operator": operator}
        if operator in ("In", "NotIn"):
            item["values"] = draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=2, unique=True))
        found["matchExpressions"] = [item]
    return found


@st.composite
def cidr_sets(draw: Any) -> dict[str, Any]:
    cidr = draw(st.sampled_from(CIDRS))
    holes = draw(st.lists(st.sampled_from(HOLES[cidr]), unique=True, max_size=2)) if cidr in HOLES else []
    return {"cidr": cidr, "except": holes} if holes else {"cidr": cidr}


@st.composite
def k8s_ports(draw: Any) -> dict[str, Any]:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return {"protocol": draw(st.sampled_from(["TCP", "UDP", "SCTP"]))}
    if kind == 1:
        name = draw(st.sampled_from(sorted(NAMES)))
        return {"port": name, "protocol": NAMES[name][0]}
    if kind == 2:
        first, last = draw(st.sampled_from(RANGES))
        return {"port": first, "endPort": last}
    return {"port": draw(st.sampled_from(PORTS)), "protocol": draw(st.sampled_from(["TCP", "UDP", "SCTP"]))}


@st.composite
def k8s_peers(draw: Any) -> dict[str, Any]:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return {"ipBlock": draw(cidr_sets())}
    peer: dict[str, Any] = {}
    if kind in (1, 3):
        peer["podSelector"] = draw(selectors())
    if kind in (2, 3):
        teams = st.sampled_from(
            [{}, {"matchLabels": {"team": "red"}}, {"matchExpressions": [{"key": "team", "operator": "Exists"}]}]
        )
        named = st.sampled_from([{"matchLabels": {"kubernetes.io/metadata.name": "ns2"}}])
        peer["namespaceSelector"] = draw(st.one_of(teams, named))
    return peer


@st.composite
def k8s_policies(draw: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"podSelector": draw(selectors())}
    for side, ends in (("ingress", "from"), ("egress", "to")):
        if draw(st.booleans()):
            spec[side] = draw(
                st.lists(
                    st.fixed_dictionaries(
                        {},
                        optional={ends: st.lists(k8s_peers(), max_size=2), "ports": st.lists(k8s_ports(), max_size=2)},
                    ),
                    max_size=2,
                )
            )
    if draw(st.booleans()):
        spec["policyTypes"] = draw(st.lists(st.sampled_from(["Ingress", "Egress"]), unique=True, max_size=2))
    meta = {"namespace": draw(st.sampled_from(sorted(SPACES)))}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec}


@st.composite
def cilium_ports(draw: Any) -> dict[str, Any]:
    kind = draw(st.integers(0, 2))
    if kind == 0:
        first, last = draw(st.sampled_from(RANGES))
        return {"port": str(first), "endPort": last, "protocol": draw(st.sampled_from(["TCP", "UDP", "ANY"]))}
    if kind == 1:
        name = draw(st.sampled_from(sorted(NAMES)))
        return {"port": name, "protocol": draw(st.sampled_from([NAMES[name][0], "ANY"]))}
    return {"port": str(draw(st.sampled_from(PORTS))), "protocol": draw(st.sampled_from(["TCP", "UDP", "SCTP", "ANY"]))}


@st.composite
def peer_selectors(draw: Any) -> dict[str, Any]:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return {"matchLabels": {draw(st.sampled_from(["reserved:host", "reserved:world"])): ""}}
    found = draw(selectors())
    if kind == 1:
        found.setdefault("matchLabels", {})["k8s:io.kubernetes.pod.namespace"] = draw(st.sampled_from(sorted(SPACES)))
    return found


@st.composite
def cilium_sections(draw: Any, prefix: str) -> dict[str, Any]:
    section: dict[str, Any] = {}
    kind = draw(st.integers(0, 5))
    if kind in (0, 1):
        section[prefix + "Endpoints"] = draw(_some(peer_selectors(), 0))
    elif kind == 2:
        entities = st.sampled_from(["all", "world", "host", "cluster", "none"])
        section[prefix + "Entities"] = draw(_some(entities))
    elif kind == 3:
        section[prefix + "CIDRSet"] = draw(_some(cidr_sets()))
    elif kind == 4:
        section[prefix + "CIDR"] = draw(_some(st.sampled_from(CIDRS)))
    if draw(st.integers(0, 5)) == 0:
        section[prefix + "Requires"] = [draw(selectors())]
    if draw(st.booleans()):
        section["toPorts"] = draw(_some(st.fixed_dictionaries({"ports": _some(cilium_ports())})))
    return section


@st.composite
def cilium_policies(draw: Any) -> dict[str, Any]:
    specs = []
    for _ in range(draw(st.integers(1, 2))):
        rule: dict[str, Any] = {"endpointSelector": draw(selectors())}
        if draw(st.booleans()):
            rule["ingress"] = draw(_some(cilium_sections("from"), 0))
        if draw(st.booleans()):
            rule["egress"] = draw(_some(cilium_sections("to"), 0))
        specs.append(rule)
    meta = {"namespace": draw(st.sampled_from(sorted(SPACES)))}
    body = {"spec": specs[0]} if len(specs) == 1 else {"specs": specs}
    return {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": meta, **body}


@st.composite
def clusters(draw: Any) -> tuple[list[Party], list[dict[str, Any]]]:
    parties = []
    kinds = draw(st.lists(st.tuples(st.sampled_from(sorted(SPACES)), labels), min_size=1, max_size=3))
    for index in range(draw(st.integers(2, 5))):
        # several pods of one kind: they have one identity
        space, found = draw(st.sampled_from(kinds))
        ports = draw(st.lists(st.sampled_from(sorted(NAMES)), unique=True, max_size=3))
        address = draw(st.sampled_from([f"10.0.0.{index + 1}", f"10.0.0.{index + 1}", f"fd00::{index + 1}", ""]))
        own = tuple(sorted(found.items()))
        named = {name: NAMES[name] for name in ports}
        parties.append(Party("pod", space, own, address, tuple(SPACES[space].items()), named))
    policies = draw(st.lists(st.one_of(cilium_policies(), k8s_policies()), min_size=1, max_size=4))
    for index, policy in enumerate(policies):
        policy["metadata"]["name"] = f"p{index}"
    return parties, policies


def manifests(parties: list[Party]) -> list[dict[str, Any]]:
    """The pods and namespaces of a generated cluster as manifests; pod ``n`` is called ``p<n>``."""
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": found}}
        for name, found in SPACES.items()
    ]
    for index, party in enumerate(parties):
        ports = [{"name": n, "containerPort": number, "protocol": p} for n, (p, number) in party.ports.items()]
        pod: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"p{index}", "namespace": party.namespace, "labels": dict(party.labels)},
            "spec": {"containers": [{"name": "main", "image": "x", "ports": ports}]},
        }
        if party.address:
            pod["status"] = {"podIP": party.address}
        objects.append(pod)
    return objects
