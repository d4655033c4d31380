"""The REST API of a running agent: what it answers fits its document, refusals name the field, and labels that change
at run time change who may reach whom. Tier node.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import pytest
from jsonschema import Draft202012Validator
from lab_harness import new_lab, restore

from ciliate import manifest
from ciliate.datapath.netlink import in_netns
from ciliate.lab import netns
from ciliate.lab.lab import Lab
from ciliate.node.model import Node, encode
from ciliate.node.registry import PREFIX as NODES
from ciliate_kvstore.sqlite import SqliteStore

from . import api_refusals

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "docs/metrics.md"
PODS, POLICY = ROOT / "examples/demo/pods.yaml", ROOT / "examples/policies/deathstar.yaml"


class Api:
    """Requests whose answers are held against the document."""

    def __init__(self, lab: Lab) -> None:
        self._path = str(lab.directory.api_socket)
        self._document: dict[str, Any] = {}
        self.seen: set[tuple[str, str]] = set()
        _, _, body = self.raw("GET", "/v1/openapi.json")
        self._document = json.loads(body)

    def wrong(self, **known: str) -> Iterator[api_refusals.Wrong]:
        """Wrong requests of every operation."""
        for method, pattern in sorted(self.operations):
            item = self._document["paths"][pattern]
            own = item[method.lower()]
            parameters = [self._resolve(one) for one in [*item.get("parameters", []), *own.get("parameters", [])]]
            content = own.get("requestBody", {}).get("content", {}).values()
            forms = [self._resolve(form) for one in content for form in one["schema"].get("oneOf", [one["schema"]])]
            yield from api_refusals.of(method, pattern, {**own, "parameters": parameters, "forms": forms}, known)

    @property
    def operations(self) -> set[tuple[str, str]]:
        methods = ("get", "put", "post", "patch", "delete")
        return {
            (name.upper(), path) for path, item in self._document["paths"].items() for name in methods & item.keys()
        }

    def raw(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(self._path)
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, data, dict(headers))
            response = connection.getresponse()
            return response.status, response.headers.get_content_type(), response.read()
        finally:
            connection.close()

    def __call__(self, template: str, body: Any = None, status: int = 200, **values: Any) -> Any:
        """Send ``METHOD /path/{name}?query`` and return the answer, which has this status and fits its schema."""
        method, _, target = template.partition(" ")
        pattern = target.partition("?")[0]
        path = target.format(**{name: quote(str(value), safe="") for name, value in values.items()})
        code, kind, data = self.raw(method, path, body)
        assert code == status, f"{method} {path}: {code} {data[:500]!r}"
        if code < 400:
            self.seen.add((method, pattern))
        return self.fitting(method, pattern, code, kind, data)

    def fitting(self, method: str, pattern: str, code: int, kind: str, data: bytes) -> Any:
        """An answer that is as the document says."""
        operation = self._document["paths"][pattern][method.lower()]
        assert str(code) in operation["responses"], f"{method} {pattern}: status {code} is not in the document"
        response = self._resolve(operation["responses"][str(code)])
        assert kind in response["content"], f"{method} {pattern}: {kind}"
        if "json" not in kind:
            return data
        answer = json.loads(data)
        schema = {**response["content"][kind]["schema"], "components": self._document["components"]}
        if "$ref" in schema:
            schema = {"allOf": [{"$ref": schema.pop("$ref")}], **schema}
        Draft202012Validator(schema).validate(answer)
        return answer

    def _resolve(self, item: dict[str, Any]) -> dict[str, Any]:
        found: Any = item
        if "$ref" in item:
            found = self._document
            for name in item["$ref"].removeprefix("#/").split("/"):
                found = found[name]
        return found


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with new_lab("api", manifest.load([PODS, POLICY]), options={"identity-change-grace-period": "0.2"}) as made:
        yield made


@pytest.fixture
def api(lab: Lab) -> Api:
    """Requests to an agent whose lab is as it was made."""
    restore(lab, manifest.load([PODS, POLICY]))
    return Api(lab)


def endpoint_of(api: Api, pod: str) -> dict[str, Any]:
    return api("GET /v1/endpoint/{id}", id=f"pod-name:default/{pod}")


async def add_node(lab: Lab, name: str) -> None:
    """Make a node known that does not exist, by way of the store."""
    store = SqliteStore(lab.directory.state_dir / "kvstore.db")
    await store.start()
    try:
        await store.put(f"{NODES}default/{name}", encode(Node(name=name)))
    finally:
        await store.stop()


def metric_names(exposition: str) -> dict[str, set[str]]:
    """Our families with the labels of their samples."""
    names = set(re.findall(r"^# TYPE (ciliate_\w+)", exposition, re.MULTILINE))
    found: dict[str, set[str]] = {name: set() for name in names if not name.endswith("_created")}
    for name, labels in re.findall(r"^(ciliate_\w+)\{(.*)\} ", exposition, re.MULTILINE):
        base = name if name in found else re.sub(r"_(bucket|count|sum|created)$", "", name)
        if base in found:
            found[base] |= set(re.findall(r'(\w+)="', labels)) - {"le"}
    return found


def metrics_of_document(who: str) -> dict[str, set[str]]:
    """The same as docs/metrics.md has them."""
    rows = re.findall(r"^\| `(ciliate_\w+)` \| (.*?) \| (.*?) \|", METRICS.read_text(), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels, where in rows if who in where}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_operation_answers_as_documented(api: Api, lab: Lab) -> None:
    status = api("GET /v1/healthz?detail=true")
    assert status["state"] == "ok" and status["uptime"] > 0 and status["node-addresses"]
    pods = {item["pod"] for item in status["addresses"]}
    assert pods == {"", "default/deathstar", "default/xwing", "default/tiefighter"}
    assert api("GET /v1/healthz") == {"state": "ok", "node": "node1"}
    assert api("GET /v1/config")["enable_policy"] == "default"
    assert api("PATCH /v1/config", {"options": {"monitor-aggregation": "low"}})["monitor_aggregation"] == "low"

    endpoints = api("GET /v1/endpoint")
    (ship,) = api("GET /v1/endpoint?labels=k8s:class={label}", label="xwing")
    number = ship["id"]
    for name in (
        number,
        f"ciliate-local:{number}",
        f"cilium-local:{number}",
        "pod-name:default/xwing",
        f"container-id:{ship['status']['external-identifiers']['container-id']}",
        f"ipv4:{ship['status']['networking']['addressing'][0]['ipv4']}",
        f"ipv6:{ship['status']['networking']['addressing'][0]['ipv6']}",
    ):
        assert api("GET /v1/endpoint/{id}", id=name)["id"] == number
    assert api("GET /v1/endpoint/{id}/config", id=number)["immutable"]["ChainingMode"] == "none"
    change = {"options": {"TraceNotification": "Disabled", "MonitorAggregationLevel": "none"}}
    realized = api("PATCH /v1/endpoint/{id}/config", change, id=number)["realized"]["options"]
    assert realized["TraceNotification"] == "Disabled" and realized["MonitorAggregationLevel"] == "none"
    change = {"options": {"TraceNotification": "Default", "MonitorAggregationLevel": "Default"}}
    assert api("PATCH /v1/endpoint/{id}/config", change, id=number)["own"] == {}
    before = len(api("GET /v1/endpoint/{id}/log", id=number))
    api("PATCH /v1/endpoint/{id}/config", {}, id=number)
    assert len(api("GET /v1/endpoint/{id}/log", id=number)) > before
    assert api("GET /v1/endpoint/{id}/healthz", id=number)["overallHealth"] == "OK"
    assert api("GET /v1/endpoint/{id}/labels", id=number)["spec"]["user"] == []
    api("PATCH /v1/endpoint/{id}", {"labels": ["color=red"]}, id=number)
    api("PATCH /v1/endpoint/{id}/labels", {"user": []}, id=number)

    identity = api("GET /v1/identity/{id}", id=1)
    assert identity == {"id": 1, "labels": ["reserved:host"]}
    assert identity in api("GET /v1/identity?labels={label}", label="reserved:host")
    assert sum(item["refCount"] for item in api("GET /v1/identity/endpoints")) == len(endpoints)

    given = api("POST /v1/ipam?owner={owner}&family=ipv4", owner="test", status=201)["address"]
    assert given["ipv6"] is None and {"ip": given["ipv4"], "owner": "test"} in api("GET /v1/ipam")["addresses"]
    api("POST /v1/ipam/{ip}?owner=test", ip="10.200.77.7")
    api("DELETE /v1/ipam/{ip}", ip="10.200.77.7")
    api("DELETE /v1/ipam/{ip}", ip=given["ipv4"])
    assert "test" not in {item["owner"] for item in api("GET /v1/ipam")["addresses"]}

    maps = {item["name"]: item for item in api("GET /v1/map")["maps"]}
    assert maps["ciliate_lxc"]["entries"] == 6
    for name in maps:
        content = api("GET /v1/map/{name}", name=name)
        assert {item["desired-action"] for item in content["cache"]} <= {"ok"}
    assert len(api("GET /v1/map/{name}?limit=1", name="lxc")["cache"]) == 1

    (node,) = api("GET /v1/node")
    assert api("GET /v1/node/{name}", name="node1") == node
    assert (node["local"], node["pod-range"]["ipv4"], node["problem"]) == (True, "10.200.0.0/16", "")

    assert any(len(item["endpoints"]) == 3 for item in api("GET /v1/templates"))

    (policy,) = api("GET /v1/policy")["policies"]
    document = {"object": policy["object"], "file": "again.yaml", "line": 1}
    assert api("PUT /v1/policy", {"documents": [document]})["unchanged"] == 1
    api("GET /v1/policy/wait?revision=1")
    assert {item["pod"] for item in api("GET /v1/policy/counters")} == {"default/deathstar"}
    found = api("GET /v1/policy/resolve?from={source}&to={to}&port=80", source="pod:default/xwing", to="pod:deathstar")
    assert found["verdict"] == "deny"

    front = {"ip": "10.96.0.5", "port": 80, "protocol": "TCP"}
    service = {"frontend-address": front, "backend-addresses": [{"ip": "198.51.100.1", "port": 80}]}
    made = api("PUT /v1/service/{id}", service, status=201, id=77)
    assert api("PUT /v1/service/{id}", service, id=77) == made == api("GET /v1/service/{id}", id=77)
    assert made in api("GET /v1/service")["services"]
    other = {**service, "frontend-address": {**front, "port": 81}}
    assert api("PUT /v1/service", {"services": [service, other]}) == {"created": 1, "ids": [77, 78]}
    for name in ("ciliate_lb_services", "lb_slots", "lb_backends", "lb_reverse"):
        assert api("GET /v1/map/{name}", name=name)["cache"]
    assert api("DELETE /v1/service/{id}", id=77) == {"deleted": 1}
    manifest = {
        "kind": "Service",
        "metadata": {"name": "s"},
        "spec": {"clusterIP": "10.96.0.6", "ports": [{"port": 1}]},
    }
    assert api("PUT /v1/service-objects", {"objects": [manifest]}) == {"services": 1, "left": []}
    assert api("GET /v1/service-objects") == {"objects": ["Service/default/s"]}
    assert api("DELETE /v1/service-objects?name={name}", name="Service/default/s") == {"deleted": 1}
    assert api("DELETE /v1/service?all=true") == {"deleted": 1}

    assert len(api("GET /v1/workloads")["pods"]) == 3
    api("PUT /v1/workloads", {"objects": []})
    api("GET /v1/templates")
    assert {"kind": "ipam"}.items() <= {**api("GET /v1/plugins")[2]}.items()
    api("POST /v1/plugins/switch", {"kind": "loader", "name": "shared"})
    for kind, name in (("loader", "nothing"), ("chaining", "none"), ("nothing", "shared")):
        assert kind in api("POST /v1/plugins/switch", {"kind": kind, "name": name}, status=400)["detail"]
    names = {item["name"] for item in api("GET /v1/metrics")}
    assert {"ciliate_endpoint_count", "process_resident_memory_bytes"} <= names
    api("GET /v1/metrics/datapath")
    exposition = api("GET /metrics")
    assert b"ciliate_endpoint_count 3.0" in exposition
    served, documented = metric_names(exposition.decode()), metrics_of_document("agent")
    assert served.keys() == documented.keys()
    assert {name: labels for name, labels in served.items() if labels and labels != documented[name]} == {}
    assert api("GET /v1/openapi.json")["openapi"] == "3.1.0"
    assert len(api("GET /v1/debuginfo")["endpoints"]) == 3
    first = next(iter(lab.client().stream("/v1/monitor")))
    assert first["type"] == "agent" and first["text"]

    assert api("GET /v1/health") == {"enabled": False, "nodes": []}
    asyncio.run(add_node(lab, "ghost"))
    until(lambda: len(api("GET /v1/node")) == 2)
    assert {item["name"] for item in api("PUT /v1/health/probe")["nodes"]} == {"node1", "ghost"}
    assert api("DELETE /v1/node/{name}", name="ghost") == {"addresses": 0}
    until(lambda: len(api("GET /v1/node")) == 1)
    until(lambda: not api("GET /v1/health")["enabled"])
    assert api("DELETE /v1/node/{name}", status=409, name="node1")["field"] == "name"

    assert api("DELETE /v1/policy?all=true")["deleted"] == 1
    assert api("DELETE /v1/endpoint/{id}", id=number) == {"problems": []}
    api("DELETE /v1/workloads")
    # the stream is never ended by the agent
    assert api.operations - api.seen == {("GET", "/v1/monitor")}


@pytest.mark.parametrize(
    ("template", "body", "status", "field"),
    [
        ("GET /v1/endpoint/{id}", None, 400, "id"),
        ("DELETE /v1/endpoint/{id}", None, 400, "id"),
        ("GET /v1/endpoint/{id}/log", None, 400, "id"),
        ("GET /v1/endpoint/{id}/healthz", None, 400, "id"),
        ("GET /v1/identity/{id}", None, 400, "id"),
    ],
)
def test_a_malformed_id_is_refused(api: Api, template: str, body: Any, status: int, field: str) -> None:
    for wrong in ("abc", "-1", "1.5", "bogus:1"):
        assert api(template, body, status, id=wrong)["field"] == field


@pytest.mark.parametrize(
    ("template", "body", "status", "field"),
    [
        ("GET /v1/endpoint/{id}", None, 404, "id"),
        ("GET /v1/endpoint/{id}/labels", None, 404, "id"),
        ("PATCH /v1/endpoint/{id}/labels", {"add": ["a=b"]}, 404, "id"),
        ("PATCH /v1/endpoint/{id}/config", {}, 404, "id"),
        ("DELETE /v1/endpoint/{id}", None, 404, "id"),
        ("GET /v1/identity/{id}", None, 404, "id"),
        ("GET /v1/endpoint?labels=no=body", None, 404, "labels"),
        ("GET /v1/endpoint?labels==x", None, 400, "labels"),
        ("GET /v1/identity?labels=no=body", None, 404, "labels"),
        ("GET /v1/map/{name}", None, 404, "name"),
        ("GET /v1/node/{name}", None, 404, "name"),
        ("DELETE /v1/node/{name}", None, 404, "name"),
        ("GET /v1/map/{name}?limit=0", None, 400, "limit"),
        ("POST /v1/ipam", None, 400, "owner"),
        ("POST /v1/ipam?owner=router", None, 400, "owner"),
        ("POST /v1/ipam?owner=me&family=ipx", None, 400, "family"),
        ("POST /v1/ipam/{ip}?owner=me", None, 400, "ip"),
        ("DELETE /v1/ipam/{ip}", None, 400, "ip"),
        ("PATCH /v1/config", {"options": {"node-name": "x"}}, 400, "node-name"),
        ("PATCH /v1/config", {"options": {"enable-policy": "perhaps"}}, 400, "enable-policy"),
        ("PATCH /v1/config", {"options": []}, 400, "options"),
        ("PATCH /v1/config", {}, 400, "options"),
        ("PATCH /v1/config", b"{", 400, "body"),
        ("PUT /v1/workloads", {"objects": [{"kind": "Pod", "metadata": {}}]}, 400, "objects[0].metadata.name"),
        ("PUT /v1/policy", {"documents": [{"object": {"kind": "Nothing"}}]}, 400, None),
        ("DELETE /v1/policy?name=nobody", None, 404, "name"),
        ("GET /v1/policy/wait?revision=x", None, 400, "revision"),
        ("GET /v1/policy/wait?timeout=nan", None, 400, "timeout"),
        ("PUT /v1/policy", {"documents": [{"object": {}, "bogus": 1}]}, 400, "documents[0].bogus"),
        ("PUT /v1/service/{id}", {"id": 1, "frontend-address": {"ip": "10.96.0.1", "port": 1}}, 400, "id"),
        ("DELETE /v1/service-objects?name=a&all=true", None, 400, "all"),
        ("GET /v1/service/{id}", None, 404, "id"),
        ("DELETE /v1/service/{id}", None, 404, "id"),
        ("DELETE /v1/service", None, 400, "all"),
        ("PUT /v1/service/{id}", {}, 400, None),
        ("PUT /v1/service/{id}", {"frontend-address": {"ip": "10.96.0.1", "port": 0}}, 400, "frontend-address.port"),
        ("PUT /v1/service/{id}", {"frontend-address": {"ip": "127.0.0.1", "port": 1}}, 400, "frontend-address.ip"),
        ("PUT /v1/service", b"{", 400, "body"),
        (
            "PUT /v1/service",
            {"services": [{"frontend-address": {"ip": "x", "port": 1}}]},
            400,
            "services[0].frontend-address.ip",
        ),
        ("PUT /v1/service-objects", {"objects": [{"kind": "Pod"}]}, 400, "objects[0].kind"),
        ("DELETE /v1/service-objects", None, 400, "all"),
        ("DELETE /v1/service-objects?name=Service/a/b", None, 404, "name"),
    ],
)
def test_what_is_refused(api: Api, template: str, body: Any, status: int, field: str | None) -> None:
    answer = api(template, body, status, id=70000, name="nothing", ip="not-an-address")
    assert answer["status"] == status
    if field is not None:
        assert answer["field"] == field


def test_refusals_of_one_endpoint(api: Api) -> None:
    number = endpoint_of(api, "xwing")["id"]
    before = api("GET /v1/endpoint/{id}/labels", id=number)
    for body, field in (
        ({"add": ["fine=1", "reserved:host"]}, "add"),
        ({"add": ["k8s:io.kubernetes.pod.namespace=kube-system"]}, "add"),
        ({"delete": ["k8s:nobody"]}, "delete"),
        ({"add": "a=b"}, "add"),
        ({"user": [], "add": []}, "body"),
        ({}, "body"),
        ({"add": ["x" * 513]}, "add"),
        ({"add": ["a\nb"]}, "add"),
    ):
        assert api("PATCH /v1/endpoint/{id}/labels", body, 400, id=number)["field"] == field
    assert api("PATCH /v1/endpoint/{id}", {"mac": "1"}, 400, id=number)["field"] == "mac"
    assert (
        api("PATCH /v1/endpoint/{id}/config", {"options": {"NAT46": "x"}}, 400, id=number)["field"] == "options.NAT46"
    )
    assert api("GET /v1/endpoint/{id}/labels", id=number) == before
    taken = endpoint_of(api, "xwing")["status"]["networking"]["addressing"][0]["ipv4"]
    assert api("POST /v1/ipam/{ip}?owner=me", status=409, ip=taken)["field"] == "ip"
    assert api("POST /v1/ipam/{ip}?owner=me", status=400, ip="192.0.2.1")["field"] == "ip"
    assert api("DELETE /v1/ipam/{ip}", status=400, ip=taken)["field"] == "ip"
    assert api("DELETE /v1/ipam/{ip}", status=404, ip="10.200.250.250")["field"] == "ip"


def test_what_is_made_wrong_from_the_document_is_never_a_failure(api: Api, lab: Lab) -> None:
    known = {"id": str(endpoint_of(api, "deathstar")["id"]), "ip": "10.200.250.250", "name": "nothing"}
    log = lab.directory.agent_log
    begun, asked = log.stat().st_size, 0
    for wrong in api.wrong(**known):
        code, kind, data = api.raw(wrong.method, wrong.path, wrong.body, wrong.headers)
        assert (code == (wrong.status or code) and code < 500) or code == 503, (wrong, code, data[:300])
        answer = api.fitting(wrong.method, wrong.pattern, code, kind, data)
        assert not wrong.field or answer["field"] == wrong.field, (wrong, answer)
        asked += 1
    assert asked > 1000
    assert b"Traceback" not in log.read_bytes()[begun:]


def test_what_is_no_http_is_refused_without_a_trace(api: Api, lab: Lab) -> None:
    log = lab.directory.agent_log
    begun = log.stat().st_size
    for data, status in (
        (b"PUT /v1/policy HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"PUT /v1/policy HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"FOO /v1/config HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET /v1/config HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20000 + b"\r\n\r\n", b"400"),
        (b"GET /v1/config HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/nothing HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(lab.directory.api_socket))
            connection.sendall(data)
            assert connection.recv(12).split()[1] == status
    assert b"Traceback" not in log.read_bytes()[begun:]


def test_paths_and_methods_that_do_not_exist_are_problems_too(api: Api) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/config", 405),
        ("HEAD", "/v1/monitor", 405),
    ):
        code, kind, data = api.raw(method, path)
        if method == "HEAD":
            assert (code, data) == (status, b"")
            continue
        assert (code, kind, json.loads(data)["status"]) == (status, "application/problem+json", status)


# labels that change at run time, with packets


@contextmanager
def server(lab: Lab, pod: str) -> Iterator[socket.socket]:
    """A listening socket on port 80 of a pod."""
    listening = inside(lab, pod, lambda: socket.create_server(("", 80)))
    with listening:
        yield listening


def inside(lab: Lab, pod: str, function: Callable[[], Any]) -> Any:
    descriptor = os.open(netns.path(lab.namespace_of(pod)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return in_netns(descriptor, function)
    finally:
        os.close(descriptor)


def connect(lab: Lab, pod: str, address: str, timeout: float = 0.5) -> socket.socket | None:
    try:
        return inside(lab, pod, lambda: socket.create_connection((address, 80), timeout))
    except TimeoutError:
        return None


def reaches(lab: Lab, pod: str, address: str) -> bool:
    connection = connect(lab, pod, address)
    if connection is not None:
        connection.close()
    return connection is not None


def address_of(lab: Lab, pod: str) -> str:
    return next(item for item in lab.state.pods[f"default/{pod}"].addresses if ":" not in item)


def manifest_of(pod: str, **labels: str) -> dict[str, Any]:
    return {"kind": "Pod", "metadata": {"namespace": "default", "name": pod, "labels": labels}}


def test_a_users_label_gives_rights_and_its_end_takes_them(api: Api, lab: Lab) -> None:
    address = address_of(lab, "deathstar")
    with server(lab, "deathstar"):
        assert not reaches(lab, "xwing", address)
        ship = endpoint_of(api, "xwing")
        api("PATCH /v1/endpoint/{id}/labels", {"add": ["k8s:org=empire"]}, id=ship["id"])
        assert reaches(lab, "xwing", address)
        assert endpoint_of(api, "xwing")["status"]["identity"]["id"] != ship["status"]["identity"]["id"]
        api("PATCH /v1/endpoint/{id}/labels", {"delete": ["k8s:org"]}, id=ship["id"])
        assert not reaches(lab, "xwing", address)
        assert endpoint_of(api, "xwing")["status"]["identity"] == ship["status"]["identity"]


def test_a_running_connection_ends_with_the_label_that_allowed_it(api: Api, lab: Lab) -> None:
    address = address_of(lab, "deathstar")
    with server(lab, "deathstar") as listening:
        client = connect(lab, "tiefighter", address)
        assert client is not None
        peer, _ = listening.accept()
        with client, peer:
            client.sendall(b"one")
            assert peer.recv(16) == b"one"
            peer.settimeout(0.5)
            assert api("PUT /v1/workloads", {"objects": [manifest_of("tiefighter", org="rebels")]})["changed"]
            client.sendall(b"two")
            with pytest.raises(TimeoutError):
                peer.recv(16)
            assert not reaches(lab, "tiefighter", address)
            labels = {"org": "empire", "class": "tiefighter"}
            api("PUT /v1/workloads", {"objects": [manifest_of("tiefighter", **labels)]})
            peer.settimeout(10)
            assert peer.recv(16) == b"two"  # sent again by TCP, now that it may


def test_a_change_between_two_labels_that_are_both_allowed_loses_nothing(api: Api, lab: Lab) -> None:
    address, number = address_of(lab, "deathstar"), endpoint_of(api, "tiefighter")["id"]
    with server(lab, "deathstar") as listening:
        client = connect(lab, "tiefighter", address)
        assert client is not None
        peer, _ = listening.accept()
        with client, peer:
            peer.settimeout(0.15)  # less than TCP's first retransmission: a lost packet shows
            for count in range(20):
                change = {"add": [f"wave={count}"]}
                api("PATCH /v1/endpoint/{id}/labels", change, id=number)
                client.sendall(b"x")
                assert peer.recv(1) == b"x"
    api("PATCH /v1/endpoint/{id}/labels", {"user": []}, id=number)


def test_the_log_tells_the_change(api: Api) -> None:
    number = endpoint_of(api, "tiefighter")["id"]
    api("PATCH /v1/endpoint/{id}/labels", {"add": ["wave=1"]}, id=number)
    log = api("GET /v1/endpoint/{id}/log", id="pod-name:default/tiefighter")
    assert any("became" in entry["message"] for entry in log)
    assert log[-1]["state"] == "ready"


def test_user_labels_survive_the_agent(api: Api, lab: Lab) -> None:
    number = endpoint_of(api, "xwing")["id"]
    api("PATCH /v1/endpoint/{id}/labels", {"add": ["k8s:org=empire"]}, id=number)
    identity = endpoint_of(api, "xwing")["status"]["identity"]
    lab.stop_agent()
    lab.start_agent()
    assert endpoint_of(api, "xwing")["status"]["identity"] == identity
    with server(lab, "deathstar"):
        assert reaches(lab, "xwing", address_of(lab, "deathstar"))
    api("PATCH /v1/endpoint/{id}/labels", {"user": []}, id=number)


def test_pods_that_are_forgotten_keep_their_labels(api: Api) -> None:
    before = endpoint_of(api, "xwing")["status"]["labels"]
    api("DELETE /v1/workloads")
    assert api("GET /v1/workloads")["pods"] == []
    number = endpoint_of(api, "xwing")["id"]
    api("PATCH /v1/endpoint/{id}/labels", {"add": ["color=red"]}, id=number)
    api("PATCH /v1/endpoint/{id}/labels", {"user": []}, id=number)
    assert endpoint_of(api, "xwing")["status"]["labels"] == before


def test_an_endpoint_that_is_disconnected_reaches_nobody_and_keeps_its_address(api: Api, lab: Lab) -> None:
    ship = endpoint_of(api, "tiefighter")
    address = ship["status"]["networking"]["addressing"][0]["ipv4"]
    with server(lab, "deathstar"):
        assert reaches(lab, "tiefighter", address_of(lab, "deathstar"))
        assert api("DELETE /v1/endpoint/{id}", id=ship["id"]) == {"problems": []}
        api("DELETE /v1/endpoint/{id}", status=404, id=ship["id"])
        assert not reaches(lab, "tiefighter", address_of(lab, "deathstar"))
    assert address in {item["ip"] for item in api("GET /v1/ipam")["addresses"]}
    lab.remove_pods(["default/tiefighter"])
    assert address not in {item["ip"] for item in api("GET /v1/ipam")["addresses"]}


def test_policies_go(api: Api, lab: Lab) -> None:
    assert api("DELETE /v1/policy?all=true")["deleted"] == 1
    with server(lab, "deathstar"):
        assert reaches(lab, "xwing", address_of(lab, "deathstar"))
