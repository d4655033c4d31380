"""Hints beside unknown names: a typing error of one name is told, another word never becomes a known one."""

from __future__ import annotations

from typing import Any

import pytest

from ciliate.config import ConfigError, load_config
from ciliate.manifest import Document
from ciliate.policy.importer import check_document

HEAD = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p", "namespace": "n"}}
KUBERNETES = {**HEAD, "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
OTHER_WORDS = [
    ({"egressDeny": []}, {}),
    ({"ingressDeny": []}, {}),
    ({"notIngress": []}, {}),
    ({"enableDefaultDeny": {}}, {}),
    ({"nodeSelector": {}}, {}),
    # could be either
    ({"igress": []}, {}),
    ({}, {"fromEndpointsDeny": []}),
    ({}, {"fromEndpointsExcept": []}),
    ({}, {"toEndpoints": []}),
    ({}, {"toEntities": []}),
    ({}, {"toCIDR": []}),
    ({}, {"toCIDRSet": []}),
    ({}, {"fromNodes": []}),
    ({}, {"fromGroups": []}),
    ({}, {"icmps": []}),
    ({}, {"authentication": {}}),
    ({}, {"toPortsDeny": []}),
    ({}, {"toPorts": [{"noports": []}]}),
    ({}, {"toPorts": [{"ports": [{"port": "80", "protocols": "TCP"}], "listener": {}}]}),
    ({}, {"toPorts": [{"ports": [], "rules": {"grpc": [{}]}}]}),
    ({}, {"fromEndpoints": [{"notMatchLabels": {}}]}),
    ({}, {"fromCIDRSet": [{"cidr": "10.0.0.0/8", "exceptCIDRs": []}]}),
]
TYPING_ERRORS = [
    ({"ingres": []}, {}, "ingress"),
    ({"Egress": []}, {}, "egress"),
    ({"endpointselector": {}}, {}, "endpointSelector"),
    ({"endpoint_selector": {}}, {}, "endpointSelector"),
    ({}, {"fromEndpoint": []}, "fromEndpoints"),
    ({}, {"formEndpoints": []}, "fromEndpoints"),
    ({}, {"fromRequire": []}, "fromRequires"),
    ({}, {"toPort": []}, "toPorts"),
    ({}, {"fromCIDRset": []}, "fromCIDRSet"),
    ({}, {"fromEndpoints": [{"matchLabel": {}}]}, "matchLabels"),
]


def _hints(spec: dict[str, Any], section: dict[str, Any]) -> list[str]:
    whole = {**HEAD, "spec": {"endpointSelector": {}, "ingress": [section], **spec}}
    return [item.expected for item in check_document(Document(whole)) if "unknown field" in item.expected]


def test_another_word_is_no_typing_error() -> None:
    wrong = []
    for spec, section in OTHER_WORDS:
        told = _hints(spec, section)
        assert told, (spec, section)
        wrong += [text for text in told if "did you mean" in text and "protocols" not in str(section)]
    assert not wrong


@pytest.mark.parametrize("name", ["egressDeny", "ingressDeny", "enableDefaultDeny"])
def test_fields_of_later_versions_are_told_as_such(name: str) -> None:
    (told,) = _hints({name: []}, {})
    assert "later versions" in told


@pytest.mark.parametrize(("spec", "section", "meant"), TYPING_ERRORS)
def test_a_typing_error_is_told(spec: dict[str, Any], section: dict[str, Any], meant: str) -> None:
    assert any(text.endswith(f"did you mean {meant}?") for text in _hints(spec, section))


def test_kubernetes_policies_as_well() -> None:
    whole = {**KUBERNETES, "spec": {"podSelector": {}, "ingress": [{"form": [], "port": []}], "egressDeny": []}}
    told = {item.field: item.expected for item in check_document(Document(whole))}
    assert told["spec.ingress[0].form"].endswith("did you mean from?")
    assert told["spec.ingress[0].port"].endswith("did you mean ports?")


def test_options_of_the_agent_as_well() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"disable-ipv4": "true"}, {})
    assert "did you mean" not in str(caught.value)
