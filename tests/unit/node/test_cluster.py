"""Nodes and addresses over one store: what is told, what is heard, what a loss of the store or of a node means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ciliate.backoff import ClusterSize
from ciliate.datapath.layout import Address, ipcache_entry, ipcache_entry_of, ipcache_host_key, ipcache_key
from ciliate.ipcache import Ipcache, Source
from ciliate.kvstore.local import Contents, LocalStore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.node import Node, NodeRegistry, records
from ciliate.node.addresses import PREFIX, ClusterAddresses
from ciliate.node.model import encode
from ciliate.node.registry import PREFIX as NODES

POD, POD6 = IPv4Address("10.1.0.7"), IPv6Address("fd00:1::7")


class Member:
    """One node of a cluster, with a table of what it knows."""

    def __init__(self, contents: Contents, number: int, cache: Path | None = None) -> None:
        self.own = Node(
            name=f"n{number}",
            ipv4=IPv4Address(f"192.0.2.{number}"),
            pods4=IPv4Network(f"10.{number}.0.0/24"),
            pods6=IPv6Network(f"fd00:{number}::/112"),
        )
        self.store = LocalStore("local", contents)
        self.keys = LocalKeys(self.store, ttl=30.0)
        self.size = ClusterSize()
        self.ipcache = Ipcache()
        self.touched: list[set[int]] = []
        self.heard: list[tuple[list[Node], list[Node]]] = []
        self.registry = NodeRegistry(self.store, self.keys, self.own, self.size, cache)
        told = self.touched.append
        self.addresses = ClusterAddresses(self.store, self.keys, self.own, self.ipcache, self.size, told, self.registry)
        self.gone: set[Address] = set()
        self.addresses.on_gone = self.gone.update
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
        assert two.gone == set(), "other labels, the same pod"
        one.addresses.withdraw([POD, POD6])
        await until(lambda: len(two.ipcache) == 0)
        assert two.addresses.ports(300) == {}
        await until(lambda: two.gone == {POD, POD6})
        assert one.gone == set(), "its own pods' flows are the endpoint's to end"


async def test_a_local_claim_wins_and_a_pod_that_moves_here_is_ours() -> None:
    contents = Contents()
    one, two = Member(contents, 1), Member(contents, 2)
    # an address of no node's range: one of another plugin's
    pod = IPv4Address("10.50.0.7")
    prefix = ip_network(str(pod))
    async with cluster(one, two):
        two.ipcache.upsert(prefix, 400, Source.LOCAL)
        one.addresses.publish([pod], 300, 7, {})
        await until(lambda: two.addresses.shared.items)
        assert two.ipcache.get(prefix) == 400
        two.addresses.publish([pod], 400, 1, {})
        await until(lambda: two.addresses.shared.items[str(pod)].own)
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


OTHER = Node(name="n9", ipv4=IPv4Address("192.0.2.9"), pods4=IPv4Network("10.9.0.0/24"))
THIRD = Node(name="n8", ipv4=IPv4Address("192.0.2.8"), pods4=IPv4Network("10.8.0.0/24"))


@pytest.mark.parametrize(
    ("address", "host", "claimant"),
    [
        pytest.param("10.8.0.7", "192.0.2.9", "n9", id="of another node's range"),
        pytest.param("10.1.0.7", "192.0.2.9", "n9", id="of this node's range"),
        pytest.param("192.0.2.8", "192.0.2.9", "n9", id="of another node"),
        pytest.param("192.0.2.1", "192.0.2.9", "n9", id="of this node"),
        pytest.param("10.9.0.7", "192.0.2.8", "n9", id="behind another node"),
        pytest.param("10.9.0.7", "192.0.2.1", "n9", id="behind this node"),
        pytest.param("10.9.0.7", "192.0.2.77", "n77", id="of a node that is not known"),
        pytest.param("127.0.0.1", "192.0.2.9", "n9", id="of every node's own"),
        pytest.param("224.0.0.1", "192.0.2.9", "n9", id="of many"),
    ],
)
async def test_a_node_speaks_of_addresses_of_its_own_range(address: str, host: str, claimant: str) -> None:
    member = Member(Contents(), 1)
    for node in (OTHER, THIRD):
        await member.store.put(NODES + node.id, encode(node))
    owner = records.owner("default", claimant)
    named = {"http": [("TCP", 80)]}
    for claimed, of in (("10.9.0.8", owner if claimant == "n9" else records.owner("default", "n9")), (address, owner)):
        home = IPv4Address("192.0.2.9" if claimed == "10.9.0.8" else host)
        value = records.encode(IPv4Address(claimed), home, 300 if claimed == "10.9.0.8" else 301, f"{of}:1", named)
        await member.store.put(PREFIX + claimed, value)
    async with cluster(member):
        await until(lambda: len(member.registry.others) == 2)
        await until(lambda: member.ipcache.get(ip_network("10.9.0.8")) == 300)
        await until(lambda: address in member.addresses.shared.items)
        assert member.ipcache.table() == {ip_network("10.9.0.8"): 300}
        assert member.addresses.ports(300) and not member.addresses.ports(301)


async def test_an_address_outside_of_all_ranges_is_reached_without_its_claimant() -> None:
    """Pods of chained plugins have addresses that no node's range has: they are known, and nothing is led to a node."""
    member = Member(Contents(), 1)
    await member.store.put(NODES + OTHER.id, encode(OTHER))
    address = IPv4Address("198.18.255.254")
    value = records.encode(address, OTHER.ipv4, 300, f"{records.owner('default', 'n9')}:1")
    await member.store.put(f"{PREFIX}{address}", value)
    async with cluster(member):
        await until(lambda: member.ipcache.get(ip_network(str(address))) == 300)
        entry = ipcache_entry_of(member.ipcache.entry(ipcache_host_key(str(address))) or b"")
        assert entry == (300, None, 0)
        # until a node comes whose pod it is
        await member.store.put(f"{NODES}default/n8", encode(msgspec.structs.replace(THIRD, pods4=WIDE)))
        await until(lambda: len(member.ipcache) == 0)


