"""Layer-7 and DNS rules where no proxy is active, or one is down: what is told of a flow is what the datapath does."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from ciliate.identity import Identity
from ciliate.labels import LabelSet
from ciliate.manifest import loads
from ciliate.policy.importer import is_policy
from ciliate.policy.mapstate import INGRESS, Verdict, lookup
from ciliate.policy.repository import PolicySettings, Repository
from ciliate.policy.trace import End, Explanation, trace

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}]
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules: {http: [{method: GET}]}
    - ports: [{port: "81", protocol: TCP}]
  egress:
  - toFQDNs: [{matchName: a.example}]
"""
SCENARIO = f"""{POLICY}
---
kind: Pod
apiVersion: v1
metadata: {{name: api, namespace: shop, labels: {{app: api}}}}
---
kind: Pod
apiVersion: v1
metadata: {{name: web, namespace: shop, labels: {{app: web}}}}
---
apiVersion: ciliate.io/v1alpha1
kind: Expectation
spec:
  flows:
  - {{from: shop/web, to: shop/api, port: 80, verdict: %s}}
  - {{from: shop/web, to: shop/api, port: 80, http: {{method: GET}}, verdict: %s}}
  - {{from: shop/web, to: shop/api, port: 80, http: {{method: PUT}}, verdict: deny}}
  - {{from: shop/web, to: shop/api, port: 81, verdict: allow}}
  - {{from: shop/api, to: fqdn/a.example, port: 443, verdict: %s}}
"""
WEB, API = (End(LabelSet.from_mapping({"app": app, "io.kubernetes.pod.namespace": "shop"})) for app in ("web", "api"))


def traced(settings: PolicySettings, port: int = 80) -> tuple[Explanation, Verdict, int]:
    """The explanation of a flow, and what the map state says of it."""
    repository = Repository(settings)
    repository.upsert_identities([Identity(1001, WEB.labels), Identity(1002, API.labels)])
    repository.import_documents([item for item in loads(POLICY, "p.yaml") if is_policy(item.object)])
    repository.register_endpoint(1, 1002)
    entry = lookup(repository.resolve(1).map_state, INGRESS, 1001, 6, port)
    assert entry is not None
    return trace(repository, WEB, API, "TCP", port), entry.verdict, entry.proxy_port


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (PolicySettings(), "no proxy for http is active"),
        (PolicySettings(proxies=(("dns", 10001),)), "no proxy for http is active"),
    ],
)
def test_trace_denies_what_no_proxy_takes(settings: PolicySettings, why: str) -> None:
    found, verdict, port = traced(settings)
    assert (verdict, port) == (Verdict.REDIRECT, 0)
    assert found.verdict == "deny"
    assert found.lines[-1] == "Final verdict: DENIED"
    (side,) = [side for side in found.sides if side.direction == "ingress"]
    assert side.verdict == "denied"
    assert why in side.why
    assert side.rule is not None
    assert side.rule.path == "spec.ingress[0]"


def test_trace_tells_why_a_proxy_is_down() -> None:
    settings = PolicySettings(proxies=(("dns", 10001),), proxies_down=(("http", "envoy: exited with 1"),))
    found, verdict, port = traced(settings)
    assert (verdict, port, found.verdict) == (Verdict.REDIRECT, 0, "deny")
    assert any("the proxy for http is down: envoy: exited with 1" in line for line in found.lines)


def test_trace_allows_what_a_proxy_takes_and_what_needs_none() -> None:
    found, verdict, port = traced(PolicySettings(proxies=(("http", 10001),)))
    assert (verdict, port, found.verdict) == (Verdict.REDIRECT, 10001, "allow")
    found, verdict, _ = traced(PolicySettings(), 81)
    assert (verdict, found.verdict) == (Verdict.ALLOW, "allow")


@pytest.mark.parametrize(
    ("proxies", "http", "dns"),
    [("none", "deny", "deny"), ("http", "allow", "deny"), ("dns", "deny", "allow"), ("all", "allow", "allow")],
)
def test_simulate_answers_for_the_proxies_that_are_named(
    proxies: str, http: str, dns: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from ciliate.cli.policy_offline import simulate

    file = tmp_path_factory.mktemp("proxies") / "scenario.yaml"
    file.write_text(SCENARIO % (http, http, dns))
    done = CliRunner().invoke(simulate, ["--proxies", proxies, str(file)])
    assert done.exit_code == 0, done.output


def test_simulate_says_what_it_counts_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    from ciliate.cli.policy_offline import simulate

    file = tmp_path_factory.mktemp("proxies") / "scenario.yaml"
    file.write_text(SCENARIO % ("allow", "allow", "allow"))
    done = CliRunner().invoke(simulate, [str(file)])
    assert done.exit_code == 0
    assert "taken to be active: dns, http" in done.stderr
