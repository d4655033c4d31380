"""Layer-7 rules as data, and how a request is held against them (inventory PO-S06 to PO-S09, §8 item 23)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec

from ciliate.policy.expressions import compile_expression

_KAFKA_NAMES = """
produce fetch offsets metadata leaderandisr stopreplica updatemetadata controlledshutdown offsetcommit offsetfetch
findcoordinator joingroup heartbeat leavegroup syncgroup describegroups listgroups saslhandshake apiversions
createtopics deletetopics deleterecords initproducerid offsetforleaderepoch addpartitionstotxn addoffsetstotxn
endtxn writetxnmarkers txnoffsetcommit describeacls createacls deleteacls describeconfigs alterconfigs
alterreplicalogdirs describelogdirs saslauthenticate createpartitions
"""
KAFKA_KEYS = {name: number for number, name in enumerate(_KAFKA_NAMES.split())}
KAFKA_ROLES = {
    "produce": frozenset({0, 3, 18}),
    "consume": frozenset({1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 18}),
}
KAFKA_WITH_TOPICS = frozenset({0, 1, 2, 3, 4, 5, 6, 8, 9, 19, 20, 21, 23, 24, 27, 28, 34, 35, 37})


class HttpRule(NamedTuple):
    """Full-match expressions on a request; an empty one matches anything. Headers are (name, value or None)."""

    path: str = ""
    method: str = ""
    host: str = ""
    headers: tuple[tuple[str, str | None], ...] = ()


class KafkaRule(NamedTuple):
    """Conditions on a Kafka request; None or empty is anything."""

    api_keys: frozenset[int] | None = None
    api_version: str = ""
    client_id: str = ""
    topic: str = ""


class DnsRule(NamedTuple):
    """A DNS name, exact or with ``*``."""

    pattern: str
    exact: bool


GenericRule = tuple[tuple[str, str], ...]


class L7Rules(NamedTuple):
    """What one port item allows at layer 7; no rules at all allow every request of that parser."""

    parser: str
    rules: tuple[HttpRule | KafkaRule | DnsRule | GenericRule, ...] = ()


class HttpRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An HTTP request as a scenario states it. ``path`` includes a query string."""

    method: str = "GET"
    path: str = "/"
    host: str = ""
    headers: dict[str, str] = {}


class DnsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A DNS query."""

    name: str


class KafkaRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A Kafka request. ``apiKey`` is a name or a number, ``role`` produce or consume names its main key."""

    api_key: str | int = ""
    role: str = ""
    api_version: str | int = ""
    client_id: str = msgspec.field(name="clientID", default="")
    topic: str = ""
    topics: list[str] = []

    @property
    def key(self) -> int | None:
        """The API key's number; produce or fetch where only the role is given; None where unknown."""
        if isinstance(self.api_key, int):
            return self.api_key
        if self.api_key:
            return KAFKA_KEYS.get(self.api_key.lower())
        return {"produce": 0, "consume": 1}.get(self.role)


class GenericRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of any other parser: its name and what it sees of the request, such as ``{cmd: READ, file: a.txt}``."""

    l7proto: str
    fields: dict[str, str] = {}


L7Request = HttpRequest | DnsRequest | KafkaRequest | GenericRequest


@lru_cache(maxsize=4096)
def dns_expression(pattern: str) -> re.Pattern[str]:
    """What a matchPattern means: ``*`` stays within one label and knows no underscore; ``*`` alone is any name."""
    plain = normal_name(pattern)
    if plain == "*":
        return re.compile(r".*")
    return re.compile("[-a-z0-9]*".join(re.escape(part) for part in plain.split("*")))


def normal_name(name: str) -> str:
    """A DNS name in lower case, without the final dot."""
    return name.lower().rstrip(".")


def name_matches(pattern: str, exact: bool, name: str) -> bool:
    """True where a DNS name meets a matchName (``exact``) or a matchPattern."""
    if exact:
        return normal_name(pattern) == normal_name(name)
    return dns_expression(pattern).fullmatch(normal_name(name)) is not None


def allows(l7: L7Rules, request: L7Request) -> bool:
    """True where the rules of one parser let this request pass."""
    if isinstance(request, HttpRequest):
        return l7.parser == "http" and _any_http(l7, request)
    if isinstance(request, DnsRequest):
        return l7.parser == "dns" and _any_dns(l7, request)
    if isinstance(request, GenericRequest):
        return l7.parser == request.l7proto and _any_generic(l7, request)
    return l7.parser == "kafka" and _kafka(l7, request)


def _any_generic(l7: L7Rules, request: GenericRequest) -> bool:
    return not l7.rules or any(
        all(_generic_field(l7.parser, key, wanted, request.fields) for key, wanted in rule)
        for rule in l7.rules
        if not isinstance(rule, (HttpRule, KafkaRule, DnsRule))
    )


def _generic_field(parser: str, key: str, wanted: str, fields: Mapping[str, str]) -> bool:
    """Whether one condition of a rule holds: by expression where the parser takes it for one, else by equal text."""
    name, kind = _GENERIC_FIELDS.get((parser, key), (key, "text"))
    value = fields.get(name)
    if value is None:
        return False
    if kind == "expression":
        return compile_expression(wanted).search(value) is not None
    return value.startswith(wanted) if kind == "prefix" else value == wanted


_GENERIC_FIELDS = {
    ("r2d2", "file"): ("file", "expression"),
    ("cassandra", "query_table"): ("query_table", "expression"),
    ("memcache", "keyExact"): ("key", "text"),
    ("memcache", "keyPrefix"): ("key", "prefix"),
    ("memcache", "keyRegex"): ("key", "expression"),
}
"""What a condition of a parser looks at in a request, and how."""


def _any_http(l7: L7Rules, request: HttpRequest) -> bool:
    return not l7.rules or any(isinstance(rule, HttpRule) and _http(rule, request) for rule in l7.rules)


def _any_dns(l7: L7Rules, request: DnsRequest) -> bool:
    if not l7.rules:
        return True
    return any(isinstance(rule, DnsRule) and name_matches(rule.pattern, rule.exact, request.name) for rule in l7.rules)


def _http(rule: HttpRule, request: HttpRequest) -> bool:
    pairs = ((rule.path, request.path), (rule.method, request.method), (rule.host, request.host))
    if not all(not text or compile_expression(text).fullmatch(value) for text, value in pairs):
        return False
    headers = {name.lower(): value for name, value in request.headers.items()}
    return all(
        name.lower() in headers and (value is None or headers[name.lower()] == value) for name, value in rule.headers
    )


def _kafka(l7: L7Rules, request: KafkaRequest) -> bool:
    if not l7.rules:
        return True
    rules = [rule for rule in l7.rules if isinstance(rule, KafkaRule) and _kafka_head(rule, request)]
    topics = [*request.topics, *([request.topic] if request.topic else [])]
    if request.key is not None and request.key not in KAFKA_WITH_TOPICS:
        return bool(rules)
    if not topics:
        return any(not rule.topic for rule in rules)
    # a request that names several topics needs each of them allowed
    return all(any(rule.topic in ("", topic) for rule in rules) for topic in topics)


def _kafka_head(rule: KafkaRule, request: KafkaRequest) -> bool:
    if rule.api_keys is not None and request.key not in rule.api_keys:
        return False
    if rule.api_version and str(request.api_version) != rule.api_version:
        return False
    return not rule.client_id or request.client_id == rule.client_id
