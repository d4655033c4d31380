"""Numbers, references and order of services as plain data."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciliate.service.model import (
    BackendSpec,
    FrontendSpec,
    FrontendTakenError,
    Rules,
    ServiceError,
    ServiceMissingError,
    ServiceSpec,
    check,
)
from ciliate.service.table import ServiceTable


def spec(ip: str = "10.96.0.1", port: int = 80, backends: tuple[str, ...] = (), **fields: object) -> ServiceSpec:
    protocol = str(fields.pop("protocol", "TCP"))
    items = [BackendSpec(text.rstrip("!"), 8080, text.endswith("!")) for text in backends]
    front = FrontendSpec(ip, port, protocol)
    return ServiceSpec(frontend_address=front, backend_addresses=items, **fields)  # type: ignore[arg-type]


def names(table: ServiceTable, number: int) -> list[str]:
    return [str(item) for item in table.spec(table.get(number)).backend_addresses]


def test_numbers_stay_and_are_never_given_to_others() -> None:
    table = ServiceTable()
    _, (first, second) = table.plan([spec(port=80, backends=("10.0.0.1", "10.0.0.2")), spec(port=81)])
    assert (first.id, second.id) == (1, 2)
    assert first.backends == (1, 2)
    table.plan([], [1])
    _, (third,) = table.plan([spec(port=82, backends=("10.0.0.3",))])
    assert third.id == 3
    assert third.backends == (3,)
    _, (again,) = table.plan([spec(port=80, backends=("10.0.0.2",))])
    assert (again.id, again.backends) == (1, (2,))


def test_backends_are_shared_and_go_with_the_last_service() -> None:
    table = ServiceTable()
    change, _ = table.plan([spec(port=80, backends=("10.0.0.1",)), spec(port=81, backends=("10.0.0.1", "10.0.0.2"))])
    assert len(change.backends) == 2
    change, _ = table.plan([spec(port=81, backends=("10.0.0.2",))])
    assert not change.gone
    change, _ = table.plan([], [1])
    assert list(change.gone) == [1]
    assert table.backends.keys() == {2}


def test_protocols_do_not_share_backends() -> None:
    table = ServiceTable()
    table.plan([spec(protocol="TCP", backends=("10.0.0.1",)), spec(protocol="UDP", backends=("10.0.0.1",))])
    assert len(table.records) == len(table.backends) == 2


def test_what_stays_keeps_its_order_and_local_ones_come_first() -> None:
    table = ServiceTable()
    table.plan([spec(backends=("10.0.0.1", "10.0.0.2", "10.0.0.3"))])
    _, (record,) = table.plan([spec(backends=("10.0.0.4!", "10.0.0.3", "10.0.0.1"))])
    assert names(table, record.id) == ["10.0.0.4:8080", "10.0.0.1:8080", "10.0.0.3:8080"]
    assert record.local == 1


def test_the_same_again_changes_nothing() -> None:
    table = ServiceTable()
    table.plan([spec(backends=("10.0.0.1",))])
    assert table.plan([spec(backends=("10.0.0.1",))])[0].empty


def test_a_service_can_move_to_another_frontend() -> None:
    table = ServiceTable()
    table.plan([spec(port=80)])
    change, (record,) = table.plan([spec(port=90, id=1)])
    (_, old), *_ = change.upserts
    assert old is not None
    assert old.frontend != record.frontend
    assert table.plan([spec(port=80)])[1][0].id == 2


def test_overlaps_are_refused_with_the_field() -> None:
    table = ServiceTable()
    table.plan([spec(port=80)])
    with pytest.raises(FrontendTakenError) as taken:
        table.refuse_overlaps([spec(port=81), spec(port=80, id=7)])
    assert [item.field for item in taken.value.problems] == ["services[1].frontend-address"]
    with pytest.raises(FrontendTakenError) as doubled:
        table.refuse_overlaps([spec(port=81), spec(port=81)])
    assert doubled.value.problems[0].field == "services[1].frontend-address"
    with pytest.raises(ServiceError, match="each id once"):
        table.refuse_overlaps([spec(port=81, id=5), spec(port=82, id=5)])
    table.refuse_overlaps([spec(port=80, protocol="UDP", id=9)])
    with pytest.raises(ServiceMissingError):
        table.plan([], [99])


@given(st.integers(0, 2**32))
def test_references_always_add_up(seed: int) -> None:
    """After any sequence of changes exactly the backends that services name are there, each with one number."""
    choose, table = random.Random(seed), ServiceTable()
    kernel: dict[int, bytes] = {}
    for _ in range(30):
        pool = [f"10.0.0.{number}" for number in range(1, 9)]
        specs = [
            spec(port=port, backends=tuple(choose.sample(pool, choose.randint(0, 5))))
            for port in choose.sample(range(1, 6), choose.randint(0, 3))
        ]
        ports = {item.frontend_address.port for item in specs}
        free = [
            record.id for record in table.records.values() if int.from_bytes(record.frontend[16:18], "big") not in ports
        ]
        change, _ = table.plan(specs, choose.sample(free, min(len(free), choose.randint(0, 2))))
        kernel |= change.backends
        for number in change.gone:
            del kernel[number]
        named = {number for record in table.records.values() for number in record.backends}
        assert named == table.backends.keys() == kernel.keys()
        assert all(table.backends[number] == key for number, key in kernel.items())
        assert len(set(kernel.values())) == len(kernel)


RULES = Rules()
WRONG = [
    (spec(ip="10.96.0"), "frontend-address.ip"),
    (spec(ip="127.0.0.1"), "frontend-address.ip"),
    (spec(ip="::1"), "frontend-address.ip"),
    (spec(ip="224.0.0.1"), "frontend-address.ip"),
    (spec(ip="0.0.0.0"), "frontend-address.ip"),
    (spec(ip="169.254.1.1"), "frontend-address.ip"),
    (spec(port=0), "frontend-address.port"),
    (spec(port=65536), "frontend-address.port"),
    (spec(protocol="ICMP"), "frontend-address.protocol"),
    (spec(protocol="tcp"), "frontend-address.protocol"),
    (spec(backends=("fd00::1",)), "backend-addresses[0].ip"),
    (spec(ip="fd10::1", backends=("fd00::1", "10.0.0.1")), "backend-addresses[1].ip"),
    (spec(backends=("nowhere",)), "backend-addresses[0].ip"),
    (spec(backends=("10.0.0.1", "10.0.0.1")), "backend-addresses[1]"),
    (spec(source_ranges=["10.0.0.1/8"]), "source-ranges[0]"),
    (spec(ip="203.0.113.1", type="ExternalIP"), "frontend-address.ip"),
]


@pytest.mark.parametrize(("wrong", "field"), WRONG, ids=[field for _, field in WRONG])
def test_what_cannot_be_is_refused_with_the_field(wrong: ServiceSpec, field: str) -> None:
    assert field in [item.field for item in check(wrong, RULES)]


def test_addresses_of_others_are_only_taken_where_the_administrator_says_so() -> None:
    from ipaddress import ip_network

    rules = Rules(pods=(ip_network("10.200.0.0/16"),), external=(ip_network("203.0.113.0/24"),))
    assert [item.field for item in check(spec(ip="10.200.0.7"), rules)] == ["frontend-address.ip"]
    assert not list(check(spec(ip="203.0.113.1", type="ExternalIP"), rules))
    assert list(check(spec(ip="8.8.8.8", type="ExternalIP"), rules))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
    ],
)
def test_a_backend_is_an_address_that_packets_can_be_sent_to(address: str) -> None:
    """Behind the translation the node, or the pod that asks, would be led to itself, to its link, or to everybody."""
    front = "fd10::1" if ":" in address else "10.96.0.1"
    [problem] = check(spec(ip=front, backends=(address,)), RULES)
    assert problem.field == "backend-addresses[0].ip"
