"""What the node itself may reach: all of its pods, or with ``allow-localhost=policy`` what rules say. Tier unit."""

from __future__ import annotations

from typing import Any

import pytest

from ciliate.policy.simulate import Simulation

HOST = {"matchLabels": {"reserved:host": ""}}
WEB = {"matchLabels": {"app": "web"}}
GET = {"ports": [{"port": "80", "protocol": "TCP"}], "rules": {"http": [{"method": "GET"}]}}
PLAIN = {"ports": [{"port": "80", "protocol": "TCP"}]}
ALL_OF_IT = {"GET": "allow", "POST": "allow", "8080": "allow"}
NOTHING = {"GET": "deny", "POST": "deny", "8080": "deny"}
PORT = {**ALL_OF_IT, "8080": "deny"}
REQUEST = {"GET": "allow", "POST": "deny", "8080": "deny"}


def verdicts(ingress: list[dict[str, Any]], allow_localhost: bool) -> dict[str, str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {"app": "web"}}}
    policy = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "web"},
        "spec": {"endpointSelector": WEB, "ingress": ingress},
    }
    simulation = Simulation([pod, policy], allow_localhost=allow_localhost)
    flow = {"from": "entity/host", "to": "default/web", "protocol": "TCP", "port": 80}
    asked = [{"http": {"method": method, "path": "/"}} for method in ("GET", "POST")] + [{"port": 8080}]
    names = ("GET", "POST", "8080")
    return {name: simulation.verdict({**flow, **item}).verdict for name, item in zip(names, asked, strict=True)}


@pytest.mark.parametrize(
    ("ingress", "expected"),
    [
        pytest.param([{"fromEndpoints": [HOST], "toPorts": [GET]}], REQUEST, id="names the host"),
        pytest.param([{"fromEntities": ["host"], "toPorts": [GET]}], REQUEST, id="names the host as entity"),
        pytest.param([{"toPorts": [GET]}], REQUEST, id="names nobody"),
        pytest.param([{"fromEndpoints": [WEB], "toPorts": [GET]}], NOTHING, id="names others"),
        pytest.param([{"fromCIDR": ["0.0.0.0/0"], "toPorts": [GET]}], NOTHING, id="names the world"),
        pytest.param(
            [{"fromEndpoints": [WEB], "toPorts": [GET]}, {"fromEntities": ["host"], "toPorts": [PLAIN]}],
            PORT,
            id="another rule names the host",
        ),
    ],
)
def test_a_request_rule_gives_the_node_what_it_says(ingress: list[dict[str, Any]], expected: dict[str, str]) -> None:
    assert verdicts(ingress, allow_localhost=False) == expected


@pytest.mark.parametrize(
    ("ingress", "by_policy"),
    [
        ([{"fromEndpoints": [WEB]}], NOTHING),
        ([{"fromEntities": ["host"]}], ALL_OF_IT),
        ([{"fromEntities": ["host"], "toPorts": [PLAIN]}], PORT),
    ],
)
def test_without_requests_rules_say_what_the_node_may(ingress: list[dict[str, Any]], by_policy: dict[str, str]) -> None:
    assert verdicts(ingress, allow_localhost=False) == by_policy
    assert verdicts(ingress, allow_localhost=True) == ALL_OF_IT


def test_always_means_the_whole_node_whatever_a_request_rule_names() -> None:
    assert verdicts([{"fromEndpoints": [HOST], "toPorts": [GET]}], allow_localhost=True) == ALL_OF_IT
