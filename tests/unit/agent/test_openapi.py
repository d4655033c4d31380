"""The API's document against the router: same routes, same methods, same parameters, sound schemas. Tier unit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from aiohttp import web
from jsonschema import Draft202012Validator

from ciliate.agent.api import admission, openapi, server

METHODS = ("get", "put", "post", "patch", "delete")
DOCUMENT = openapi.load()
OPERATIONS = {
    (method.upper(), path): {**item, **item[method], "parameters": [*item.get("parameters", []), *own]}
    for path, item in DOCUMENT["paths"].items()
    for method in METHODS
    if method in item
    for own in [item[method].get("parameters", [])]
}


def routed() -> set[tuple[str, str]]:
    router = web.Application().router
    server.routes(router, None)
    return {
        (route.method, route.resource.canonical)
        for route in router.routes()
        if route.resource is not None and route.method != "HEAD"
    }


def resolve(item: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in item:
        return item
    found: Any = DOCUMENT
    for name in item["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return found


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_route_is_in_the_document_and_every_operation_is_routed() -> None:
    assert set(OPERATIONS) == routed()


def test_every_reference_leads_somewhere_and_nothing_is_left_over() -> None:
    used = set(references(DOCUMENT))
    for reference in used:
        assert resolve({"$ref": reference})
    there = {f"#/components/{kind}/{name}" for kind, items in DOCUMENT["components"].items() for name in items}
    assert there == used


def test_operations_have_names_of_their_own() -> None:
    names = Counter(operation["operationId"] for operation in OPERATIONS.values())
    assert max(names.values()) == 1


@pytest.mark.parametrize(("method", "path"), sorted(OPERATIONS))
def test_an_operation_is_complete(method: str, path: str) -> None:
    operation = OPERATIONS[method, path]
    assert operation["summary"] and set(operation["tags"]) <= {tag["name"] for tag in DOCUMENT["tags"]}
    parameters = [resolve(item) for item in operation["parameters"]]
    assert {item["name"] for item in parameters if item["in"] == "path"} == set(re.findall(r"{(\w+)}", path))
    assert any(code.startswith("2") for code in operation["responses"])
    for code, response in operation["responses"].items():
        found = resolve(response)
        kinds = set(found["content"])
        assert found["description"]
        assert all("schema" in content for content in found["content"].values())
        assert (kinds == {"application/problem+json"}) == (code >= "400" and (path, code) != ("/v1/healthz", "503"))


def query_of(operation: dict[str, Any]) -> dict[bool, set[str]]:
    """Query parameters that may be given often (True) and once (False)."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for item in map(resolve, operation["parameters"]):
        if item["in"] == "query":
            found[item["schema"].get("type") == "array"].add(item["name"])
    return found


def members_of(operation: dict[str, Any]) -> set[str] | None:
    if "requestBody" not in operation:
        return None
    schema = resolve(operation["requestBody"]["content"]["application/json"]["schema"])
    forms = schema.get("oneOf", [schema])
    assert all(form["additionalProperties"] is False for form in forms)
    return {name for form in forms for name in form["properties"]}


@pytest.mark.parametrize(("method", "path"), sorted(OPERATIONS))
def test_what_is_admitted_is_what_the_document_says(method: str, path: str) -> None:
    operation, takes = OPERATIONS[method, path], admission.OPERATIONS.get((method, path), admission.NOTHING)
    assert query_of(operation) == {True: set(takes.many), False: set(takes.once)}
    assert members_of(operation) == (None if takes.members is None else set(takes.members))
    refusals = {"400"} if takes.members is None else {"400", "408", "413", "415"}
    assert refusals <= operation["responses"].keys()


def test_nothing_is_admitted_where_there_is_no_route() -> None:
    assert set(OPERATIONS) >= admission.OPERATIONS.keys()


@pytest.mark.parametrize("name", sorted(DOCUMENT["components"]["schemas"]))
def test_a_schema_is_sound(name: str) -> None:
    Draft202012Validator.check_schema(DOCUMENT["components"]["schemas"][name])
    assert not DOCUMENT["components"]["schemas"][name].get("examples")


def keys_twice(node: yaml.Node) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        yield from (key for key, count in Counter(keys).items() if count > 1)
        for _, value in node.value:
            yield from keys_twice(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from keys_twice(item)


def test_no_name_is_given_twice() -> None:
    """YAML lets the last one win in silence."""
    assert list(keys_twice(yaml.compose("{a: 1, b: {c: 1, c: 2}}"))) == ["c"]
    assert list(keys_twice(yaml.compose(openapi.FILE.read_text()))) == []