WIDE = IPv4Network("198.18.0.0/16")


async def test_claims_wait_for_their_node_and_follow_it() -> None:
    member = Member(Contents(), 1)
    owner = records.owner("default", "n9")
    for text, host in (("10.9.0.7", "192.0.2.9"), ("10.7.0.7", "192.0.2.7")):
        address = IPv4Address(text)
        await member.store.put(PREFIX + text, records.encode(address, IPv4Address(host), 300, f"{owner}:1"))
    async with cluster(member):
        await member.addresses.shared.synced.wait()
        await member.store.put(NODES + OTHER.id, encode(OTHER))
        await until(lambda: member.ipcache.get(ip_network("10.9.0.7")) == 300)
        # the node moves to another address and another range
        moved = msgspec.structs.replace(OTHER, ipv4=IPv4Address("192.0.2.7"), pods4=IPv4Network("10.7.0.0/24"))
        await member.store.put(NODES + OTHER.id, encode(moved))
        await until(lambda: member.ipcache.get(ip_network("10.7.0.7")) == 300)
        await until(lambda: len(member.ipcache) == 1)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"ipv4": IPv4Address("192.0.2.1")}, id="this node's address"),
        pytest.param({"ipv4": IPv4Address("127.0.0.1")}, id="loopback"),
        pytest.param({"ipv4": IPv4Address("224.0.0.1")}, id="multicast"),
        pytest.param({"ipv4": IPv4Address("10.1.0.9")}, id="a pod of this node"),
        pytest.param({"pods4": IPv4Network("0.0.0.0/0")}, id="everything"),
        pytest.param({"pods4": IPv4Network("10.1.0.0/24")}, id="this node's range"),
        pytest.param({"pods4": IPv4Network("10.0.0.0/8")}, id="around this node's range"),
        pytest.param({"pods4": IPv4Network("10.1.0.128/25")}, id="within this node's range"),
        pytest.param({"pods4": IPv4Network("192.0.2.0/24")}, id="around this node's address"),
        pytest.param({"pods4": IPv4Network("127.0.0.0/8")}, id="loopback range"),
        pytest.param({"pods6": IPv6Network("fe80::/64")}, id="link-local range"),
    ],
)
async def test_a_node_that_would_take_what_is_ours_has_no_effect(change: dict[str, Any]) -> None:
    member = Member(Contents(), 1)
    bad = msgspec.structs.replace(OTHER, **change)
    await member.store.put(NODES + bad.id, encode(bad))
    await member.store.put(NODES + THIRD.id, encode(THIRD))
    async with cluster(member):
        await until(lambda: THIRD.id in member.registry.others)
        await member.registry.shared.synced.wait()
        assert list(member.registry.others) == [THIRD.id]


async def test_a_node_has_its_inner_addresses_within_its_ranges() -> None:
    member = Member(Contents(), 1)
    said = msgspec.structs.replace(OTHER, router4=IPv4Address("10.8.0.1"), health4=IPv4Address("10.9.0.2"))
    await member.store.put(NODES + said.id, encode(said))
    async with cluster(member):
        await until(lambda: member.registry.others)
        assert member.registry.others[said.id] == msgspec.structs.replace(said, router4=None)


@pytest.mark.parametrize("taken", ["10.9.0.0/24", "10.9.0.0/25", "10.8.0.0/15"])
async def test_the_range_of_a_living_node_is_not_taken_from_it(taken: str) -> None:
    member = Member(Contents(), 1)
    thief = msgspec.structs.replace(THIRD, pods4=IPv4Network(taken))
    async with cluster(member):
        await member.store.put(NODES + OTHER.id, encode(OTHER))
        await until(lambda: OTHER.id in member.registry.others)
        await member.store.put(NODES + thief.id, encode(thief))
        await until(lambda: thief.id in member.registry.others)
        assert member.registry.others[thief.id].pods4 is None and member.registry.others[OTHER.id] == OTHER
        assert taken in member.registry.disputes[thief.id] and OTHER.id in member.registry.disputes[thief.id]
        # when the other one goes, it is free
        await member.registry.remove(OTHER)
        await until(lambda: OTHER.id not in member.registry.others)
        assert member.registry.others[thief.id] == thief and not member.registry.disputes


def test_claims_are_shared_and_forgotten() -> None:
    decode = records.Decoder("cilium-global:default:n1")
    first = decode("10.0.0.1", records.encode(IPv4Address("10.0.0.1"), None, 300, "cilium-global:default:n2:1"))
    second = decode("10.0.0.2", records.encode(IPv4Address("10.0.0.2"), None, 300, "cilium-global:default:n2:2"))
    own = decode("10.0.0.3", records.encode(IPv4Address("10.0.0.3"), None, 300, "cilium-global:default:n1:2"))
    assert first is second
    assert own.own and not first.own
    decode.forget_all_but({own})
    assert len(decode) == 1
