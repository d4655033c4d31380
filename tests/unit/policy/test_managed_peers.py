"""Endpoint selectors of Kubernetes objects mean managed endpoints: never host or world, unless they name them."""

from __future__ import annotations

from typing import Any

import pytest

from ciliate.policy.simulate import Simulation

NAMESPACE = "io.kubernetes.pod.namespace"
SPACE_LABEL = "io.cilium.k8s.namespace.labels.team"
PODS = [
    {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": space, "labels": {"app": name}},
        "spec": {"containers": [{"name": "c", "image": "c"}]},
    }
    for space, name in (("one", "own"), ("one", "near"), ("two", "far"), ("three", "other"))
]
SPACES = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "two", "labels": {"team": "x"}}},
]
PEERS = {
    "near": "one/near",
    "far": "two/far",
    "other": "three/other",
    "world": "entity/world",
    "host": "entity/host",
    "init": "entity/init",
}


def _expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": key, "operator": operator, **({"values": list(values)} if values else {})}]}


ABSENT = {"near", "other"}
"""Of pods in namespaces without the label."""
PODS_ONLY = {"near", "far", "other"}
CASES = [
    # namespaced: a selector that says a namespace is not confined to the policy's own
    (True, _expression(NAMESPACE, "NotIn", "two"), {"near", "other"}),
    (True, _expression(f"k8s:{NAMESPACE}", "NotIn", "two"), {"near", "other"}),
    (True, _expression(f"any:{NAMESPACE}", "NotIn", "two", "three"), {"near"}),
    (True, _expression(NAMESPACE, "Exists"), PODS_ONLY),
    (True, _expression(NAMESPACE, "DoesNotExist"), set()),
    (True, _expression(NAMESPACE, "In", "two"), {"far"}),
    (True, _expression(SPACE_LABEL, "DoesNotExist"), ABSENT),
    (True, _expression(SPACE_LABEL, "NotIn", "x"), ABSENT),
    (True, _expression(SPACE_LABEL, "Exists"), {"far"}),
    (True, {}, {"near"}),
    (True, _expression("app", "NotIn", "x"), {"near"}),
    (True, _expression("app", "DoesNotExist"), set()),
    # keys without a source mean any, reserved ones too: that names nobody
    (True, {"matchLabels": {"host": "", NAMESPACE: "one"}}, set()),
    # a reserved label that is asked for is named, one that is ruled out is not
    (True, {"matchLabels": {"reserved:world": ""}}, {"world"}),
    (True, {"matchLabels": {"reserved:host": ""}}, {"host"}),
    (True, _expression("reserved:init", "Exists"), {"init"}),
    (True, _expression("reserved:host", "DoesNotExist"), PODS_ONLY),
    (True, _expression("reserved:world", "NotIn", ""), PODS_ONLY),
    (True, {"matchLabels": {"reserved:all": ""}}, {*PODS_ONLY, "world", "host", "init"}),
    (True, _expression("reserved:all", "DoesNotExist"), set()),
    # clusterwide
    (False, {}, PODS_ONLY),
    (False, {"matchLabels": {}, "matchExpressions": []}, PODS_ONLY),
    (False, _expression("app", "NotIn", "near"), {"far", "other"}),
    (False, _expression("app", "DoesNotExist"), set()),
    (False, _expression("k8s:app", "NotIn", "x"), PODS_ONLY),
    (False, _expression("any:world", "Exists"), set()),
    (False, _expression(NAMESPACE, "NotIn", "two"), {"near", "other"}),
    (False, _expression(NAMESPACE, "DoesNotExist"), set()),
    (False, _expression(SPACE_LABEL, "DoesNotExist"), ABSENT),
    (False, {"matchLabels": {"cidr:0.0.0.0/0": ""}}, set()),
    (False, {"matchLabels": {"reserved:world": ""}}, {"world"}),
    (False, {"matchLabels": {"reserved:all": ""}}, {*PODS_ONLY, "world", "host", "init"}),
    (False, _expression("reserved:world", "DoesNotExist"), PODS_ONLY),
]
NAMES = [f"{'namespaced' if case[0] else 'clusterwide'}-{index}" for index, case in enumerate(CASES)]


def policy(namespaced: bool, spec: dict[str, Any]) -> dict[str, Any]:
    kind = "CiliumNetworkPolicy" if namespaced else "CiliumClusterwideNetworkPolicy"
    meta = {"name": "p", **({"namespace": "one"} if namespaced else {})}
    return {"apiVersion": "cilium.io/v2", "kind": kind, "metadata": meta, "spec": spec}


