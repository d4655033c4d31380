"""Refusals: each names the field, the value and what is expected; nothing crashes; nothing is half imported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.policy.generated import cilium_policies, k8s_policies

from ciliate import manifest
from ciliate.manifest import Document, ManifestError
from ciliate.policy.importer import check_document, is_policy, parse_documents
from ciliate.policy.problems import PolicyError
from ciliate.policy.repository import Repository
from ciliate.policy.simulate import Simulation

EXAMPLES = Path(__file__).parents[3] / "examples"
REAL = [document for document in manifest.load([EXAMPLES / "scenarios"]) if is_policy(document.object)]
NAMED = [item.object for item in REAL if "metadata" in item.object]


def _cnp(spec: Any) -> Document:
    head = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p", "namespace": "n"}}
    return Document({**head, "spec": spec}, "f.yaml", 3)


def _knp(spec: Any) -> Document:
    head = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "n"}}
    return Document({**head, "spec": spec}, "f.yaml", 3)


def _in(section: Any) -> Document:
    return _cnp({"endpointSelector": {}, "ingress": [section]})


def _out(section: Any) -> Document:
    return _cnp({"endpointSelector": {}, "egress": [section]})


def _port(port: Any, rules: Any = None) -> Document:
    return _in({"toPorts": [{"ports": [port], **({"rules": rules} if rules is not None else {})}]})


TCP80 = {"port": "80", "protocol": "TCP"}
CASES = [
    (_cnp({"ingress": []}), "spec.endpointSelector", "expected a selector"),
    (_cnp({"endpointSelector": {}, "ingres": []}), "spec.ingres", "did you mean ingress"),
    (
        _in({"fromEndpoints": [{}], "fromCIDR": ["1.1.1.1/32"]}),
        "spec.ingress[0]",
        "combining fromEndpoints and fromCIDR",
    ),
    (_out({"toEntities": ["world"], "toFQDNs": [{"matchName": "a.b"}]}), "spec.egress[0]", "combining"),
    (_in({"toEndpoints": [{}]}), "spec.ingress[0].toEndpoints", "unknown field"),
    (_in({"fromEntities": ["universe"]}), "spec.ingress[0].fromEntities[0]", "expected one of all, world"),
    (_in({"fromCIDR": ["1.2.3/24"]}), "spec.ingress[0].fromCIDR[0]", "expected a CIDR"),
    (_in({"fromCIDR": ["1.2.3.4/33"]}), "spec.ingress[0].fromCIDR[0]", "expected a CIDR"),
    (
        _in({"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}]}),
        "spec.ingress[0].fromCIDRSet[0].except[0]",
        "inside",
    ),
    (_port({"port": "0"}), "spec.ingress[0].toPorts[0].ports[0].port", "1 to 65535"),
    (_port({"port": ""}), "spec.ingress[0].toPorts[0].ports[0].port", "1 to 65535"),
    (_port({"port": "65536"}), "spec.ingress[0].toPorts[0].ports[0].port", "1 to 65535"),
    (_port({"port": "-1"}), "spec.ingress[0].toPorts[0].ports[0].port", "1 to 65535"),
    (_port({"port": 80}), "spec.ingress[0].toPorts[0].ports[0].port", "in quotes"),
    (_port({"port": "80", "protocol": "GRE"}), "spec.ingress[0].toPorts[0].ports[0].protocol", "TCP, UDP, SCTP"),
    (_port({"port": "80", "endPort": 79}), "spec.ingress[0].toPorts[0].ports[0].endPort", "from port (80)"),
    (_port({"port": "256", "protocol": "ICMP"}), "spec.ingress[0].toPorts[0].ports[0].port", "0 to 255"),
    (_in({"toPorts": [{"ports": [TCP80] * 41}]}), "spec.ingress[0].toPorts[0].ports", "at most 40"),
    (
        _port({"port": "80", "protocol": "UDP"}, {"http": [{}]}),
        "spec.ingress[0].toPorts[0].ports[0].protocol",
        "expected TCP",
    ),
    (_port({"port": "80"}, {"http": [{}]}), "spec.ingress[0].toPorts[0].ports[0].protocol", "expected TCP"),
    (_port(TCP80, {"http": [{}], "kafka": [{}]}), "spec.ingress[0].toPorts[0].rules", "one kind only"),
    (_port(TCP80, {"l7": [{"a": "b"}]}), "spec.ingress[0].toPorts[0].rules.l7", "l7proto"),
    (_port(TCP80, {"http": [{"path": "("}]}), "spec.ingress[0].toPorts[0].rules.http[0].path", "regular expression"),
    (
        _port(TCP80, {"http": [{"headers": ["bad name: x"]}]}),
        "spec.ingress[0].toPorts[0].rules.http[0].headers[0]",
        "Name",
    ),
    (_port(TCP80, {"dns": [{"matchName": "a.b"}]}), "spec.ingress[0].toPorts[0].ports[0].port", '"53"'),
    (_port(TCP80, {"kafka": [{"role": "eat"}]}), "spec.ingress[0].toPorts[0].rules.kafka[0].role", "produce"),
    (
        _port(TCP80, {"kafka": [{"role": "produce", "apiKey": "fetch"}]}),
        "spec.ingress[0].toPorts[0].rules.kafka[0]",
        "only one",
    ),
    (_port(TCP80, {"kafka": [{"apiKey": "x"}]}), "spec.ingress[0].toPorts[0].rules.kafka[0].apiKey", "Kafka request"),
    (_port(TCP80, {"kafka": [{"apiVersion": "x"}]}), "spec.ingress[0].toPorts[0].rules.kafka[0].apiVersion", "number"),
    (_port(TCP80, {"kafka": [{"topic": "a b"}]}), "spec.ingress[0].toPorts[0].rules.kafka[0].topic", "255"),
    (
        _port(TCP80, {"l7proto": "r2d2", "l7": [{"speed": "1"}]}),
        "spec.ingress[0].toPorts[0].rules.l7[0].speed",
        "unknown field",
    ),
    (_out({"toFQDNs": [{}]}), "spec.egress[0].toFQDNs[0]", "one of matchName"),
    (_out({"toFQDNs": [{"matchName": "a", "matchPattern": "b"}]}), "spec.egress[0].toFQDNs[0]", "together"),
    (_out({"toFQDNs": [{"matchName": "*.a"}]}), "spec.egress[0].toFQDNs[0].matchName", "DNS name"),
    (_out({"toServices": [{}]}), "spec.egress[0].toServices[0]", "k8sService"),
    (_out({"toGroups": [{"aws": {}}]}), "spec.egress[0].toGroups[0].aws", "securityGroupsIds"),
    (_in({"fromEndpoints": [{"matchLabels": {"a": 1}}]}), "spec.ingress[0].fromEndpoints[0].matchLabels.a", "text"),
    (
        _in({"fromEndpoints": [{"matchLabels": {"a b": "c"}}]}),
        "spec.ingress[0].fromEndpoints[0].matchLabels.a b",
        "label key",
    ),
    (
        _in({"fromEndpoints": [{"matchLabels": {"cilium-generated:a": "c"}}]}),
        "spec.ingress[0].fromEndpoints[0].matchLabels.cilium-generated:a",
        "system's own",
    ),
    (
        _in({"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "Is"}]}]}),
        "spec.ingress[0].fromEndpoints[0].matchExpressions[0].operator",
        "In, NotIn",
    ),
    (
        _in({"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "In"}]}]}),
        "spec.ingress[0].fromEndpoints[0].matchExpressions[0].values",
        "at least one",
    ),
    (
        _in({"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}]}),
        "spec.ingress[0].fromEndpoints[0].matchExpressions[0].values",
        "no values",
    ),
    (
        _cnp({"endpointSelector": {}, "labels": [{"key": "a", "source": "cilium-generated"}]}),
        "spec.labels[0].source",
        "system's own",
    ),
    (_knp({"ingress": []}), "spec.podSelector", "expected a selector"),
    (_knp({"podSelector": {}, "policyTypes": ["Both"]}), "spec.policyTypes[0]", "Ingress or Egress"),
    (
        _knp({"podSelector": {}, "ingress": [{"from": [{}]}]}),
        "spec.ingress[0].from[0]",
        "podSelector, namespaceSelector or ipBlock",
    ),
    (
        _knp({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]}),
        "spec.ingress[0].from[0]",
        "without selectors",
    ),
    (
        _knp(
            {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}]}]}
        ),
        "spec.ingress[0].from[0].ipBlock.except[0]",
        "smaller",
    ),
    (
        _knp({"podSelector": {}, "ingress": [{"ports": [{"port": "80"}]}]}),
        "spec.ingress[0].ports[0].port",
        "without quotes",
    ),
    (
        _knp({"podSelector": {}, "ingress": [{"ports": [{"port": "a", "endPort": 9}]}]}),
        "spec.ingress[0].ports[0].endPort",
        "not a port name",
    ),
    (
        _knp({"podSelector": {}, "ingress": [{"ports": [{"endPort": 9}]}]}),
        "spec.ingress[0].ports[0].endPort",
        "beside a port number",
    ),
    (
        _knp({"podSelector": {}, "ingress": [{"ports": [{"protocol": "ANY"}]}]}),
        "spec.ingress[0].ports[0].protocol",
        "TCP, UDP, SCTP",
    ),
    (
        Document({"kind": "CiliumNetworkPolicy", "metadata": {"name": "p"}, "spec": {"endpointSelector": {}}}),
        "apiVersion",
        "cilium.io/v2",
    ),
    (
        Document(
            {
                "apiVersion": "cilium.io/v2",
                "kind": "CiliumNetworkPolicy",
                "metadata": {"name": "P"},
                "spec": {"endpointSelector": {}},
            }
        ),
        "metadata.name",
        "lower-case",
    ),
    (Document({**_cnp({}).object, "description": ["x"]}), "description", "expected text"),
    (Document({**_knp({"podSelector": {}}).object, "description": "x"}), "description", "unknown field"),
    (Document({**_knp({"podSelector": {}}).object, "specs": []}), "specs", "unknown field"),
    (Document({"kind": "Policy"}), "kind", "expected one of"),
]


@pytest.mark.parametrize(
    ("document", "field", "expected"), CASES, ids=[f"{i}-{case[1]}" for i, case in enumerate(CASES)]
)
def test_refusal(document: Document, field: str, expected: str) -> None:
    problems = check_document(document)
    assert any(problem.field == field and expected in problem.expected for problem in problems), problems


def test_every_problem_of_an_object_at_once() -> None:
    document = _in({"fromEntities": ["x"], "toPorts": [{"ports": [{"port": "0"}, {"port": "80", "protocol": "Y"}]}]})
    assert len(check_document(document)) == 3


def test_an_import_is_all_or_nothing() -> None:
    repository = Repository()
    good = _cnp({"endpointSelector": {}})
    bad = _in({"fromEntities": ["x"]})
    bad.object["metadata"] = {"name": "bad"}
    before = repository.revision
    with pytest.raises(PolicyError) as caught:
        repository.import_documents([good, bad])
    assert [problem.text for problem in caught.value.problems] == [
        "f.yaml:3: CiliumNetworkPolicy bad: spec.ingress[0].fromEntities[0]: 'x' given, "
        "expected one of all, world, cluster, host, init, none"
    ]
    assert (repository.objects(), repository.revision) == ([], before)


def test_one_name_twice_in_an_import_is_refused() -> None:
    with pytest.raises(PolicyError, match="expected one object of this name"):
        parse_documents([_cnp({"endpointSelector": {}}), _cnp({"endpointSelector": {}})])


def test_bare_rules_belong_to_no_namespace() -> None:
    documents = manifest.loads(
        '[{"endpointSelector": {"matchLabels": {"a": "b"}}, "ingress": [{"fromEndpoints": [{}]}]}]', "r.json"
    )
    (item,) = parse_documents(documents)
    assert item.rules[0].ingress is not None
    assert item.rules[0].ingress[0].peers is None
    assert len(item.rules[0].subject.requirements) == 1


JUNK = st.one_of(
    *(
        st.just(item)
        for item in (
            None,
            True,
            -1,
            10**30,
            0.5,
            "",
            "x" * 300,
            "a b",
            "*",
            [],
            {},
            [[]],
            [None],
            {"": 0},
            "\x00",
            "1.1.1.1/99",
        )
    )
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    found = []
    if isinstance(value, dict):
        found = [(value, key) for key in value] + [place for item in value.values() for place in _places(item)]
    elif isinstance(value, list):
        found = [(value, index) for index in range(len(value))] + [place for item in value for place in _places(item)]
    return found


def _mutate(data: Any, obj: dict[str, Any]) -> dict[str, Any]:
    obj = copy.deepcopy(obj)
    for _ in range(data.draw(st.integers(1, 3))):
        places = _places(obj)
        holder, key = places[data.draw(st.integers(0, len(places) - 1))]
        action = data.draw(st.sampled_from(["junk", "drop", "rename"]))
        if action == "junk":
            holder[key] = copy.deepcopy(data.draw(JUNK))
        elif action == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        if not obj:
            break
    return obj


@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.one_of(st.sampled_from(NAMED), cilium_policies(), k8s_policies()))
def test_mutated_objects_are_refused_by_field_or_sound(data: Any, original: dict[str, Any]) -> None:
    mutated = _mutate(data, {**original, "metadata": {"name": "p", **original["metadata"]}})
    repository = Repository()
    document = Document(mutated, "m.yaml", 1)
    try:
        repository.import_documents([document])
    except PolicyError as error:
        assert error.problems
        assert all(problem.field and problem.expected for problem in error.problems), error.problems
        assert repository.objects() == []
        assert repository.revision == 1


@settings(max_examples=1000, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=12,
    ),
    st.sampled_from(["spec", "specs", "metadata"]),
    st.sampled_from([_cnp({"endpointSelector": {}}), _knp({"podSelector": {}})]),
)
def test_arbitrary_values_never_crash(value: Any, field: str, base: Document) -> None:
    document = Document({**base.object, field: value})
    assert all(problem.field for problem in check_document(document))


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=80))
def test_arbitrary_text_is_read_or_refused(text: str) -> None:
    try:
        manifest.loads(text, "t.yaml")
    except ManifestError as error:
        assert str(error).startswith("t.yaml:")


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"name": "x", "labels": {"user": "admin;k8s:zone=x"}}, "metadata.labels.user"),
        ({"name": "x", "labels": {"user=admin": "x"}}, "metadata.labels.user=admin"),
        ({"name": "x", "namespace": "a;b"}, "metadata.namespace"),
    ],
)
def test_labels_of_manifests_are_those_that_kubernetes_takes(metadata: dict[str, Any], field: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Simulation([{"apiVersion": "v1", "kind": "Pod", "metadata": metadata}])
    assert [problem.field for problem in caught.value.problems] == [field]
