"""What may be said and can hardly be meant is told by `validate`, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ciliate.cli.policy_offline import validate

NAMESPACE = "io.kubernetes.pod.namespace"
SPACE_LABEL = "io.cilium.k8s.namespace.labels.team"


def warnings_of(objects: list[dict[str, Any]], directory: Path, *options: str) -> dict[str, str]:
    """Field -> text; whatever is a problem fails the test."""
    file = directory / "p.json"
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    done = CliRunner().invoke(validate, ["-o", "json", *options, str(file)])
    answer = json.loads(done.output)
    assert answer["problems"] == []
    assert done.exit_code == 0
    return {item["field"]: item["expected"] for item in answer["warnings"]}


def cnp(spec: dict[str, Any], kind: str = "CiliumNetworkPolicy") -> dict[str, Any]:
    meta = {"name": "p", **({"namespace": "own"} if kind == "CiliumNetworkPolicy" else {})}
    return {"apiVersion": "cilium.io/v2", "kind": kind, "metadata": meta, "spec": spec}


def labels(**values: str) -> dict[str, Any]:
    return {"matchLabels": values}


def expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"key": key, "operator": operator, **({"values": list(values)} if values else {})}


NEVER: list[tuple[Any, str]] = [
    ({"matchLabels": {"io.kubernetes.pod.namespace.labels.team": "x"}}, SPACE_LABEL),
    ({"matchLabels": {"io.cilium.k8s.namespace.label.team": "x"}}, SPACE_LABEL),
    ({"matchLabels": {"k8s:io.cilium.k8s.namespace.label.team": "x"}}, SPACE_LABEL),
    ({"matchLabels": {"io.kubernetes.pod.name": "x"}}, "no pod has it"),
    ({"matchLabels": {"io.cilium.k8s.policy.name": "x"}}, "no pod has it"),
    ({"matchLabels": {"io.kubernetes.pod.namespaces": "x"}}, NAMESPACE),
    ({"matchLabels": {NAMESPACE: "Not_A_Name"}}, "no namespace"),
    ({"matchLabels": {"reserved:wolrd": ""}}, "reserved"),
    ({"matchLabels": {"reserved:world": "x"}}, "reserved"),
    ({"matchLabels": {"reserved:world": "", "k8s:app": "x"}}, "at once"),
    ({"matchLabels": {"reserved:world": "", "reserved:host": ""}}, "at once"),
    ({"matchLabels": {"cidr:10.0.0.0/8": ""}}, "CIDR"),
    ({"matchLabels": {"k8s:app": "a"}, "matchExpressions": [expression("k8s:app", "In", "b")]}, "at once"),
    ({"matchExpressions": [expression("k8s:app", "In", "a"), expression("k8s:app", "NotIn", "a", "b")]}, "at once"),
    ({"matchExpressions": [expression("app", "Exists"), expression("app", "DoesNotExist")]}, "at once"),
    ({"matchLabels": {NAMESPACE: "a", f"k8s:{NAMESPACE}": "b"}}, "at once"),
    ({"matchExpressions": [expression(NAMESPACE, "DoesNotExist")]}, "at once"),
    ({"matchExpressions": [expression("reserved:all", "DoesNotExist")]}, "reserved:all"),
]
GOOD: list[Any] = [
    {},
    {"matchLabels": {"app": "x"}},
    {"matchLabels": {NAMESPACE: "other", "app": "x"}},
    {"matchLabels": {SPACE_LABEL: "x"}},
    {"matchLabels": {"k8s:io.cilium.k8s.policy.cluster": "other", "io.cilium.k8s.policy.serviceaccount": "me"}},
    {"matchLabels": {"reserved:host": ""}},
    {"matchLabels": {"reserved:all": ""}},
    {"matchLabels": {"container:app": "a", "k8s:app": "b"}},
    {
        "matchLabels": {"app": "a"},
        "matchExpressions": [expression("app", "In", "a", "b"), expression("x", "NotIn", "y")],
    },
    {"matchExpressions": [expression(NAMESPACE, "NotIn", "own")]},
]


def test_selectors_that_nobody_meets(tmp_path: Path) -> None:
    for index, (selector, told) in enumerate(NEVER):
        places = {
            "spec.ingress[0].fromEndpoints[1]": {"ingress": [{"fromEndpoints": [labels(app="x"), selector]}]},
            "spec.egress[0].toEndpoints[0]": {"egress": [{"toEndpoints": [selector]}]},
            "spec.ingress[0].fromRequires[0]": {"ingress": [{"fromRequires": [selector]}]},
        }
        for field, sections in places.items():
            found = warnings_of([cnp({"endpointSelector": {}, **sections})], tmp_path)
            assert list(found) == [field], (index, selector, found)
            assert told in found[field], (index, selector, found)


def test_selectors_that_somebody_may_meet(tmp_path: Path) -> None:
    for selector in GOOD:
        spec = {"endpointSelector": {}, "ingress": [{"fromEndpoints": [selector]}]}
        assert warnings_of([cnp(spec)], tmp_path) == {}, selector


@pytest.mark.parametrize(
    ("subject", "told"),
    [
        (labels(**{NAMESPACE: "other"}), "at once"),
        (labels(**{"reserved:host": ""}), "at once"),
        (labels(**{"reserved:init": "", "app": "x"}), "at once"),
        (labels(**{"io.kubernetes.pod.namespace.labels.team": "x"}), SPACE_LABEL),
    ],
)
def test_subjects_that_nobody_meets(subject: dict[str, Any], told: str, tmp_path: Path) -> None:
    found = warnings_of([cnp({"endpointSelector": subject, "ingress": [{}]})], tmp_path)
    assert list(found) == ["spec.endpointSelector"]
    assert told in found["spec.endpointSelector"]


def test_kubernetes_selectors_that_nobody_meets(tmp_path: Path) -> None:
    head = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "own"},
    }
    never = {"matchExpressions": [expression("a", "In", "x"), expression("a", "NotIn", "x")]}
    spec = {
        "podSelector": never,
        "ingress": [{"from": [{"podSelector": never}, {"namespaceSelector": {"matchLabels": {"team": "x"}}}]}],
        "egress": [{"to": [{"namespaceSelector": never}]}],
    }
    found = warnings_of([{**head, "spec": spec}], tmp_path)
    assert list(found) == ["spec.podSelector", "spec.ingress[0].from[0]", "spec.egress[0].to[0]"]


def test_what_allows_nothing_is_told(tmp_path: Path) -> None:
    group = {"aws": {"securityGroupsIds": ["sg-1"]}}
    spec = {
        "endpointSelector": {},
        "ingress": [{"toPorts": [{"ports": []}]}],
        "egress": [{"toGroups": [group]}, {"toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}]}]}],
    }
    found = warnings_of([cnp(spec)], tmp_path)
    assert list(found) == ["spec.ingress[0].toPorts[0].ports", "spec.egress[0].toGroups[0]"]
    assert all("allows nothing" in text for text in found.values())
    empty = {**cnp({}), "spec": None}
    assert "no rule" in warnings_of([empty], tmp_path)["spec"]


HTTP = {"toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}], "rules": {"http": [{}]}}]}
DNS = {"toPorts": [{"ports": [{"port": "53"}], "rules": {"dns": [{"matchPattern": "*"}]}}]}
NAMES = {"toFQDNs": [{"matchName": "a.example"}]}


@pytest.mark.parametrize(
    ("proxies", "told"),
    [
        ("none", {"spec.ingress[0]": "http", "spec.egress[0]": "dns", "spec.egress[1]": "dns"}),
        ("http", {"spec.egress[0]": "dns", "spec.egress[1]": "dns"}),
        ("dns", {"spec.ingress[0]": "http"}),
        ("dns,http", {}),
        ("all", {}),
    ],
)
def test_rules_that_no_proxy_serves_are_told(proxies: str, told: dict[str, str], tmp_path: Path) -> None:
    item = cnp({"endpointSelector": {}, "ingress": [HTTP], "egress": [DNS, NAMES]})
    found = warnings_of([item], tmp_path, "--proxies", proxies)
    assert list(found) == list(told)
    assert all(f"no proxy for {parser} is active" in found[field] for field, parser in told.items())
