"""Problem documents (RFC 9457): every error names what was wrong and what was expected."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from ciliate.config import ConfigError
from ciliate.datapath import DatapathError
from ciliate.endpoint.manager import EndpointError
from ciliate.plugin import PluginError
from ciliate.policy.repository import PolicyError
from ciliate.workload import WorkloadError

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Problem(Exception):
    """An error that a handler answers with."""

    def __init__(self, status: int, detail: str, problems: list[dict[str, Any]] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.problems = problems or []


def document(status: int, detail: str, problems: list[dict[str, Any]] | None = None) -> web.Response:
    """A response of type ``application/problem+json``."""
    body: dict[str, Any] = {"title": _title(status), "status": status, "detail": detail}
    if problems:
        body["problems"] = problems
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/problem+json")


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure with a problem document; only the unforeseen is logged with its trace."""
    try:
        return await handler(request)
    except Problem as problem:
        return document(problem.status, str(problem), problem.problems)
    except PolicyError as error:
        problems = [{**msgspec.to_builtins(item), "text": str(item)} for item in error.problems]
        return document(400, str(error), problems)
    except (WorkloadError, ConfigError, msgspec.ValidationError) as error:
        return document(400, str(error))
    except EndpointError as error:
        return document(404, str(error))
    except (PluginError, DatapathError) as error:
        return document(500, str(error))
    except web.HTTPException as error:
        return document(error.status, error.reason)
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        return document(500, f"{type(error).__name__}: {error}")


def _title(status: int) -> str:
    titles = {400: "Bad request", 404: "Not found", 405: "Method not allowed", 409: "Conflict", 503: "Not ready"}
    return titles.get(status, "Internal error")


def answer(value: Any, status: int = 200) -> web.Response:
    """A JSON response."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


async def body(request: web.Request, field: str) -> Any:
    """The member ``field`` of the JSON object in the request's body; Problem 400 where it is missing."""
    try:
        value = msgspec.json.decode(await request.read())
    except msgspec.DecodeError as error:
        raise Problem(400, f"body: not JSON: {error}") from error
    if not isinstance(value, dict) or field not in value:
        raise Problem(400, f"body: expected an object with the member {field!r}")
    return value[field]
