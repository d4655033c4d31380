"""Reading and checking the ``rules`` of a ``toPorts`` item (inventory PO-S06 to PO-S09, PO-V06, V07, V10, V12, V13)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from ciliate.policy.expressions import mistake
from ciliate.policy.l7rules import (
    KAFKA_KEYS,
    KAFKA_ROLES,
    DnsRule,
    GenericRule,
    HttpRule,
    KafkaRule,
    L7Rules,
)
from ciliate.policy.model import PortItem
from ciliate.policy.reader import ABSENT, Reader

FIELDS = ("http", "kafka", "dns", "l7proto", "l7")
_EXACT_NAME = re.compile(r"([-a-zA-Z0-9_]+\.)*[-a-zA-Z0-9_]+\.?")
_NAME_PATTERN = re.compile(r"([-a-zA-Z0-9_*]+\.)*[-a-zA-Z0-9_*]+\.?")
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,255}")
_PARSER = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9_.]*[a-zA-Z0-9])?")
_HEADER_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
GENERIC_KEYS = {
    "cassandra": {"query_action", "query_table"},
    "memcache": {"command", "keyExact", "keyPrefix", "keyRegex"},
    "r2d2": {"cmd", "file"},
}

GENERIC_EXPRESSIONS = {"cassandra": {"query_table"}, "memcache": {"keyRegex"}, "r2d2": {"file"}}
_MAX_VERSION = 32767
"""Kafka's versions have 16 bits and a sign."""


def l7_rules(reader: Reader, value: Any, path: str) -> L7Rules | None:
    """The layer-7 part of a port rule; None where there is none (an empty list is none)."""
    if value is None:
        return None
    fields = reader.mapping(value, path, FIELDS)
    if fields is None:
        return None
    kinds = [kind for kind in ("http", "kafka", "dns") if fields.get(kind)]
    parser = _parser_name(reader, fields, path)
    # an empty list is no rule, but says the kind where there are rules of another
    said = [kind for kind in ("http", "kafka", "dns") if fields.get(kind) is not None]
    if (kinds or parser) and len(said) + bool(parser) > 1:
        given = ", ".join([*said, *(["l7proto"] if parser else [])])
        reader.problem(path, ABSENT, f"{given} given together, expected rules of one kind only")
    parsed = {kind: _list(reader, fields.get(kind), f"{path}.{kind}", _READERS[kind]) for kind in _READERS}
    if parser:
        generic = _list(reader, fields.get("l7"), f"{path}.l7", lambda r, v, p: _generic(r, v, p, parser))
        return L7Rules(parser, generic)
    return L7Rules(kinds[0], parsed[kinds[0]]) if kinds else None


def conflicting(items: Iterable[PortItem]) -> tuple[str, str] | None:
    """Two parsers that rules of one section give for one port, if there are any: nothing could be let through there."""
    by_place: dict[tuple[int, str], list[tuple[int, int, str]]] = {}
    for item in items:
        if item.l7 is not None:
            by_place.setdefault((item.protocol, item.name), []).append((item.first, item.last, item.l7.parser))
    for ranges in by_place.values():
        reach: dict[str, int] = {}
        for first, last, parser in sorted(ranges):
            other = next((name for name, end in reach.items() if name != parser and end >= first), None)
            if other is not None:
                return min(other, parser), max(other, parser)
            reach[parser] = max(last, reach.get(parser, -1))
    return None


def _parser_name(reader: Reader, fields: dict[str, Any], path: str) -> str:
    name = fields.get("l7proto")
    if name is None or name == "":
        if fields.get("l7"):
            reader.problem(f"{path}.l7", ABSENT, "expected l7proto beside it")
        return ""
    if not isinstance(name, str) or not _PARSER.fullmatch(name):
        reader.problem(f"{path}.l7proto", name, "expected the name of a parser")
        return ""
    if name in ("http", "kafka", "dns"):
        reader.problem(f"{path}.l7proto", name, f"expected field {name} instead")
        return ""
    return name


def _list(reader: Reader, value: Any, path: str, read: Callable[[Reader, Any, str], Any]) -> tuple[Any, ...]:
    found = [read(reader, item, below) for item, below in reader.items(value, path)]
    return tuple(item for item in found if item is not None)


def _texts(reader: Reader, value: Any, path: str, fields: tuple[str, ...]) -> dict[str, str] | None:
    mapping = reader.mapping(value, path, fields)
    if mapping is None:
        return None
    texts = {}
    for name in fields:
        item = mapping.get(name)
        if item is None or name == "headers":
            texts[name] = ""
        else:
            texts[name] = reader.text(item, f"{path}.{name}") or ""
    return texts


