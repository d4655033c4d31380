"""From Kubernetes' objects to services."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ciliate.datapath import lblayout
from ciliate.service.manager import entry_of
from ciliate.service.model import Rules, ServiceError, check
from ciliate.service.objects import ServiceObjects, Surroundings
from ciliate.service.table import ServiceTable, split_key

NAME = ("default", "web")
AROUND = Surroundings(
    (ip_address("192.0.2.1"), ip_address("2001:db8::1")), "node1", Rules(external=(ip_network("203.0.113.0/24"),))
)


def service(**spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    fields = {"clusterIP": "10.96.0.1", "selector": {"app": "web"}, "ports": ports, **spec}
    return {"kind": "Service", "metadata": {"name": "web"}, "spec": fields}


def slice_of(name: str, *addresses: str, ready: bool = True, node: str | None = None) -> dict[str, Any]:
    return {
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "endpoints": [{"addresses": list(addresses), "conditions": {"ready": ready}, "nodeName": node}],
        "ports": [{"name": "http", "port": 8080}],
    }


def endpoints(*addresses: str) -> dict[str, Any]:
    subset = {"addresses": [{"ip": text} for text in addresses], "ports": [{"name": "http", "port": 8080}]}
    return {"kind": "Endpoints", "metadata": {"name": "web"}, "subsets": [subset]}


def made(*objects: dict[str, Any]) -> dict[str, list[str]]:
    """Type and frontend of each service with its backends."""
    known = ServiceObjects()
    known.upsert(objects)
    return {
        f"{item.type} {item.frontend_address}": [str(backend) for backend in item.backend_addresses]
        for item in known.specs(NAME, AROUND)
    }


BACKEND = ["10.0.0.1:8080"]
CASES = [
    ((service(),), {"ClusterIP 10.96.0.1:80/TCP": []}),
    ((service(), endpoints("10.0.0.1")), {"ClusterIP 10.96.0.1:80/TCP": BACKEND}),
    ((service(), slice_of("a", "10.0.0.1"), endpoints("10.0.0.9")), {"ClusterIP 10.96.0.1:80/TCP": BACKEND}),
    ((service(), slice_of("a", "10.0.0.1"), slice_of("b", "10.0.0.1")), {"ClusterIP 10.96.0.1:80/TCP": BACKEND}),
    ((service(), slice_of("a", "10.0.0.1", ready=False)), {"ClusterIP 10.96.0.1:80/TCP": []}),
    ((service(clusterIP="None"), endpoints("10.0.0.1")), {}),
    ((service(type="ExternalName"),), {}),
    ((endpoints("10.0.0.1"),), {}),
    (
        (service(clusterIPs=["10.96.0.1", "fd10::1"]), endpoints("10.0.0.1", "fd00::1")),
        {"ClusterIP 10.96.0.1:80/TCP": BACKEND, "ClusterIP [fd10::1]:80/TCP": ["[fd00::1]:8080"]},
    ),
    (
        (service(ports=[{"name": "http", "port": 80, "nodePort": 30080}]), endpoints("10.0.0.1")),
        {
            "ClusterIP 10.96.0.1:80/TCP": BACKEND,
            "NodePort 192.0.2.1:30080/TCP": BACKEND,
            "NodePort [2001:db8::1]:30080/TCP": [],
            "NodePort 0.0.0.0:30080/TCP": BACKEND,
            "NodePort [::]:30080/TCP": [],
        },
    ),
    (
        (service(externalIPs=["203.0.113.5", "8.8.8.8"]), endpoints("10.0.0.1")),
        {"ClusterIP 10.96.0.1:80/TCP": BACKEND, "ExternalIP 203.0.113.5:80/TCP": BACKEND},
    ),
    ((service(ports=[{"name": "other", "port": 80}]), endpoints("10.0.0.1")), {"ClusterIP 10.96.0.1:80/TCP": []}),
    (
        (service(ports=[{"name": "http", "port": 80, "protocol": "UDP"}]), endpoints("10.0.0.1")),
        {"ClusterIP 10.96.0.1:80/UDP": []},
    ),
]


@pytest.mark.parametrize(("objects", "expected"), CASES)
def test_services_of_objects(objects: tuple[dict[str, Any], ...], expected: dict[str, list[str]]) -> None:
    assert made(*objects) == expected


def test_frontends_at_the_nodes_loopback_addresses_are_not_for_the_outside() -> None:
    known, table = ServiceObjects(), ServiceTable()
    known.upsert([service(**LOCAL), slice_of("a", "10.0.0.1")])
    outside = {}
    for item in known.specs(NAME, AROUND):
        assert not list(check(item, AROUND.rules))
        _, [record] = table.plan([item])
        outside[item.frontend_address.ip] = bool(entry_of(record, {}).flags & lblayout.EXTERNAL)
    assert outside == {
        "10.96.0.1": False,
        "192.0.2.1": True,
        "2001:db8::1": True,
        "0.0.0.0": False,
        "::": False,
    }


def test_fields_of_a_service() -> None:
    known = ServiceObjects()
    ingress = {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}}
    fields = {
        "sessionAffinity": "ClientIP",
        "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": ["10.0.0.0/8"],
    }
    known.upsert([{**service(**fields), "status": ingress}, slice_of("a", "10.0.0.1", node="node1")])
    cluster, balanced = known.specs(NAME, AROUND)
    assert (cluster.session_affinity_timeout, cluster.external_traffic_policy, cluster.source_ranges) == (
        10800,
        "Cluster",
        [],
    )
    assert (balanced.type, balanced.external_traffic_policy) == ("LoadBalancer", "Local")
    assert balanced.source_ranges == ["10.0.0.0/8"]
    assert balanced.backend_addresses[0].local


def test_objects_come_and_go() -> None:
    known = ServiceObjects()
    assert known.upsert([service(), slice_of("a", "10.0.0.1"), slice_of("b", "10.0.0.2")]) == {NAME}
    assert known.remove(("EndpointSlice", "default", "a")) == NAME
    assert [str(item) for item in known.specs(NAME, AROUND)[0].backend_addresses] == ["10.0.0.2:8080"]
    assert known.remove(("EndpointSlice", "default", "a")) is None
    assert known.remove(("Service", "default", "web")) == NAME
    assert known.specs(NAME, AROUND) == []


def test_endpoints_that_become_another_services_are_the_old_ones_no_more() -> None:
    known, moved = ServiceObjects(), slice_of("a", "10.0.0.1")
    known.upsert([service(), moved])
    moved["metadata"] = {"name": "a", "labels": {"kubernetes.io/service-name": "other"}}
    assert known.upsert([moved]) == {NAME, ("default", "other")}
    assert known.specs(NAME, AROUND)[0].backend_addresses == []


def test_only_services_without_selector_are_for_policies() -> None:
    known = ServiceObjects()
    known.upsert([service(), endpoints("10.0.0.1")])
    assert known.external() == {}
    known.upsert([service(selector=None)])
    assert [str(prefix) for prefix in known.external()[NAME].addresses] == ["10.0.0.1/32"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"kind": "Pod"}, "objects[1].kind"),
        ({"kind": "Service", "metadata": {}}, "objects[1].metadata.name"),
        (service(clusterIP="10.96"), "objects[1].spec.clusterIP"),
        (service(ports=[{"port": "http"}]), "objects[1].spec.ports[0].port"),
        (service(ports=[{"port": 0}]), "objects[1].spec.ports[0].port"),
        (service(ports=[{"port": 80, "protocol": "GRE"}]), "objects[1].spec.ports[0].protocol"),
        ({"kind": ["Service"]}, "objects[1].kind"),
        ({**service(), "apiVersion": 1 << 64}, "objects[1].apiVersion"),
        *(
            (
                service(sessionAffinityConfig={"clientIP": {"timeoutSeconds": seconds}}),
                "objects[1].spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            )
            for seconds in (-1, 0, 86401, 1 << 63)
        ),
        (endpoints("nowhere"), "objects[1].subsets.addresses.ip"),
        ({**slice_of("a", "10.0.0.1"), "addressType": "IPX"}, "objects[1].addressType"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_taken(wrong: dict[str, Any], field: str) -> None:
    known = ServiceObjects()
    with pytest.raises(ServiceError) as refused:
        known.upsert([service(), wrong])
    assert [item.field for item in refused.value.problems] == [field]
    assert known.stored() == []


def ending(name: str, address: str, node: str | None = None, serving: bool | None = True) -> dict[str, Any]:
    made = slice_of(name, address, ready=False, node=node)
    made["endpoints"][0]["conditions"] |= {"serving": serving, "terminating": True}
    return made


def serving(objects: Sequence[dict[str, Any]], kind: str = "NodePort") -> tuple[list[str], list[str]]:
    """Addresses of the backends that serve everybody, and of those that the policy Local takes on node1."""
    known, table = ServiceObjects(), ServiceTable()
    known.upsert(objects)
    addresses = ("192.0.2.1", "10.96.0.1")
    [spec] = [item for item in known.specs(NAME, AROUND) if item.type == kind and item.frontend_address.ip in addresses]
    _, [record] = table.plan([spec])
    entry = entry_of(record, {})
    found = [split_key(table.backends[number])[0] for number in entry.backends]
    every = found[: entry.serving]
    return every, found[entry.serving :] or every[: entry.local]


LOCAL = {"externalTrafficPolicy": "Local", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}
HERE, THERE, ENDS_HERE, ENDS_THERE = "10.0.0.1", "10.0.1.1", "10.0.0.2", "10.0.1.2"
PARTS = {
    HERE: slice_of("here", HERE, node="node1"),
    THERE: slice_of("there", THERE, node="node2"),
    ENDS_HERE: ending("ends-here", ENDS_HERE, "node1"),
    ENDS_THERE: ending("ends-there", ENDS_THERE, "node2"),
}


@pytest.mark.parametrize(
    ("present", "everybody", "local"),
    [
        ([HERE, THERE, ENDS_HERE, ENDS_THERE], [HERE, THERE], [HERE]),
        ([THERE, ENDS_HERE, ENDS_THERE], [THERE], [ENDS_HERE]),
        ([THERE, ENDS_THERE], [THERE], []),
        ([ENDS_HERE, ENDS_THERE], [ENDS_HERE, ENDS_THERE], [ENDS_HERE]),
        ([ENDS_THERE], [ENDS_THERE], []),
        ([], [], []),
    ],
)
def test_who_terminates_serves_where_nobody_is_ready(
    present: list[str], everybody: list[str], local: list[str]
) -> None:
    """The policy Local asks that for this node alone; inside the cluster everybody counts."""
    assert serving([service(**LOCAL), *(PARTS[item] for item in present)]) == (everybody, local)
    assert serving([service(**LOCAL), *(PARTS[item] for item in present)], "ClusterIP")[0] == everybody


def test_who_serves_no_more_or_says_nothing_of_it() -> None:
    for conditions, expected in (
        ({}, [HERE]),
        ({"ready": None}, [HERE]),
        ({"ready": False}, []),
        ({"ready": False, "serving": True}, []),
        ({"ready": False, "serving": False, "terminating": True}, []),
        ({"ready": False, "serving": None, "terminating": True}, []),
        ({"ready": False, "serving": True, "terminating": True}, [HERE]),
    ):
        made = slice_of("a", HERE)
        made["endpoints"][0]["conditions"] = conditions
        assert serving([service(), made], "ClusterIP")[0] == expected, conditions


def changed(**fields: Any) -> dict[str, Any]:
    return {**slice_of("b", "10.0.0.2"), **fields}


@pytest.mark.parametrize(
    ("foreign", "left"),
    [
        (changed(addressType="FQDN", endpoints=[{"addresses": ["db.example.com"]}]), "addressType"),
        (changed(ports=[{"name": "http"}]), "ports[0].port"),
        (changed(ports=[{"name": "http", "port": None}]), "ports[0].port"),
        (changed(metadata={"name": "b"}), "metadata.labels"),
        (changed(metadata={"name": "b", "labels": {"kubernetes.io/service-name": ""}}), "metadata.labels"),
        (changed(endpoints=[{"addresses": ["127.0.0.1"]}]), "endpoints.addresses"),
        (changed(endpoints=[{"addresses": ["fe80::1"]}]), "endpoints.addresses"),
        ({**endpoints("::1"), "metadata": {"name": "b"}}, "subsets.addresses.ip"),
        (changed(endpoints=[{"addresses": None}]), ""),
        (changed(endpoints=None, ports=None), ""),
        ({"kind": "Service", "metadata": {"name": "b"}, "spec": {"ports": [{"port": 80, "nodePort": 0}]}}, ""),
        ({"kind": "Service", "metadata": {"name": "b", "namespace": None}, "spec": {"clusterIP": ""}}, ""),
    ],
)
def test_what_makes_no_backend_is_left_out_and_named(foreign: dict[str, Any], left: str) -> None:
    known = ServiceObjects()
    known.upsert([service(), foreign, slice_of("a", "10.0.0.1")])
    assert [str(item) for item in known.specs(NAME, AROUND)[0].backend_addresses] == BACKEND
    assert len(known.stored()) == 3
    found = known.left_out()
    assert [text for text in found if f"/b: {left}" in text] == found
    assert len(found) == bool(left)
    assert known.left_out([("Service", "default", "web")]) == []
    known.remove((foreign["kind"], "default", "b"))
    assert known.left_out() == []


def test_source_ranges_hold_for_every_address_that_the_world_is_given() -> None:
    """Node ports are for the balancer in front, as in kube-proxy: it knows their clients, the ranges do not."""
    known = ServiceObjects()
    addresses = {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}, {"ip": "2001:db8:9::9"}]}}
    spec = {**LOCAL, "loadBalancerSourceRanges": [" 10.0.0.1/8 "], "externalIPs": ["203.0.113.5"]}
    known.upsert([{**service(**spec), "status": addresses}, slice_of("a", "10.0.0.1", "fd00::1")])
    table, found = ServiceTable(), {}
    for item in known.specs(NAME, AROUND):
        assert not list(check(item, AROUND.rules))
        _, [record] = table.plan([item])
        entry = entry_of(record, {})
        ranges = [str(network) for network in entry.ranges] if entry.flags & lblayout.RANGES else None
        found[f"{item.type} {item.frontend_address.ip}"] = ranges
    assert found == {
        "ClusterIP 10.96.0.1": None,
        "NodePort 192.0.2.1": None,
        "NodePort 2001:db8::1": None,
        "NodePort 0.0.0.0": None,
        "NodePort ::": None,
        "ExternalIP 203.0.113.5": ["10.0.0.0/8"],
        "LoadBalancer 203.0.113.9": ["10.0.0.0/8"],
        "LoadBalancer 2001:db8:9::9": [],
    }
