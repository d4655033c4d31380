"""What is wrong with an object of a service: its field, the value that stands there, and what was expected."""

from __future__ import annotations

from typing import Any

import pytest

from ciliate.service.model import ServiceError
from ciliate.service.objects import ServiceObjects


def service(**spec: Any) -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"name": "web"}, "spec": spec}


CASES: list[tuple[dict[str, Any], str, Any, str]] = [
    (service(ports=[{"port": 1}, {"port": "80"}]), "spec.ports[1].port", "80", "an integer"),
    (service(ports=[{"port": 0}]), "spec.ports[0].port", 0, "an integer >= 1"),
    (service(ports=[{"port": 65536}]), "spec.ports[0].port", 65536, "an integer <= 65535"),
    (service(ports=[{"port": True}]), "spec.ports[0].port", True, "an integer"),
    (service(ports=[{"port": 80, "protocol": "X"}]), "spec.ports[0].protocol", "X", "one of TCP, UDP, SCTP"),
    (service(ports=[{"port": 80, "protocol": 6}]), "spec.ports[0].protocol", 6, "a text or null"),
    (service(ports=[{}]), "spec.ports[0].port", None, "it to be there"),
    (service(ports={"a": 1}), "spec.ports", {"a": 1}, "a list or null"),
    (service(selector={"a": "b", "c": 1}), "spec.selector.c", 1, "a text"),
    (service(selector=[]), "spec.selector", [], "a mapping or null"),
    (
        service(sessionAffinityConfig={"clientIP": {"timeoutSeconds": 0}}),
        "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        0,
        "an integer >= 1",
    ),
    (service(sessionAffinity=[1, 10**30]), "spec.sessionAffinity", [1, 10**30], "a text or null"),
    (service(other={"x": [1, 10**30]}), "spec.other.x[1]", 10**30, "numbers of at most 64 bits"),
    ({"kind": "Service"}, "metadata", None, "it to be there"),
    ({"kind": "Service", "metadata": {}}, "metadata.name", None, "it to be there"),
    ({"kind": "Service", "metadata": {"name": 5}}, "metadata.name", 5, "a text"),
    ({"kind": "Service", "metadata": {"name": "w", "labels": {"a": None}}}, "metadata.labels.a", None, "a text"),
    ({"kind": "Service", "metadata": []}, "metadata", [], "a mapping"),
    (
        {"kind": "Endpoints", "metadata": {"name": "w"}, "subsets": [{"addresses": [{"ip": "1.1.1.1"}, {"ip": 1}]}]},
        "subsets[0].addresses[1].ip",
        1,
        "a text",
    ),
    (
        {"kind": "EndpointSlice", "metadata": {"name": "w"}, "endpoints": [{}]},
        "endpoints[0].addresses",
        None,
        "it to be there",
    ),
]


def test_the_value_is_shown_and_its_field() -> None:
    for obj, field, value, expected in CASES:
        with pytest.raises(ServiceError) as caught:
            ServiceObjects().upsert([service(), obj])
        (problem,) = caught.value.problems
        told = (problem.field, problem.value, problem.expected)
        assert told == (f"objects[1].{field}", value, expected), (told, field)


def test_long_values_are_cut() -> None:
    with pytest.raises(ServiceError) as caught:
        ServiceObjects().upsert([service(ports={str(number): number for number in range(1000)})])
    assert len(str(caught.value)) < 300
