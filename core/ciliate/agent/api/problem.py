"""Problem documents (RFC 9457): every error names the field that was wrong and what was expected."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from ciliate.config import ConfigError
from ciliate.datapath import DatapathError
from ciliate.endpoint.labelling import LabelChangeError
from ciliate.endpoint.manager import EndpointError, EndpointExistsError, EndpointMissingError
from ciliate.endpoint.options import OptionError
from ciliate.ipam import IpamConflict, IpamError
from ciliate.plugin import PluginError, UnknownProviderError
from ciliate.policy.repository import PolicyError
from ciliate.service.model import FrontendTakenError, ServiceError, ServiceMissingError
from ciliate.workload import WorkloadError

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
TITLES = {
    400: "Bad request",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    408: "Too slow",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    501: "Not implemented",
    502: "Not possible now",
    503: "Not ready",
}
_PATH = re.compile(r"(.*?)(?: - at `(?:key in )?\$\.?([^`]*)`)?", re.DOTALL)
_MEMBER = re.compile(r"Object (contains unknown|missing required) field `(.*)`", re.DOTALL)
_FIELD = re.compile(r"^([A-Za-z][\w.\[\]-]*): ")


class Problem(Exception):
    """An error that a handler answers with. ``field`` is the parameter or member that was wrong."""

    def __init__(
        self, status: int, detail: str, problems: list[dict[str, Any]] | None = None, field: str | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.problems = problems or []
        self.field = field


def wrong(field: str, value: object, expected: str) -> Problem:
    """A 400 that names the field, what was given and what was expected."""
    return Problem(400, f"{field}: {value!r} given, expected {expected}", field=field)


def document(
    status: int, detail: str, problems: list[dict[str, Any]] | None = None, field: str | None = None
) -> web.Response:
    """A response of type ``application/problem+json``."""
    body: dict[str, Any] = {"type": "about:blank", "title": TITLES.get(status, "Internal error"), "status": status}
    body["detail"] = detail
    if field is None and (found := _FIELD.match(detail)):
        field = found[1]  # texts of errors begin with the field they speak of
    if field:
        body["field"] = field
    if problems:
        body["problems"] = problems
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/problem+json")


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure with a problem document; only the unforeseen is logged with its trace."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        answer = document(error.status, f"{request.method} {request.path}: {error.reason}")
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except Exception as error:
        known = _known(error)
        if known is None:
            log.exception("%s %s failed", request.method, request.path)
            return document(500, f"{type(error).__name__}: {error}")
        return document(known.status, str(known), known.problems, known.field)


def _known(error: Exception) -> Problem | None:
    """The problem that an error of one of the parts is to the client, or None for what nobody foresaw."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, PolicyError):
        problems = [{**msgspec.to_builtins(item), "text": str(item)} for item in error.problems]
        return Problem(400, str(error), problems)
    if isinstance(error, ConfigError):
        return _configuration(error)
    if isinstance(error, ServiceError):
        return _services(error)
    if isinstance(error, msgspec.ValidationError):
        text, field = validation(error)
        return Problem(400, text, field=field)
    if isinstance(error, LabelChangeError | OptionError):
        return Problem(400, str(error), field=error.field)
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return Problem(status, str(error))
    return None


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (WorkloadError, 400),
    (ServiceMissingError, 404),
    (EndpointMissingError, 404),
    (EndpointExistsError, 409),
    (EndpointError, 500),
    (IpamConflict, 409),
    (IpamError, 502),
    (UnknownProviderError, 400),
    (PluginError, 500),
    (DatapathError, 500),
)
"""Errors of parts; the first that fits counts."""


def validation(error: msgspec.ValidationError) -> tuple[str, str | None]:
    """What msgspec refused as ``FIELD: what was expected``, and the field."""
    found = _PATH.fullmatch(str(error))
    text, field = (found[1], found[2] or "") if found else (str(error), "")
    if member := _MEMBER.fullmatch(text):
        field = f"{field}.{member[2]}".lstrip(".")
        text = "unknown member" if member[1] == "contains unknown" else "missing"
    text = text[:1].lower() + text[1:].replace("`", "")
    return (f"{field}: {text}", field) if field else (text, None)


def _services(error: ServiceError) -> Problem:
    problems = [{**msgspec.to_builtins(item), "text": str(item)} for item in error.problems]
    status = 409 if isinstance(error, FrontendTakenError) else 400
    return Problem(status, str(error), problems, error.problems[0].field if error.problems else None)


def _configuration(error: ConfigError) -> Problem:
    problems = [
        {"field": item.field, "value": str(item.value), "expected": item.expected, "text": str(item)}
        for item in error.problems
    ]
    return Problem(400, str(error), problems, error.problems[0].field if error.problems else None)


def answer(value: Any, status: int = 200) -> web.Response:
    """A JSON response."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