def met(spec: dict[str, Any], namespaced: bool, egress: bool, own: str = "one/own") -> set[str]:
    """Which peers may connect to ``own`` (``egress``: may be connected to)."""
    simulation = Simulation([*PODS, *SPACES, policy(namespaced, spec)], allow_localhost=False)
    found = set()
    for name, peer in PEERS.items():
        ends = {"from": own, "to": peer} if egress else {"from": peer, "to": own}
        flow = {**ends, "port": 80, "protocol": "TCP", "direction": "egress" if egress else "ingress"}
        if simulation.verdict(flow).verdict == "allow":
            found.add(name)
    return found


def test_who_is_meant() -> None:
    wrong = []
    for name, (namespaced, selector, meant) in zip(NAMES, CASES, strict=True):
        subject = {"matchLabels": {"app": "own"}}
        asked = {
            "fromEndpoints": {"ingress": [{"fromEndpoints": [selector]}]},
            "toEndpoints": {"egress": [{"toEndpoints": [selector]}]},
            "fromRequires": {"ingress": [{"fromRequires": [selector], "fromEntities": ["all"]}]},
            "toRequires": {"egress": [{"toRequires": [selector], "toEntities": ["all"]}]},
            "with ports": {"ingress": [{"fromEndpoints": [selector], "toPorts": [{"ports": [{"port": "80"}]}]}]},
        }
        for field, sections in asked.items():
            found = met({"endpointSelector": subject, **sections}, namespaced, "egress" in sections)
            if found != meant:
                wrong.append((name, field, selector, sorted(found), sorted(meant)))
    assert not wrong


@pytest.mark.parametrize("operator", ["DoesNotExist", "NotIn"])
def test_only_a_rule_for_init_leaves_its_namespace(operator: str) -> None:
    selector = _expression("reserved:init", operator, *(["x"] if operator == "NotIn" else []))
    spec = {"endpointSelector": selector, "ingress": [{"fromEntities": ["world"]}]}
    assert "world" in met(spec, True, egress=False, own="one/own")
    # nothing isolates it: the policy is about its own namespace
    assert set(PEERS) <= met(spec, True, egress=False, own="two/far") | {"far"}


def test_peers_of_a_rule_for_init_are_managed_endpoints() -> None:
    spec = {"endpointSelector": {"matchLabels": {"reserved:init": ""}}, "ingress": [{"fromEndpoints": [{}]}]}
    assert met(spec, True, egress=False, own="entity/init") == PODS_ONLY


def test_bare_rules_mean_everybody() -> None:
    """The form of 1.5's own API, which knows no namespaces: an empty selector means everything there."""
    rule = {"endpointSelector": {"matchLabels": {"app": "own"}}, "ingress": [{"fromEndpoints": [{}]}]}
    simulation = Simulation([*PODS, {"kind": "Rule", "spec": rule}], allow_localhost=False)
    for peer in PEERS.values():
        flow = {"from": peer, "to": "one/own", "port": 80, "protocol": "TCP", "direction": "ingress"}
        assert simulation.verdict(flow).verdict == "allow", peer


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("kind", ["CiliumClusterwideNetworkPolicy", "Rule"])
def test_services_of_rules_without_a_namespace_are_of_every_namespace(kind: str, by_name: bool) -> None:
    services: list[dict[str, Any]] = []
    for space, name, address in (
        ("one", "db", "203.0.113.1"),
        ("two", "db", "203.0.113.2"),
        ("two", "x", "203.0.113.3"),
    ):
        meta = {"name": name, "namespace": space, "labels": {"app": name}}
        services.append({"kind": "Service", "metadata": meta, "spec": {"ports": [{"port": 80}]}})
        subsets = [{"addresses": [{"ip": address}], "ports": [{"port": 80}]}]
        services.append({"kind": "Endpoints", "metadata": meta, "subsets": subsets})
    peer = (
        {"k8sService": {"serviceName": "db"}}
        if by_name
        else {"k8sServiceSelector": {"selector": {"matchLabels": {"app": "db"}}}}
    )
    spec = {"endpointSelector": {"matchLabels": {"app": "own"}}, "egress": [{"toServices": [peer]}]}
    rule = policy(False, spec) if kind != "Rule" else {"kind": kind, "spec": spec}
    simulation = Simulation([*PODS, *services, rule])
    flows = [{"from": "one/own", "to": f"ip/203.0.113.{number}", "port": 80, "protocol": "TCP"} for number in (1, 2, 3)]
    assert [simulation.verdict(flow).verdict for flow in flows] == ["allow", "allow", "deny"]
