"""The scenario format: what a flow, an expectation and a step may say, and what is said of their mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ciliate.policy.problems import PolicyError
from ciliate.scenario import report
from ciliate.scenario.model import Scenario, load_scenarios
from ciliate.scenario.run import simulate

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "a", "namespace": "default", "labels": {"app": "a"}},
    "spec": {"containers": [{"name": "c", "image": "c"}]},
}
FLOW = {"from": "default/a", "to": "entity/world", "port": 80, "protocol": "TCP", "verdict": "allow"}
DENY_ALL = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "none", "namespace": "default"},
    "spec": {"podSelector": {}, "policyTypes": ["Egress"]},
}


def scenario(tmp_path: Path, spec: dict[str, Any], *objects: dict[str, Any]) -> Scenario:
    expectation = {"apiVersion": "ciliate.io/v1alpha1", "kind": "Expectation", "spec": spec}
    file = tmp_path / "scenario.yaml"
    file.write_text("\n---\n".join(yaml.safe_dump(item) for item in (POD, *objects, expectation)))
    return load_scenarios([file])[0]


MISTAKES = {
    "family of no address": ({"flows": [{**FLOW, "family": 5}]}, "spec.flows[0].family", "expected 4 or 6"),
    "family beside an address": (
        {"flows": [{**FLOW, "to": "ip/198.51.100.1", "family": 6}]},
        "spec.flows[0].family",
        "expected 4, the family of its address",
    ),
    "family beside a protocol": (
        {"flows": [{**FLOW, "port": None, "protocol": "ICMPv6", "family": 4}]},
        "spec.flows[0].family",
        "expected 6",
    ),
    "localhost": ({"allowLocalhost": "maybe"}, "spec.allowLocalhost", "expected auto, always or policy"),
    "record": ({"dns": {"records": {"a.example": ["x"]}}}, "spec.dns.records.a.example[0]", "expected an IPv4 or IPv6"),
    "seen": ({"dns": {"records": {}, "seen": ["a.example"]}}, "spec.dns.seen[0]", "a name of spec.dns.records"),
    "generic": ({"flows": [{**FLOW, "generic": {"fields": {}}}]}, "spec.flows[0].generic", "l7proto"),
    "two requests": (
        {"flows": [{**FLOW, "generic": {"l7proto": "x"}, "dns": {"name": "x"}}]},
        "spec.flows[0]",
        "only one of http, dns, kafka and generic",
    ),
    "step's flow": ({"steps": [{"flows": [{**FLOW, "port": 0}]}]}, "spec.steps[0].flows[0].port", "a port"),
    "step's object": ({"steps": [{"apply": [{"kind": "Pod"}]}]}, "spec.steps[0].apply[0]", "expected"),
    "step's deletion": ({"steps": [{"delete": [{"name": "x"}]}]}, "spec.steps[0].delete[0].kind", "the kind"),
    "unknown": ({"stages": []}, "spec.stages", "allowLocalhost, dns, enforcement"),
}


@pytest.mark.parametrize(("spec", "field", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_by_its_field(tmp_path: Path, spec: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        scenario(tmp_path, spec)
    texts = [problem.text for problem in caught.value.problems]
    assert any(field in text and words in text for text in texts), texts


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"labels": ["reserved:host"]}, "spec.labels[0]"),
        ({"labels": ["container:-"]}, "spec.labels[0]"),
        ({"labels": [1]}, "spec.labels[0]"),
        ({"ports": [{"name": "web", "port": 70000}]}, "spec.ports[0].port"),
        ({"image": "x"}, "spec.image"),
    ],
)
def test_a_mistake_in_a_workload_is_named_by_its_field(tmp_path: Path, spec: dict[str, Any], field: str) -> None:
    workload = {"apiVersion": "ciliate.io/v1alpha1", "kind": "Workload", "metadata": {"name": "w"}, "spec": spec}
    with pytest.raises(PolicyError) as caught:
        simulate([scenario(tmp_path, {"flows": [FLOW]}, workload)])
    assert field in str(caught.value)


def test_a_step_changes_what_comes_after_it_and_its_flows_bear_its_name(tmp_path: Path) -> None:
    gone = {"kind": "NetworkPolicy", "namespace": "default", "name": "none"}
    steps = [
        {"apply": [DENY_ALL], "flows": [{**FLOW, "verdict": "deny"}]},
        {"name": "open", "delete": [gone], "flows": [FLOW]},
    ]
    results = simulate([scenario(tmp_path, {"flows": [FLOW], "steps": steps})])
    assert report.failed(results) == 0
    assert [item.step for item in results[0].flows] == ["", "step 1", "open"]
    assert [item.get("step") for item in report.to_json(results)["scenarios"][0]["flows"]] == [None, "step 1", "open"]
    assert "after open:" in report.render_table(results).splitlines()


def test_a_step_that_deletes_what_is_not_there_is_refused(tmp_path: Path) -> None:
    steps = [{"name": "late", "delete": [{"kind": "Pod", "namespace": "default", "name": "b"}]}]
    with pytest.raises(PolicyError, match=r"step late.*Pod/default/b"):
        simulate([scenario(tmp_path, {"steps": steps})])


def test_a_flow_of_a_family_that_its_pod_has_not_is_refused(tmp_path: Path) -> None:
    pod = {**POD, "metadata": {"name": "four", "namespace": "default"}, "status": {"podIP": "10.1.0.4"}}
    with pytest.raises(PolicyError, match=r"default/four.*IPv6 address"):
        simulate([scenario(tmp_path, {"flows": [{**FLOW, "from": "default/four", "family": 6}]}, pod)])


def test_a_name_without_an_address_of_the_family_is_refused(tmp_path: Path) -> None:
    spec = {
        "dns": {"records": {"a.example": ["198.51.100.1"]}},
        "flows": [{**FLOW, "to": "fqdn/a.example", "family": 6}],
    }
    with pytest.raises(PolicyError, match=r"fqdn/a\.example.*IPv6"):
        simulate([scenario(tmp_path, spec)])
