"""Nodes and addresses over one store: what is told, what is heard, what a loss of the store or of a node means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

import pytest

from ciliate.backoff import ClusterSize
from ciliate.datapath.layout import ipcache_entry, ipcache_entry_of, ipcache_host_key, ipcache_key
from ciliate.ipcache import Ipcache, Source
from ciliate.kvstore.local import Contents, LocalStore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.node import Node, NodeRegistry, records
from ciliate.node.addresses import PREFIX, ClusterAddresses
from ciliate.node.registry import PREFIX as NODES

POD, POD6 = IPv4Address("10.1.0.7"), IPv6Address("fd00:1::7")


class Member:
    """One node of a cluster, with a table of what it knows."""

    def __init__(self, contents: Contents, number: int, cache: Path | None = None) -> None:
        self.own = Node(name=f"n{number}", ipv4=IPv4Address(f"192.0.2.{number}"))
        self.store = LocalStore("local", contents)
        self.keys = LocalKeys(self.store, ttl=30.0)
        self.size = ClusterSize()
        self.ipcache = Ipcache()
        self.touched: list[set[int]] = []
        self.heard: list[tuple[list[Node], list[Node]]] = []
        self.registry = NodeRegistry(self.store, self.keys, self.own, self.size, cache)
        self.addresses = ClusterAddresses(self.store, self.keys, self.own, self.ipcache, self.size, self.touched.append)
        self.registry.subscribe(lambda came, went: self.heard.append((came, went)))
        self.parts: list[Any] = [self.keys, self.registry, self.addresses]


@contextlib.asynccontextmanager
async def cluster(*members: Member) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for part in (part for member in members for part in member.parts):
            await part.start()
            stack.push_async_callback(part.stop)
        yield


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_nodes_know_each_other_and_their_pods() -> None:
    contents = Contents()
    one, two = Member(contents, 1), Member(contents, 2)
    async with cluster(one, two):
        await until(lambda: one.registry.others and two.registry.others)
        assert one.registry.others == {two.own.id: two.own}
        assert (one.size.nodes, two.heard[-1]) == (2, ([one.own], []))
        one.addresses.publish([POD, POD6], 300, 7, {"http": [("TCP", 80)]})
        await until(lambda: len(two.ipcache) == 2)
        assert two.ipcache.table() == {ip_network(str(POD)): 300, ip_network(str(POD6)): 300}
        assert ipcache_entry_of(two.ipcache.entry(ipcache_host_key(str(POD6))) or b"") == (300, one.own.ipv4, 0)
        assert two.addresses.ports(300) == {"http": [("TCP", 80)]}
        assert two.touched[-1] == {300}
        assert len(one.ipcache) == 0
        one.addresses.publish([POD], 301, 7, {})
        await until(lambda: two.ipcache.get(ip_network(str(POD))) == 301)
        assert two.addresses.ports(301) == {}
        one.addresses.withdraw([POD, POD6])
        await until(lambda: len(two.ipcache) == 0)
        assert two.addresses.ports(300) == {}


async def test_a_local_claim_wins_and_a_pod_that_moves_here_is_ours() -> None:
    contents = Contents()
    one, two = Member(contents, 1), Member(contents, 2)
    prefix = ip_network(str(POD))
    async with cluster(one, two):
        two.ipcache.upsert(prefix, 400, Source.LOCAL)
        one.addresses.publish([POD], 300, 7, {})
        await until(lambda: two.addresses.shared.items)
        assert two.ipcache.get(prefix) == 400
        two.addresses.publish([POD], 400, 1, {})
        await until(lambda: two.addresses.shared.items[str(POD)].own)
        assert not two.ipcache.claims(Source.KVSTORE)
        await until(lambda: one.ipcache.get(prefix) == 400)


async def test_nothing_is_withdrawn_with_a_lease_and_a_node_comes_back_silently() -> None:
    contents = Contents()
    one, two = Member(contents, 1), Member(contents, 2)
    async with cluster(one, two):
        one.addresses.publish([POD], 300, 7, {})
        await until(lambda: two.ipcache.claims(Source.KVSTORE) and two.registry.others)
        before = len(two.heard), len(two.touched)
        contents.end_lease(one.keys.lease_id)
        await until(lambda: one.keys.renewals == 1)
        await one.keys.flush()
        await until(lambda: two.registry.shared.held == 0 and two.addresses.shared.held == 0)
        assert (len(two.heard), len(two.touched)) == before


async def test_what_the_kernel_had_counts_until_the_store_is_heard_and_wrong_keys_are_ours_to_remove() -> None:
    contents = Contents()
    member = Member(contents, 1)
    kernel = {
        ipcache_host_key(str(POD)): ipcache_entry(300, IPv4Address("192.0.2.9")),
        ipcache_key(ip_network("10.0.0.0/8")): ipcache_entry(1 << 24),
        ipcache_host_key("192.0.2.9"): ipcache_entry(1),
        ipcache_host_key("10.1.0.9"): ipcache_entry(301),
    }
    member.ipcache.upsert(ip_network("10.1.0.9"), 301, Source.LOCAL)
    member.addresses.inherit(kernel)
    assert member.ipcache.table() == {ip_network(str(POD)): 300, ip_network("10.1.0.9"): 301}
    own = records.owner("default", "n1")
    await member.store.put(f"{PREFIX}10.1.0.20", records.encode(IPv4Address("10.1.0.20"), None, 300, f"{own}:4"))
    async with cluster(member):
        member.addresses.publish([IPv4Address("10.1.0.9")], 301, 9, {})
        await member.addresses.settle()
        left = {item.key.removeprefix(PREFIX) for item in (await member.store.get_prefix(PREFIX)).items}
        assert left == {"10.1.0.9"}
        assert member.addresses.shared.holds(str(POD))


async def test_nodes_of_the_last_run_are_known_without_the_store(tmp_path: Path) -> None:
    contents = Contents()
    one, two = Member(contents, 1), Member(contents, 2, tmp_path / "nodes.json")
    async with cluster(one, two):
        await until(lambda: two.registry.others)
    again = Member(Contents(), 2, tmp_path / "nodes.json")
    async with cluster(again):
        assert again.registry.others == {one.own.id: one.own}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("10.1.0.7", b""),
        ("10.1.0.7", b'{"IP": "10.1.0.8", "ID": 300}'),
        ("10.1.0.7", b'{"IP": "10.1.0.7", "ID": 1}'),
        ("10.1.0.7", b'{"IP": "10.1.0.7", "ID": 2}'),
        ("10.1.0.7", b'{"IP": "10.1.0.7", "ID": 16777217}'),
        ("10.1.0.7", b'{"IP": "10.1.0.7", "ID": 300, "HostIP": "x"}'),
        ("10.1.0.7", b'{"IP": "10.1.0.7", "ID": 300, "Key": 256}'),
        ("0.0.0.0/0", b'{"IP": "0.0.0.0/0", "ID": 300}'),
    ],
)
async def test_records_that_no_node_may_write_have_no_effect(name: str, value: bytes) -> None:
    member = Member(Contents(), 1)
    await member.store.put(PREFIX + name, value)
    await member.store.put(f"{NODES}default/other", b'{"Name": "x", "Cluster": "default"}')
    async with cluster(member):
        await member.addresses.shared.synced.wait()
        await member.registry.shared.synced.wait()
        assert len(member.ipcache) == 0
        assert not member.registry.others


def test_claims_are_shared_and_forgotten() -> None:
    decode = records.Decoder("cilium-global:default:n1")
    first = decode("10.0.0.1", records.encode(IPv4Address("10.0.0.1"), None, 300, "cilium-global:default:n2:1"))
    second = decode("10.0.0.2", records.encode(IPv4Address("10.0.0.2"), None, 300, "cilium-global:default:n2:2"))
    own = decode("10.0.0.3", records.encode(IPv4Address("10.0.0.3"), None, 300, "cilium-global:default:n1:2"))
    assert first is second
    assert own.own and not first.own
    decode.forget_all_but({own})
    assert len(decode) == 1
