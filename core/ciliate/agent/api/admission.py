"""What a request may say at all: parameters and members by operation, and the form of its body.

What nobody reads is refused, so that a misspelt name never goes unnoticed. ``tests/unit/agent/test_openapi.py`` holds
the table against the API's document, which is not loaded here: its parser costs the agent 5 MB.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from typing import Any, NamedTuple

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from ciliate.agent.api.problem import Handler, Problem, validation
from ciliate.hints import did_you_mean

BODY_TIME = 60.0
"""Seconds for the whole of a body to arrive; it comes from this machine."""
CONTENT = "content"
"""Where the request keeps its decoded body for the handler."""
CHARSETS = ("utf-8", "utf8", "us-ascii")
LARGE = 256 * 1024
"""Bytes from which on a body is searched for members given twice beside the loop."""


class Takes(NamedTuple):
    """What an operation reads: query parameters given at most once, those given often, members (None: no body)."""

    once: tuple[str, ...] = ()
    many: tuple[str, ...] = ()
    members: tuple[str, ...] | None = None


NOTHING = Takes()
SERVICE = (
    "id",
    "name",
    "namespace",
    "type",
    "frontend-address",
    "backend-addresses",
    "session-affinity-timeout",
    "external-traffic-policy",
    "source-ranges",
)
OPERATIONS: dict[tuple[str, str], Takes] = {
    ("GET", "/v1/config"): Takes(once=("secrets",)),
    ("GET", "/v1/healthz"): Takes(once=("detail",)),
    ("PATCH", "/v1/config"): Takes(members=("options",)),
    ("GET", "/v1/endpoint"): Takes(many=("labels",)),
    ("PATCH", "/v1/endpoint/{id}"): Takes(members=("labels",)),
    ("PATCH", "/v1/endpoint/{id}/config"): Takes(members=("options",)),
    ("PATCH", "/v1/endpoint/{id}/labels"): Takes(members=("user", "add", "delete")),
    ("GET", "/v1/identity"): Takes(many=("labels",)),
    ("POST", "/v1/ipam"): Takes(once=("owner", "family")),
    ("POST", "/v1/ipam/{ip}"): Takes(once=("owner",)),
    ("PUT", "/v1/policy"): Takes(members=("documents",)),
    ("GET", "/v1/policy"): Takes(many=("name", "label")),
    ("DELETE", "/v1/policy"): Takes(once=("all",), many=("name", "label")),
    ("GET", "/v1/policy/wait"): Takes(once=("revision", "timeout")),
    ("GET", "/v1/policy/counters"): Takes(once=("endpoint",)),
    ("GET", "/v1/policy/resolve"): Takes(once=("from", "to", "verbose"), many=("port",)),
    ("PUT", "/v1/service"): Takes(members=("services",)),
    ("DELETE", "/v1/service"): Takes(once=("all",)),
    ("PUT", "/v1/service/{id}"): Takes(members=SERVICE),
    ("PUT", "/v1/service-objects"): Takes(members=("objects",)),
    ("DELETE", "/v1/service-objects"): Takes(once=("all",), many=("name",)),
    ("PUT", "/v1/workloads"): Takes(members=("objects",)),
    ("POST", "/v1/plugins/switch"): Takes(members=("kind", "name", "options")),
    ("GET", "/v1/map/{name}"): Takes(once=("limit",)),
}


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Admit a request, then let it be handled; stands inside of what makes answers of Problems."""
    await admit(request)
    return await handler(request)


async def admit(request: web.Request) -> None:
    """Refuse what the operation does not read; Problem 400, 408, 413 or 415. Afterwards the body is a sound object."""
    resource = request.match_info.route.resource
    if resource is None:
        return  # no such path or method: the router's handler says so
    method = "GET" if request.method == "HEAD" else request.method
    takes = OPERATIONS.get((method, resource.canonical), NOTHING)
    for name, value in request.match_info.items():
        _printable(name, value)
    _check_query(request, takes)
    if takes.members is None:
        await _expect_no_body(request)
    else:
        await _check_body(request, takes.members)


def _check_query(request: web.Request, takes: Takes) -> None:
    for name, value in request.query.items():
        if name not in takes.once and name not in takes.many:
            raise _unknown("parameter", name, (*takes.once, *takes.many))
        _printable(name, value)
    for name in takes.once:
        if len(given := request.query.getall(name, [])) > 1:
            raise Problem(400, f"{name}: given {len(given)} times, expected once", field=name)


def _printable(name: str, value: str) -> None:
    if not value.isprintable():
        raise Problem(400, f"{name}: {value!r} given, expected text without control characters", field=name)


def _unknown(what: str, name: str, known: Collection[str]) -> Problem:
    hint = did_you_mean(name, known)
    return Problem(400, f"{name}: unknown {what}, expected {', '.join(known) or 'none'}{hint}", field=name)


async def _expect_no_body(request: web.Request) -> None:
    if request.can_read_body and (data := await _read(request)):
        raise Problem(400, f"body: {len(data)} bytes given, expected none", field="body")


async def _check_body(request: web.Request, members: Collection[str]) -> None:
    kind = request.content_type  # without a header: application/octet-stream
    if "Content-Type" in request.headers and kind != "application/json":
        raise _unsupported("Content-Type", kind, "application/json")
    if (charset := (request.charset or "utf-8").lower()) not in CHARSETS:
        raise _unsupported("Content-Type", f"charset={charset}", "charset=utf-8")
    if (encoding := request.headers.get("Content-Encoding", "identity")) != "identity":
        raise _unsupported("Content-Encoding", encoding, "none")
    data = await _read(request)
    value = _decoded(data)
    for name in value:
        if name not in members:
            raise _unknown("member", name, members)
    if len(data) > LARGE:
        await asyncio.to_thread(_refuse_repeated, data)
    else:
        _refuse_repeated(data)
    request[CONTENT] = value


def _unsupported(header: str, given: str, expected: str) -> Problem:
    return Problem(415, f"{header}: {given!r} given, expected {expected}", field=header)


async def _read(request: web.Request) -> bytes:
    """The whole body; Problem where it is too long, too slow or breaks off."""
    try:
        async with asyncio.timeout(BODY_TIME):
            return await request.read()
    except TimeoutError:
        raise Problem(408, f"body: its end did not come within {BODY_TIME:g} s", field="body") from None
    except RequestPayloadError as error:
        raise Problem(400, f"body: cannot be read: {' '.join(str(error).split())}", field="body") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise Problem(413, f"body: {error.text}", field="body") from error


def _decoded(data: bytes) -> dict[str, Any]:
    """The object in a body; Problem 400 for anything else."""
    try:
        value = msgspec.json.decode(data)
    except msgspec.ValidationError as error:
        text, field = validation(error)
        raise Problem(400, f"body: {text}", field=field or "body") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(400, f"body: not JSON: {error}", field="body") from error
    except RecursionError as error:
        raise Problem(400, "body: nested too deeply", field="body") from error
    if not isinstance(value, dict):
        raise Problem(400, f"body: {_kind(value)} given, expected an object", field="body")
    return value


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _refuse_repeated(data: bytes) -> None:
    """Refuse a member that an object has twice: the decoder would let the last one win in silence."""
    json.loads(data, object_pairs_hook=_members)


def _members(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        twice = next(name for name in names if sum(name == other for other, _ in pairs) > 1)
        raise Problem(400, f"{twice}: member given twice in one object, expected once", field=twice)