def _http(reader: Reader, value: Any, path: str) -> HttpRule | None:
    texts = _texts(reader, value, path, ("path", "method", "host", "headers"))
    if texts is None:
        return None
    for name in ("path", "method", "host"):
        _expression(reader, texts[name], f"{path}.{name}")
    headers = _list(reader, value.get("headers"), f"{path}.headers", _header)
    return HttpRule(texts["path"], texts["method"], texts["host"], headers)


def _expression(reader: Reader, text: str, path: str) -> None:
    wrong = mistake(text)
    if wrong:
        reader.problem(path, text, f"expected a regular expression: {wrong}")


def _header(reader: Reader, value: Any, path: str) -> tuple[str, str | None] | None:
    expected = 'text "Name: value" or "Name"'
    text = reader.text(value, path, expected)
    if text is None:
        return None
    name, separator, content = text.partition(":")
    if not separator:
        # the seed system also takes "Name value"
        name, separator, content = text.strip().partition(" ")
    if not _HEADER_NAME.fullmatch(name.strip()):
        reader.problem(path, value, f"expected {expected}")
        return None
    return name.strip(), content.strip() if separator else None


def _kafka(reader: Reader, value: Any, path: str) -> KafkaRule | None:
    texts = _texts(reader, value, path, ("role", "apiKey", "apiVersion", "clientID", "topic"))
    if texts is None:
        return None
    role, key, topic = texts["role"].lower(), texts["apiKey"].lower(), texts["topic"]
    if role and key:
        reader.problem(path, ABSENT, "role and apiKey given together, expected only one of them")
    if role and role not in KAFKA_ROLES:
        reader.problem(f"{path}.role", texts["role"], f"expected one of {', '.join(KAFKA_ROLES)}")
    if key and key not in KAFKA_KEYS:
        reader.problem(f"{path}.apiKey", texts["apiKey"], "expected the name of a Kafka request, such as produce")
    version = texts["apiVersion"]
    if version and not (version.isascii() and version.isdigit() and len(version) < 6 and int(version) <= _MAX_VERSION):
        reader.problem(f"{path}.apiVersion", version, f"expected a number in quotes, at most {_MAX_VERSION}")
    if topic and not _TOPIC.fullmatch(topic):
        reader.problem(f"{path}.topic", topic, "expected at most 255 letters, digits, '.', '_' and '-'")
    keys = KAFKA_ROLES.get(role) if role else frozenset({KAFKA_KEYS.get(key, -1)}) if key else None
    return KafkaRule(keys, texts["apiVersion"], texts["clientID"], topic)


def dns_rule(reader: Reader, value: Any, path: str) -> DnsRule | None:
    """One ``{matchName}`` or ``{matchPattern}``, in ``rules.dns`` and in ``toFQDNs``."""
    texts = _texts(reader, value, path, ("matchName", "matchPattern"))
    if texts is None:
        return None
    name, pattern = texts["matchName"], texts["matchPattern"]
    if bool(name) == bool(pattern):
        both = "matchName and matchPattern given together, " if name else ""
        reader.problem(path, ABSENT, f"{both}expected one of matchName and matchPattern")
        return None
    expression = _EXACT_NAME if name else _NAME_PATTERN
    if len(name or pattern) > 255 or not expression.fullmatch(name or pattern):
        field = "matchName" if name else "matchPattern"
        star = "" if name else ", '*'"
        expected = f"expected a DNS name of letters, digits, '-', '_', '.'{star}"
        reader.problem(f"{path}.{field}", name or pattern, expected)
        return None
    return DnsRule(name or pattern, bool(name))


def _generic(reader: Reader, value: Any, path: str, parser: str) -> GenericRule | None:
    known = GENERIC_KEYS.get(parser)
    mapping = reader.mapping(value, path, known)
    if mapping is None:
        return None
    for key, item in mapping.items():
        text = reader.text(item, f"{path}.{key}")
        if text is not None and key in GENERIC_EXPRESSIONS.get(parser, ()):
            _expression(reader, text, f"{path}.{key}")
    return tuple(sorted((str(key), str(item)) for key, item in mapping.items()))


_READERS: dict[str, Callable[[Reader, Any, str], Any]] = {"http": _http, "kafka": _kafka, "dns": dns_rule}
