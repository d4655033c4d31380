"""The ipcache table: precedence of sources and shadowing (inventory DP-I01, DP-I02, section 8 item 21)."""

from ipaddress import ip_network

import pytest

from ciliate.ipcache import Ipcache, Source

A = ip_network("10.0.0.1/32")
NET = ip_network("10.0.0.0/24")


def test_script_of_claims_gives_the_expected_table_after_every_step() -> None:
    cache = Ipcache()
    steps = [
        (lambda: cache.upsert(A, 7, Source.CIDR), {A: 7}),
        (lambda: cache.upsert(A, 300, Source.LOCAL), {A: 300}),
        (lambda: cache.upsert(A, 400, Source.KVSTORE), {A: 300}),
        (lambda: cache.upsert(NET, 8, Source.CIDR), {A: 300, NET: 8}),
        (lambda: cache.delete(A, Source.KUBERNETES), {A: 300, NET: 8}),
        (lambda: cache.delete(A, Source.LOCAL), {A: 400, NET: 8}),
        (lambda: cache.delete(A, Source.KVSTORE), {A: 7, NET: 8}),
        (lambda: cache.delete(A, Source.CIDR), {NET: 8}),
    ]
    for number, (step, expected) in enumerate(steps):
        step()
        assert cache.table() == expected, f"after step {number}"


def test_take_gives_each_change_once() -> None:
    cache = Ipcache()
    cache.upsert(A, 1, Source.LOCAL)
    assert cache.take() == ({A: 1}, set())
    assert cache.take() == ({}, set())
    cache.delete(A, Source.LOCAL)
    assert cache.take() == ({}, {A})
    cache.put_back([A])
    assert cache.take() == ({}, {A})


@pytest.mark.parametrize(
    ("kernel", "upserts", "deletes"),
    [({}, {A: 1}, set()), ({A: 1}, {}, set()), ({A: 2, NET: 3}, {A: 1}, {NET})],
)
def test_what_would_make_the_kernel_equal(kernel: dict, upserts: dict, deletes: set) -> None:
    cache = Ipcache()
    cache.upsert(A, 1, Source.LOCAL)
    assert cache.differs(kernel) == (upserts, deletes)
