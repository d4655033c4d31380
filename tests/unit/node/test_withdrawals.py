"""Addresses rest until the store and the other nodes know that their pods are gone; over one store, with real parts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv4Network, ip_network
from pathlib import Path
from typing import Any

import pytest

from ciliate.ipam import IpamConflict, IpamExhausted, reserve
from ciliate.ipam.resting import RestingIpam
from ciliate.kvstore import KvstoreError
from ciliate.kvstore.local import Contents, LocalStore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.node.addresses import PREFIX, ClusterAddresses
from ciliate.node.registry import NodeRegistry
from ciliate.node.withdrawals import Withdrawals
from ciliate_ipam.allocator import HostScope

from .test_cluster import Member, cluster, until

RANGE = IPv4Network("10.1.0.0/29")
"""Room for a router, the health endpoint and four pods."""
GRACE = 0.3


class Leaving(LocalStore):
    """A store that can go away for this node."""

    away = False

    def _open(self) -> Contents:
        if self.away:
            raise KvstoreError("the store is away")
        return super()._open()


class Owner(Member):
    """A node that gives addresses to pods."""

    def __init__(self, contents: Contents, state: Path, *, grace: float = GRACE, shared: bool = True) -> None:
        super().__init__(contents, 1)
        self.store = Leaving("local", contents)
        self.keys = LocalKeys(self.store, ttl=30.0, state=state / "lease.json")
        self.registry = NodeRegistry(self.store, self.keys, self.own, self.size, None)

        async def is_shared() -> bool:
            return shared

        self.rests = Withdrawals(self.keys, PREFIX, grace, lambda: bool(self.registry.others), is_shared)
        self.addresses = ClusterAddresses(
            self.store, self.keys, self.own, self.ipcache, self.size, self.touched.append, self.registry, self.rests
        )
        self.ipam = RestingIpam(HostScope([RANGE], state / "ipam.json"))
        self.ipam.rest, self.rests.on_rested = self.rests, self.ipam.rested
        self.parts = [self.ipam, self.keys, self.registry, self.addresses, _Started(self.rests)]

    async def add(self, owner: str) -> IPv4Address:
        """What an ADD does with addresses."""
        reservation = await reserve(self.ipam, owner)  # type: ignore[arg-type]
        await reservation.durable
        address = reservation.allocation.ipv4
        assert address is not None
        self.addresses.publish([address], 300, 7, {})
        return address

    async def remove(self, owner: str) -> None:
        """What a DEL does with them."""
        self.addresses.withdraw([address for address, name in self.ipam.owners().items() if name == owner])
        await self.ipam.release(owner)


class _Started:
    """A part with a start of another kind."""

    def __init__(self, part: Withdrawals) -> None:
        self._part = part

    async def start(self) -> None:
        self._part.start()

    async def stop(self) -> None:
        await self._part.stop()


@contextlib.asynccontextmanager
async def two_nodes(state: Path, **options: Any) -> AsyncIterator[tuple[Owner, Member]]:
    """An owner and a node that follows it, which know each other."""
    contents = Contents()
    one, two = Owner(contents, state, **options), Member(contents, 2)
    async with cluster(one, two):
        await until(lambda: one.registry.others and two.registry.others)
        await one.addresses.settle()
        yield one, two


async def test_an_address_rests_until_the_store_has_heard_and_for_a_grace(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (one, two):
        addresses = [await one.add(f"pod{number}") for number in range(4)]
        prefix = ip_network(str(addresses[0]))
        await until(lambda: two.ipcache.get(prefix) == 300)
        one.store.away = True
        await one.remove("pod0")
        with pytest.raises(IpamExhausted, match="addresses of 1 former pod rest: the store has not heard"):
            await one.add("heir")
        with pytest.raises(IpamConflict, match="rests: the store has not heard"):
            await one.ipam.claim("heir", [addresses[0]])
        assert two.ipcache.get(prefix) == 300
        one.store.away = False
        await until(lambda: two.ipcache.get(prefix) is None)
        heard = time.monotonic()
        assert addresses[0] in one.ipam.resting and "up to 1 s more" in one.ipam.reason()
        await until(lambda: not one.ipam.resting)
        assert time.monotonic() - heard > GRACE / 2
        assert await one.add("heir") == addresses[0]


async def test_what_went_with_a_lost_lease_is_withdrawn_aloud(tmp_path: Path) -> None:
    """Others hold what goes with a lease, in case the node only lost the store; not a pod that is gone meanwhile."""
    async with two_nodes(tmp_path) as (one, two):
        address = await one.add("pod")
        await until(lambda: two.ipcache.get(ip_network(str(address))) == 300)
        one.store.away = True
        contents = one.store._contents
        contents.end_lease(one.keys.lease_id)
        await until(lambda: two.addresses.shared.holds(str(address)))
        await one.remove("pod")
        one.store.away = False
        await until(lambda: two.ipcache.get(ip_network(str(address))) is None)
        await until(lambda: not one.ipam.resting)


async def test_what_rests_outlasts_the_agent(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (one, _):
        address = await one.add("pod")
        await one.keys.flush()
        one.store.away = True
        await one.remove("pod")
        contents = one.store._contents
    again = Owner(contents, tmp_path)
    again.store.away = True
    async with cluster(again):
        assert again.ipam.owners()[address] == "pod"
        await again.ipam.release("pod")  # as every start does with what no endpoint has
        assert address in again.ipam.resting and address in again.ipam.owners()
        again.store.away = False
        await again.addresses.settle()
        await until(lambda: not again.ipam.resting)
        assert address not in again.ipam.owners()
        assert (await again.store.get_prefix(PREFIX)).items == []


async def test_the_same_attachment_may_have_its_address_again(tmp_path: Path) -> None:
    async with two_nodes(tmp_path, grace=60.0) as (one, two):
        address = await one.add("pod")
        await until(lambda: two.ipcache.get(ip_network(str(address))) == 300)
        await one.remove("pod")
        assert address in one.ipam.resting
        assert await one.add("pod") == address
        assert not one.ipam.resting
        await one.keys.flush()
        assert two.ipcache.get(ip_network(str(address))) == 300


async def test_what_nobody_was_told_of_does_not_rest(tmp_path: Path) -> None:
    async with two_nodes(tmp_path, grace=60.0) as (one, _):
        await reserve(one.ipam, "person")  # type: ignore[arg-type]
        assert await one.ipam.release("person")
        assert not one.ipam.resting


async def test_a_node_alone_rests_for_no_grace_and_one_with_a_store_of_its_own_not_at_all(tmp_path: Path) -> None:
    for shared in (True, False):
        state = tmp_path / str(shared)
        state.mkdir()
        owner = Owner(Contents(), state, grace=60.0, shared=shared)
        async with cluster(owner):
            await owner.addresses.settle()
            await owner.add("pod")
            await owner.keys.flush()
            await owner.remove("pod")
            assert bool(owner.ipam.resting) == shared
            await until(lambda owner=owner: not owner.ipam.resting)  # type: ignore[misc]
            assert "pod" not in owner.ipam.owners().values()
            await asyncio.sleep(0)
