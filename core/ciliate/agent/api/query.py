"""What requests say in paths and queries: ids, labels, addresses; every mistake names its parameter."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ciliate.agent.api.problem import Problem, wrong
from ciliate.ipam import Address
from ciliate.labels import SOURCE_ANY, Label, LabelSet, parse_label

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint

PREFIXES = ("ciliate-local", "container-id", "pod-name", "ipv4", "ipv6")
"""How an endpoint can be named instead of by its number (inventory section 4.2); ``cilium-local`` is understood too."""


def number(request: web.Request, name: str = "id") -> int:
    """A number in the path."""
    text = request.match_info[name]
    if not text.isascii() or not text.isdigit():
        raise wrong(name, text, "a number")
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
        if not value.isascii() or not value.isdigit():
            raise wrong("id", text, "a number")
        return agent.endpoints.get(int(value))
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
    texts = [text for value in request.query.getall(name, []) for text in value.split(",") if text]
    try:
        return [parse_label(text, SOURCE_ANY) for text in texts]
    except ValueError as error:
        raise Problem(400, f"{name}: {error}", field=name) from error


def carries(subject: LabelSet, wanted: list[Label]) -> bool:
    """Whether a label set has every one of these labels."""
    return all(subject.get(label.key, label.source) == label.value for label in wanted)


def address(request: web.Request) -> Address:
    """The address in the path."""
    return _address("ip", request.match_info["ip"])


def _address(field: str, text: str) -> Address:
    try:
        return ip_address(text)
    except ValueError:
        raise wrong(field, text, "an IP address") from None


def choice(request: web.Request, name: str, choices: tuple[str, ...]) -> str:
    """A query parameter that may be absent (empty) or one of ``choices``."""
    value = request.query.get(name, "")
    if value and value not in choices:
        raise wrong(name, value, f"one of {', '.join(choices)}")
    return value


def positive(request: web.Request, name: str, default: int) -> int:
    """A positive number in the query."""
    text = request.query.get(name, str(default))
    if not text.isascii() or not text.isdigit() or not int(text):
        raise wrong(name, text, "a positive number")
    return int(text)


def label_set(field: str, value: Any) -> LabelSet:
    """A list of label texts in a body."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(field, value, "a list of labels [source:]key[=value]")
    try:
        return LabelSet.parse(value)
    except ValueError as error:
        raise Problem(400, f"{field}: {error}", field=field) from error
