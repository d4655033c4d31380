"""Requests that are wrong, made from the API's document: each must be refused, or answered, as it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

JSON = {"Content-Type": "application/json"}
DEEP = b"[" * 5000
BODIES: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"null", 400),
    (b"[]", 400),
    (b"1e999", 400),
    (b"{}x", 400),
    (b'{"a":NaN}', 400),
    (b'{"a":' + b"9" * 5000 + b"}", 400),
    (b'{"a":"\xff"}', 400),
    (b'{"a":"\\ud800"}', 400),
    (b"\xef\xbb\xbf{}", 400),
    (b'{"a":' + DEEP, 400),
)
HEADERS: tuple[tuple[dict[str, str], int], ...] = (
    ({"Content-Type": "text/yaml"}, 415),
    ({"Content-Type": "application/json; charset=utf-16"}, 415),
    ({"Content-Encoding": "gzip"}, 415),
)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 2**63, -(2**63), 1e308),
    *("", "²", "x\0y", "x" * 70000),
    *([], [None], [1], [[]], [{}], [{"object": None}], [{"object": {}, "bogus": 1}], ["\n"]),
    *({}, {"x": None}, {"": {"": []}}),
)
TEXTS = (
    *("", "²", "-1", "9" * 30, "9" * 4500, "1_0", "+1", "nan", "inf"),
    *("\0", "a\nb", "../..", "x" * 300, "ipv4:x", "ü:ü", "fe80::1%1"),
)
"""For parameters of paths and queries."""


class Wrong(NamedTuple):
    """One request. ``status`` 0: anything but a failure of the agent."""

    method: str
    pattern: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    status: int = 0
    field: str = ""


def of(method: str, pattern: str, operation: dict[str, Any], known: dict[str, str]) -> Iterator[Wrong]:
    """Wrong requests of one operation; ``known`` has a value for each parameter of paths, ``forms`` are the schemas of
    its body.
    """
    path = pattern.format(**known)
    good = b"{}" if "requestBody" in operation else None
    yield Wrong(method, pattern, f"{path}?bogus=1", good, {}, 400, "bogus")
    for name in re.findall(r"{(\w+)}", pattern):
        for text in TEXTS:
            yield Wrong(method, pattern, pattern.format(**{**known, name: quote(text or " ", safe="")}), good)
    for item in operation["parameters"]:
        if item["in"] == "query":
            yield from _query(method, pattern, path, item)
    if good is None:
        yield Wrong(method, pattern, path, b"{}", {}, 400, "body")
    else:
        yield from _bodies(method, pattern, path, operation)


def _query(method: str, pattern: str, path: str, item: dict[str, Any]) -> Iterator[Wrong]:
    name = item["name"]
    if item["schema"].get("type") != "array":
        yield Wrong(method, pattern, f"{path}?{name}=&{name}=", None, {}, 400, name)
    for text in TEXTS:
        yield Wrong(method, pattern, f"{path}?{name}={quote(text, safe='')}")


def _bodies(method: str, pattern: str, path: str, operation: dict[str, Any]) -> Iterator[Wrong]:
    for body, status in BODIES:
        yield Wrong(method, pattern, path, body, JSON, status)
    for headers, status in HEADERS:
        yield Wrong(method, pattern, path, b"{}", headers, status)
    yield Wrong(method, pattern, path, b'{"bogus":1}', JSON, 400, "bogus")
    for form in operation["forms"]:
        for name in form["properties"]:
            yield Wrong(method, pattern, path, f'{{"{name}":1,"{name}":1}}'.encode(), JSON, 400, name)
            for value in VALUES:
                yield Wrong(method, pattern, path, json.dumps({name: value}).encode(), JSON)
