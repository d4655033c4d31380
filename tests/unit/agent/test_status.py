"""The status screen: problems first, each with a remedy; pressure of maps; secrets stay hidden. Tier unit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ciliate.agent import status
from ciliate.cli.status import _sections, duration
from ciliate.datapath.mapview import MapSummary
from ciliate.manifest import loads
from ciliate.policy.repository import PolicySettings, Repository
from ciliate.redaction import hide_secrets

WELL = {"name": "agent", "state": "ok", "message": "version 1, ready"}
SLOW = {"name": "policy", "state": "warning", "message": "1 behind", "remedy": "wait"}
BROKEN = {"name": "kvstore", "state": "failure", "message": "disk is full", "remedy": "make room"}


def document(*parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "state": max((part["state"] for part in parts), key=["ok", "warning", "failure"].index),
        "node": "node1",
        "cluster": "default",
        "version": "1",
        "kernel": "6.1",
        "uptime": 4000.0,
        "parts": list(parts),
        "node-addresses": ["192.0.2.1"],
        "features": {
            "mode": "veth",
            "families": "IPv4",
            "loader": "shared",
            "masquerade": "none",
            "encryption": "none",
            "monitor": "medium",
            "plugins": "none",
            "jit": "on",
            "btf": "yes",
        },
        "controllers": [],
        "maps": [],
        "addresses": [{"ip": "10.0.0.3", "owner": "default/pod 1234:eth0", "pod": "default/pod", "endpoint": 7}],
    }


def screen(found: dict[str, Any], **options: bool) -> str:
    return "\n".join(_sections(found, *(options.get(name, False) for name in ("addresses", "controllers", "maps"))))


def test_problems_come_first_with_what_to_do() -> None:
    lines = screen(document(WELL, SLOW, BROKEN)).splitlines()
    assert lines[0].endswith("something has failed")
    order = [next(index for index, line in enumerate(lines) if word in line) for word in ("disk", "behind", "ready")]
    assert order == sorted(order)
    assert lines[order[0]].startswith("FAIL") and lines[order[0] + 1].strip() == "-> make room"


def test_it_says_how_long_and_where() -> None:
    text = screen(document(WELL))
    assert "1 h 6 min" in text and "192.0.2.1" in text and "all is well" in text and "10.0.0.3" not in text
    assert "default/pod   7" in screen(document(WELL), addresses=True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3661, "1 h 1 min"), (90000, "1 d 1 h"), (86400, "1 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "kind", "entries", "state", "remedy"),
    [
        ("ciliate_ipcache", "lpm-trie", 79, "ok", None),
        ("ciliate_ipcache", "lpm-trie", 80, "warning", "fewer prefixes"),
        ("ciliate_policy", "hash", 95, "failure", "fewer prefixes"),
        ("ciliate_ct_tcp", "lru-hash", 100, "warning", "bpf-ct-global-tcp-max"),
    ],
)
def test_pressure(name: str, kind: str, entries: int, state: str, remedy: str | None) -> None:
    maps = [MapSummary(name, "", kind, 100, 4, 4, entries), MapSummary("ciliate_lxc", "", "hash", 100, 4, 4, 1)]
    part = status._maps([*maps, MapSummary("ciliate_ep", "", "array", 65536, 4, 4)])
    assert part["state"] == state
    assert (remedy is None and "remedy" not in part) or remedy in part["remedy"]
    assert f"{name.removeprefix('ciliate_')} {entries} of 100" in part["message"]


def test_what_sounds_secret_is_hidden() -> None:
    options = {"etcd": {"password": "x", "endpoints": ["a"], "tls-key": "y", "nested": [{"api_token": "z"}]}}
    assert hide_secrets({"node_name": "n", "plugins": options}) == {
        "node_name": "n",
        "plugins": {
            "etcd": {
                "password": "(hidden)",
                "endpoints": ["a"],
                "tls-key": "(hidden)",
                "nested": [{"api_token": "(hidden)"}],
            }
        },
    }


LAYER_7 = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {}
  ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]}]
  egress: [{toFQDNs: [{matchName: a.example}]}]
"""


def policy_part(repository: Repository) -> dict[str, Any]:
    config = SimpleNamespace(enable_policy="default")
    endpoints = SimpleNamespace(endpoints=list)
    realizer = SimpleNamespace(by_namespace={})
    policies = SimpleNamespace(unread=list)
    agent: Any = SimpleNamespace(
        policies=policies, repository=repository, endpoints=endpoints, config=config, realizer=realizer
    )
    return status._policy(agent)


def test_policies_that_no_proxy_serves_are_named() -> None:
    repository = Repository()
    assert policy_part(repository)["state"] == "ok"
    repository.import_documents(loads(LAYER_7))
    part = policy_part(repository)
    assert part["state"] == "warning"
    assert "no proxy for http is active" in part["message"]
    assert "no proxy for dns is active" in part["message"]
    assert "CiliumNetworkPolicy shop/api" in part["message"]
    assert part["remedy"]
    repository.reconfigure(PolicySettings(proxies=(("dns", 1), ("http", 2))))
    assert policy_part(repository)["state"] == "ok"
    repository.reconfigure(PolicySettings(proxies=(("dns", 1),), proxies_down=(("http", "exited with 1"),)))
    assert "the proxy for http is down: exited with 1" in policy_part(repository)["message"]
    repository.delete(everything=True)
    assert policy_part(repository)["state"] == "ok"
