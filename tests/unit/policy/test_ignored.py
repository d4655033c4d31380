"""Selectors by labels that no identity has are told, wherever in a policy they stand."""

from __future__ import annotations

import pytest

from ciliate.identity.filter import LabelFilter
from ciliate.manifest import loads
from ciliate.policy.cautions import cautions
from ciliate.policy.importer import parse_documents
from ciliate.policy.simulate import Simulation

HEAD = "kind: {kind}\napiVersion: {version}\nmetadata: {{name: p, namespace: default}}\nspec:\n"
KUBERNETES = HEAD.format(kind="NetworkPolicy", version="networking.k8s.io/v1")
CILIUM = HEAD.format(kind="CiliumNetworkPolicy", version="cilium.io/v2")
CASES = [
    (KUBERNETES + "  podSelector: {matchLabels: {app.kubernetes.io/name: web, app: web}}", []),
    (KUBERNETES + "  podSelector: {matchLabels: {pod-template-hash: x}}", ["pod-template-hash"]),
    (
        KUBERNETES + "  podSelector: {}\n  egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/x: y}}}]}]",
        [],
    ),
    (
        KUBERNETES + "  podSelector: {}\n  ingress: [{from: [{podSelector: {matchExpressions: "
        "[{key: statefulset.kubernetes.io/pod-name, operator: Exists}]}}]}]",
        ["statefulset.kubernetes.io/pod-name"],
    ),
    (
        CILIUM
        + "  endpointSelector: {}\n  ingress: [{fromRequires: [{matchLabels: {'k8s:controller-revision-hash': a}}], "
        "fromEndpoints: [{matchLabels: {'any:pod-template-generation': b, 'container:etcd_node': c}}]}]",
        ["controller-revision-hash", "pod-template-generation"],
    ),
]


@pytest.mark.parametrize(("text", "keys"), CASES)
def test_keys_that_are_left_out_are_told(text: str, keys: list[str]) -> None:
    (item,) = parse_documents(loads(text, "policy.yaml"))
    found = [problem.text for problem in cautions(item, LabelFilter().keeps)]
    assert sorted(line.split(": label ")[1].split(" is no part")[0] for line in found) == keys
    assert all(f"{item.kind} default/p: spec." in line and line.startswith("policy.yaml:") for line in found)


def test_the_simulator_leaves_out_what_agents_leave_out() -> None:
    pods = "".join(
        f"kind: Pod\napiVersion: v1\nmetadata: {{name: {name}, labels: {{{label}: x}}}}\n"
        "spec: {containers: [{name: c, image: c}]}\n---\n"
        for name, label in (("one", "app.kubernetes.io/name"), ("two", "batch.kubernetes.io/job-name"))
    )
    for label, verdict in (("app.kubernetes.io/name", "deny"), ("batch.kubernetes.io/job-name", "allow")):
        policy = f"{KUBERNETES}  podSelector: {{matchLabels: {{{label}: x}}}}"
        simulation = Simulation(loads(pods + policy, "all.yaml"))
        flow = {"from": "entity/world", "to": "default/one" if verdict == "deny" else "default/two", "port": 80}
        assert simulation.verdict({**flow, "protocol": "TCP"}).verdict == verdict
