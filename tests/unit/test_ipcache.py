"""The ipcache table: precedence of sources and shadowing (inventory DP-I01, DP-I02, section 8 item 21)."""

from ipaddress import IPv4Address, ip_network

import pytest

from ciliate.datapath.layout import differences, ipcache_entry, ipcache_entry_of, ipcache_key
from ciliate.ipcache import Ipcache, Source

A = ip_network("10.0.0.1/32")
NET = ip_network("10.0.0.0/24")
A_KEY, NET_KEY = ipcache_key(A), ipcache_key(NET)
NODE = IPv4Address("192.0.2.7")


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
        assert {prefix: cache.get(prefix) for prefix in expected} == expected, f"after step {number}"
        assert len(cache) == len(expected)


def test_take_gives_each_change_once() -> None:
    cache = Ipcache()
    cache.upsert(A, 1, Source.LOCAL)
    assert cache.take() == ({A_KEY: ipcache_entry(1)}, set())
    assert cache.take() == ({}, set())
    cache.upsert(A, 1, Source.LOCAL)
    assert cache.take() == ({}, set())
    cache.delete(A, Source.LOCAL)
    assert cache.take() == ({}, {A_KEY})
    cache.put_back([A_KEY])
    assert cache.take() == ({}, {A_KEY})


def test_node_and_key_are_part_of_an_entry() -> None:
    cache = Ipcache()
    cache.upsert(A, 300, Source.KVSTORE, NODE, 3)
    (value,) = cache.take()[0].values()
    assert ipcache_entry_of(value) == (300, NODE, 3)
    cache.upsert(A, 300, Source.KVSTORE, NODE, 4)
    assert cache.take()[0] == {A_KEY: ipcache_entry(300, NODE, 4)}


@pytest.mark.parametrize(
    ("kernel", "upserts", "deletes"),
    [
        ({}, {A_KEY: ipcache_entry(1)}, set()),
        ({A_KEY: ipcache_entry(1)}, {}, set()),
        ({A_KEY: ipcache_entry(1, NODE)}, {A_KEY: ipcache_entry(1)}, set()),
        ({A_KEY: ipcache_entry(2), NET_KEY: ipcache_entry(3)}, {A_KEY: ipcache_entry(1)}, {NET_KEY}),
    ],
)
def test_what_would_make_the_kernel_equal(kernel: dict, upserts: dict, deletes: set) -> None:
    cache = Ipcache()
    cache.upsert(A, 1, Source.LOCAL)
    assert differences(kernel.items(), cache.entries()) == (upserts, deletes)
