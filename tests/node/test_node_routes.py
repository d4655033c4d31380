"""Routes to other nodes, in a namespace of our own: deltas, what an earlier run left, what others have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar

import pytest

from ciliate.datapath.netlink import in_netns
from ciliate.datapath.noderoutes import NodeRoutes, own_address
from ciliate.lab import netns
from ciliate.lab.command import ip_batch, run
from ciliate.node import Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NAME = f"cl-routes-{os.getpid()}"
T = TypeVar("T")


def node(number: int, range_: int | None = None, via: int | None = None) -> Node:
    """Node ``number``; ``range_`` and ``via`` give it another's pods or address."""
    return Node(
        name=f"n{number}",
        ipv4=IPv4Address(f"192.0.2.{via or number}"),
        ipv6=IPv6Address(f"2001:db8::{via or number}"),
        pods4=IPv4Network(f"10.{range_ or number}.0.0/24"),
        pods6=IPv6Network(f"fd00:{range_ or number}::/112"),
    )


@pytest.fixture
def inside() -> Iterator[Callable[[Callable[[], T]], T]]:
    """Runs a function in a namespace whose one device has our addresses."""
    netns.create(NAME)
    try:
        ip_batch(
            NAME,
            [
                "link add u0 type veth peer name u1",
                "address add 192.0.2.250/24 dev u0",
                "address add 2001:db8::250/64 dev u0 nodad",
                "link set u1 up",
                "link set u0 up",
                "route add 10.99.0.0/24 via 192.0.2.9",
            ],
        )
        descriptor = os.open(netns.path(NAME), os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield lambda function: in_netns(descriptor, function)
        finally:
            os.close(descriptor)
    finally:
        netns.remove(NAME)


def routes() -> set[tuple[str, str]]:
    found = [json.loads(run("ip", "-n", NAME, "-j", family, "route")) for family in ("-4", "-6")]
    return {(item["dst"], item["gateway"]) for family in found for item in family if "gateway" in item}


def expected(*nodes: Node) -> set[tuple[str, str]]:
    ours = {(str(item.pods4), str(item.ipv4)) for item in nodes} | {(str(item.pods6), str(item.ipv6)) for item in nodes}
    return ours | {("10.99.0.0/24", "192.0.2.9")}


def test_routes_follow_the_nodes(inside: Callable[[Callable[[], T]], T]) -> None:
    table = NodeRoutes()
    one, two = node(1), node(2)
    assert inside(lambda: table.update([one, two], [])) == {}
    assert routes() == expected(one, two)
    moved = node(1, range_=3, via=7)
    assert inside(lambda: table.update([moved], [two])) == {}
    assert routes() == expected(moved)
    # a new node has the range of one that goes: its route stays
    heir = node(5, range_=3)
    assert inside(lambda: table.update([heir], [])) == {}
    assert inside(lambda: table.update([], [moved])) == {}
    assert routes() == expected(heir)


def test_a_sync_mends_and_removes_what_an_earlier_run_left(inside: Callable[[Callable[[], T]], T]) -> None:
    inside(lambda: NodeRoutes().update([node(1), node(2)], []))
    run("ip", "-n", NAME, "route", "del", "10.2.0.0/24")
    table = NodeRoutes()
    assert inside(lambda: table.sync([node(2), node(3)])) == {}
    assert routes() == expected(node(2), node(3))
    assert inside(lambda: table.sync([])) == {}
    assert routes() == expected()


def test_a_node_on_another_link_is_named_and_does_not_hinder_others(inside: Callable[[Callable[[], T]], T]) -> None:
    far = Node(name="far", ipv4=IPv4Address("203.0.113.1"), pods4=IPv4Network("10.8.0.0/24"))
    table = NodeRoutes()
    failed = inside(lambda: table.update([far, node(1)], []))
    assert list(failed) == [far.id]
    assert "10.8.0.0/24 via 203.0.113.1" in str(failed[far.id])
    assert routes() == expected(node(1))
    assert inside(lambda: table.update([], [far])) == {}


def test_own_address_needs_a_way_out(inside: Callable[[Callable[[], T]], T]) -> None:
    assert inside(lambda: own_address(4)) is None
    assert inside(lambda: own_address(6)) is None
    run("ip", "-n", NAME, "route", "add", "default", "via", "192.0.2.9")
    run("ip", "-n", NAME, "-6", "route", "add", "default", "via", "2001:db8::9")
    assert inside(lambda: own_address(4)) == IPv4Address("192.0.2.250")
    assert inside(lambda: own_address(6)) == IPv6Address("2001:db8::250")
