"""What a decoder refused of an object: the field, the value that stands there, and what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from ciliate.service.model import PROTOCOLS, Problem

_MESSAGE = re.compile(r"(?P<text>.*?)(?: - at `(?P<key>key` in `)?\$(?P<path>[^`]*)`)?", re.DOTALL)
_WANTED = re.compile(r"Expected `(?P<kinds>[^`]+)`(?P<limit>[^,]*)(?:, got .*)?")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]+)`")
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_WORDS = {
    "str": "a text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}
INTEGERS = range(-(1 << 63), 1 << 64)
"""Those that can be kept on disk."""


def refusal(error: msgspec.ValidationError, raw: Any, prefix: str) -> Problem:
    """The problem that the decoder found in ``raw``; ``prefix`` stands before the field."""
    found = _MESSAGE.fullmatch(str(error))
    text, path = (found["text"], found["path"] or "") if found else (str(error), "")
    if missing := _MISSING.fullmatch(text):
        return Problem(f"{prefix}{path}.{missing['name']}", None, "it to be there")
    wanted = _WANTED.fullmatch(text)
    kinds = wanted["kinds"].split(" | ") if wanted else []
    field, value = next(_values(raw, path, "", kinds), (path, None))
    if wanted:
        expected = " or ".join(_WORDS.get(kind, kind) for kind in kinds) + wanted["limit"]
    elif text.startswith("Invalid enum value") and field.endswith(".protocol"):
        expected = f"one of {', '.join(PROTOCOLS)}"
    else:
        expected = text
    return Problem(f"{prefix}{field}", value, expected)


def _values(raw: Any, path: str, field: str, kinds: list[str]) -> Iterator[tuple[str, Any]]:
    """The values at a path, with their fields; of the many that ``[...]`` stands for those of another kind."""
    step = _STEP.match(path)
    if step is None:
        yield field, raw
        return
    rest = path[step.end() :]
    if step[2] == "...":
        if isinstance(raw, dict):
            below = (item for key, value in raw.items() for item in _values(value, rest, f"{field}.{key}", kinds))
            yield from (item for item in below if not any(_is(item[1], kind) for kind in kinds))
    elif step[2]:
        if isinstance(raw, list) and int(step[2]) < len(raw):
            yield from _values(raw[int(step[2])], rest, f"{field}[{step[2]}]", kinds)
    elif isinstance(raw, dict):
        yield from _values(raw.get(step[1]), rest, f"{field}.{step[1]}", kinds)


def _is(value: Any, kind: str) -> bool:
    found = _TYPES.get(kind, object)
    return isinstance(value, found) and (kind == "bool" or not isinstance(value, bool))


def too_large(raw: Any, field: str) -> Iterator[Problem]:
    """Every integer that does not fit in 64 bits."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            yield from too_large(value, f"{field}.{key}")
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from too_large(value, f"{field}[{index}]")
    elif isinstance(raw, int) and raw not in INTEGERS:
        yield Problem(field, raw, "numbers of at most 64 bits")
