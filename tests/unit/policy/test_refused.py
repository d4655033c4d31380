"""What 1.5 refuses is refused here, by field; what it takes in the same place is taken."""

from __future__ import annotations

from typing import Any

import pytest

from ciliate.manifest import Document
from ciliate.policy.importer import check_document

HEAD = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "p", "namespace": "n"}}
NAME = {"matchName": "a.example"}
DNS = {"port": "53", "protocol": "ANY"}
TCP = {"port": "80", "protocol": "TCP"}
RULES = "spec.egress[0].toPorts[0].rules"


def _with(section: dict[str, Any]) -> list[tuple[str, str]]:
    whole = {**HEAD, "spec": {"endpointSelector": {}, "egress": [section]}}
    return [(item.field, item.expected) for item in check_document(Document(whole))]


def _ports(item: Any) -> list[tuple[str, str]]:
    return _with({"toPorts": [item]})


def _http(**rule: str) -> list[tuple[str, str]]:
    return _ports({"ports": [TCP], "rules": {"http": [rule]}})


def _generic(parser: str, **rule: str) -> list[tuple[str, str]]:
    return _ports({"ports": [TCP], "rules": {"l7proto": parser, "l7": [rule]}})


EXPRESSIONS = [
    "(?=x)",
    "(?!/admin).*",
    "(?<=x)y",
    "(?<!x)y",
    r"(a)\1",
    "(?P<n>a)(?P=n)",
    "(?>a)b",
    "(a)?(?(1)b|c)",
    "(?#note)a",
    "a*+",
    "a++",
    "a?+",
    "a{2}+",
    "a{1001}",
    "a{2,1001}",
    r"a\Z",
    "(?x)a b",
    "(?a:x)",
    "*.html",
    "a**",
    "[",
    ")",
    r"\\(",
]
GOOD_EXPRESSIONS = [
    "/public$",
    "^/v1/[a-z]+(/.*)?$",
    "(?i)get|post",
    "(?i:get)",
    "(?P<id>[0-9]{1,1000})",
    "(?:a|b)*?",
    r"\d+\.\w\b",
    "[(?=)*+]+",
    r"[\]\\(?!]+",
    "a{,3}",
    "x{1,2}?",
    "[[:alnum:]_]+",
    ".*",
    "",
]
REFUSED = {
    "dns without ports": (lambda: _ports({"rules": {"dns": [NAME]}}), RULES, '"53"'),
    "dns with no ports": (lambda: _ports({"ports": [], "rules": {"dns": [NAME]}}), RULES, '"53"'),
    "dns with null ports": (lambda: _ports({"ports": None, "rules": {"dns": [NAME]}}), RULES, '"53"'),
    "http without ports": (lambda: _ports({"rules": {"http": [{}]}}), RULES, "ports"),
    "kafka without ports": (lambda: _ports({"rules": {"kafka": [{}]}}), RULES, "ports"),
    "l7proto without ports": (lambda: _ports({"rules": {"l7proto": "r2d2"}}), RULES, "ports"),
    "an empty kind beside another": (
        lambda: _ports({"ports": [TCP], "rules": {"http": [], "kafka": [{}]}}),
        RULES,
        "one kind only",
    ),
    "an empty kind beside l7proto": (
        lambda: _ports({"ports": [TCP], "rules": {"http": [], "l7proto": "r2d2"}}),
        RULES,
        "one kind only",
    ),
    "an address in a set": (
        lambda: _with({"toCIDRSet": [{"cidr": "10.0.0.1"}]}),
        "spec.egress[0].toCIDRSet[0].cidr",
        "prefix length",
    ),
    "an address as exception": (
        lambda: _with({"toCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.0.0.1"]}]}),
        "spec.egress[0].toCIDRSet[0].except[0]",
        "prefix length",
    ),
    "a version of Kafka's API": (
        lambda: _ports({"ports": [TCP], "rules": {"kafka": [{"apiVersion": "32768"}]}}),
        f"{RULES}.kafka[0].apiVersion",
        "32767",
    ),
    "keyRegex": (lambda: _generic("memcache", keyRegex="("), f"{RULES}.l7[0].keyRegex", "regular expression"),
    "query_table": (
        lambda: _generic("cassandra", query_table="a["),
        f"{RULES}.l7[0].query_table",
        "regular expression",
    ),
    "file": (lambda: _generic("r2d2", file="(?=a)"), f"{RULES}.l7[0].file", "regular expression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    ask, field, told = REFUSED[name]
    found = ask()
    assert any(field == one and told in text for one, text in found), found


def test_expressions_that_no_proxy_has_are_refused() -> None:
    assert [text for text in EXPRESSIONS if not _http(path=text)] == []


def test_expressions_are_refused_in_each_field() -> None:
    for field in ("path", "method", "host"):
        ((found, text),) = _http(**{field: "("})
        assert found == f"{RULES}.http[0].{field}"
        assert "regular expression" in text


@pytest.mark.parametrize("text", GOOD_EXPRESSIONS)
def test_good_expressions_are_taken(text: str) -> None:
    assert _http(path=text) == []


TAKEN = [
    {"ports": [DNS], "rules": {"dns": [NAME]}},
    {"ports": [{"port": "53", "protocol": "UDP"}], "rules": {"dns": [{"matchPattern": "*"}]}},
    {"ports": [TCP], "rules": {"http": []}},
    {"ports": [{"port": "80"}], "rules": {"http": [], "kafka": []}},
    {"ports": [TCP], "rules": {}},
    {"ports": [TCP], "rules": None},
    {"ports": []},
    {"rules": {}},
    {"ports": [TCP], "rules": {"kafka": [{"apiVersion": "32767"}]}},
]


@pytest.mark.parametrize("item", TAKEN)
def test_taken(item: dict[str, Any]) -> None:
    assert _ports(item) == []


def test_an_address_stands_for_itself_outside_of_sets() -> None:
    assert _with({"toCIDR": ["10.0.0.1", "2001:db8::1"]}) == []


def _pair(one: dict[str, Any], other: dict[str, Any], parsers: tuple[str, str] = ("http", "kafka")) -> list[Any]:
    items = [{"ports": [port], "rules": {parser: [{}]}} for port, parser in zip((one, other), parsers, strict=True)]
    return _with({"toPorts": items})


def _tcp(port: str, **more: Any) -> dict[str, Any]:
    return {"port": port, "protocol": "TCP", **more}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_tcp("80"), _tcp("80")),
        (_tcp("80", endPort=90), _tcp("85")),
        (_tcp("85"), _tcp("80", endPort=90)),
        (_tcp("web"), _tcp("web")),
    ],
)
def test_two_parsers_on_one_port_are_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    ((field, told),) = _pair(one, other)
    assert field == "spec.egress[0].toPorts"
    assert "http and kafka" in told


@pytest.mark.parametrize(
    ("one", "other", "parsers"),
    [
        (_tcp("80"), _tcp("81"), ("http", "kafka")),
        (_tcp("80"), _tcp("80"), ("http", "http")),
        (_tcp("web"), _tcp("api"), ("http", "kafka")),
        (_tcp("80", endPort=84), _tcp("85"), ("http", "kafka")),
    ],
)
def test_two_parsers_on_two_ports_are_taken(
    one: dict[str, Any], other: dict[str, Any], parsers: tuple[str, str]
) -> None:
    assert _pair(one, other, parsers) == []


@pytest.mark.parametrize("port", ["080", "010", "0080"])
def test_ports_with_leading_zeros_are_refused(port: str) -> None:
    ((field, told),) = _ports({"ports": [_tcp(port)]})
    assert field == "spec.egress[0].toPorts[0].ports[0].port"
    assert "1 to 65535" in told
