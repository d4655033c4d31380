"""What requests say in paths, queries and bodies; every mistake names its parameter or member."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ciliate.agent.api.admission import CONTENT
from ciliate.agent.api.problem import Problem, wrong
from ciliate.ipam import Address
from ciliate.labels import SOURCE_ANY, Label, LabelSet, parse_label
from ciliate.policy.importer import carry

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint

MAX_NUMBER = (1 << 64) - 1
MAX_DIGITS = 20
MAX_LABEL = 512
"""Characters of a label that a user gives; the longest of Kubernetes has 400."""
PREFIXES = ("ciliate-local", "container-id", "pod-name", "ipv4", "ipv6")
"""How an endpoint can be named instead of by its number (inventory section 4.2); ``cilium-local`` is understood too."""


def number(request: web.Request, name: str = "id") -> int:
    """A number in the path."""
    return natural(name, request.match_info[name])


def natural(name: str, text: str, low: int = 0, high: int = MAX_NUMBER) -> int:
    """A number from ``low`` to ``high`` in decimal digits; Problem 400 naming ``name`` for anything else."""
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS or not low <= int(text) <= high:
        limits = f" from {low} to {high}" if high < MAX_NUMBER else f" from {low}" if low else ""
        raise wrong(name, text[:100], f"a number{limits}")
    return int(text)


def endpoint(request: web.Request, agent: Agent) -> Endpoint:
    """The endpoint that the path names; Problem 400 for a malformed id, 404 where there is none."""
    text = request.match_info["id"]
    prefix, colon, value = text.partition(":")
    if not colon:
        prefix, value = "ciliate-local", text
    prefix = prefix.replace("cilium-", "ciliate-")
    if prefix not in PREFIXES or not value:
        raise wrong("id", text, f"a number or one of {', '.join(PREFIXES)} with ':' and a value")
    if prefix == "ciliate-local":
        return agent.endpoints.get(natural("id", value))
    wanted = str(_address("id", value)) if prefix in ("ipv4", "ipv6") else value
    for item in agent.endpoints.endpoints():
        if wanted in _names(item, prefix):
            return item
    raise Problem(404, f"id: no endpoint has {prefix} {value}", field="id")


def _names(item: Endpoint, prefix: str) -> list[str]:
    if prefix == "pod-name":
        return [item.pod]
    if prefix == "container-id":
        return [item.request.container_id]
    return [str(address) for address in item.addresses]


def labels(request: web.Request, name: str = "labels") -> list[Label]:
    """Labels in the query, repeated or separated by commas; one without a source means any source."""
    texts = [text for value in request.query.getall(name, []) for text in value.split(",")]
    try:
        return [parse_label(text, SOURCE_ANY) for text in texts]
    except ValueError as error:
        raise Problem(400, f"{name}: {error}", field=name) from error


def carries(subject: LabelSet, wanted: list[Label]) -> bool:
    """Whether a label set has every one of these labels."""
    return carry(subject, wanted)


def address(request: web.Request) -> Address:
    """The address in the path."""
    return _address("ip", request.match_info["ip"])


def _address(field: str, text: str) -> Address:
    try:
        found = ip_address(text)
    except ValueError:
        raise wrong(field, text, "an IP address") from None
    if getattr(found, "scope_id", None):
        raise wrong(field, text, "an IP address without a zone")
    return found


def choice(request: web.Request, name: str, choices: tuple[str, ...]) -> str:
    """A query parameter that may be absent (empty) or one of ``choices``."""
    value = request.query.get(name, "")
    if value and value not in choices:
        raise wrong(name, value, f"one of {', '.join(choices)}")
    return value


def flag(request: web.Request, name: str) -> bool:
    """A query parameter that is true, or false where it is absent."""
    return choice(request, name, ("true", "false")) == "true"


def positive(request: web.Request, name: str, default: int, most: int) -> int:
    """A number from 1 to ``most`` in the query."""
    return natural(name, request.query.get(name, str(default)), 1, most)


def seconds(request: web.Request, name: str, default: float, most: float) -> float:
    """A time from 0 to ``most`` seconds in the query."""
    text = request.query.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:  # what is not a number is neither
        raise wrong(name, text[:100], f"seconds from 0 to {most:g}")
    return value


def label_set(field: str, value: Any) -> LabelSet:
    """A list of label texts in a body."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(field, value, "a list of labels [source:]key[=value]")
    for text in value:
        if len(text) > MAX_LABEL or not text.isprintable():
            raise wrong(field, text[:100], f"labels of at most {MAX_LABEL} characters, none of control")
    try:
        return LabelSet.parse(value)
    except ValueError as error:
        raise Problem(400, f"{field}: {error}", field=field) from error


def content(request: web.Request) -> dict[str, Any]:
    """The JSON object in the request's body, as it was admitted."""
    value: dict[str, Any] = request[CONTENT]
    return value


def body(request: web.Request, field: str) -> Any:
    """The member ``field`` of the JSON object in the request's body; Problem 400 where it is missing."""
    value = content(request)
    if field not in value:
        raise Problem(400, f"body: expected an object with the member {field!r}", field=field)
    return value[field]


def texts(request: web.Request, *fields: str) -> list[str]:
    """Members that are required and text."""
    values = [body(request, field) for field in fields]
    for field, value in zip(fields, values, strict=True):
        if not isinstance(value, str):
            raise wrong(field, value, "text")
    return values
