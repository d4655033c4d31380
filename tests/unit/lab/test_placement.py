"""Which node a pod of a lab lives on, which addresses nodes have, where a flow's ends are. Tier unit."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from ciliate.lab import underlay, world
from ciliate.lab.errors import LabError
from ciliate.lab.placement import Placement
from ciliate.lab.plan import POD_RANGES, Place, Places
from ciliate.lab.state import LabDirectory, LabPod
from ciliate.scenario.model import parse_peer

NODES = ["node1", "node2", "node3"]


def test_pods_go_round_and_those_that_name_a_node_stay_together() -> None:
    placement = Placement(NODES, begun=2)
    assert [placement.next() for _ in range(4)] == ["node3", "node1", "node2", "node3"]
    named = [placement.named(name) for name in ("node2", "worker-a", "worker-b", "worker-a", "", None)]
    assert named == ["node2", "node1", "node2", "node1", "", ""]


def test_no_two_nodes_share_an_address_or_a_range() -> None:
    nodes = underlay.names(underlay.MAX_NODES)
    taken = [
        *world.WORLD_LINK,
        *underlay.STORE_ADDRESSES,
        *(text for node in nodes for text in underlay.addresses(node)),
    ]
    assert len({ip_address(text) for text in taken}) == len(taken)
    assert underlay.addresses("node1") == world.NODE_ADDRESSES
    ranges = [ip_network(text) for node in nodes for text in underlay.pod_ranges(node)]
    assert len(set(ranges)) == len(ranges)
    for item in ranges:
        assert any(item.version == whole.version and item.subnet_of(whole) for whole in POD_RANGES)


@pytest.mark.parametrize("count", [0, underlay.MAX_NODES + 1])
def test_impossible_numbers_of_nodes(count: int) -> None:
    with pytest.raises(LabError, match="--nodes"):
        underlay.names(count)


PODS = {
    "default/a": LabPod("default/a", "1", "ns", ["10.200.2.3"], node="node2"),
    "default/daemon": LabPod("default/daemon", "", "ns", ["172.31.255.1"], host_network=True, node=""),
    "default/fixed": LabPod(
        "default/fixed", "", "ns", ["172.31.255.4", "fd00:c11:ffff::4"], host_network=True, node="node3"
    ),
}


@pytest.mark.parametrize(
    ("peer", "beside", "helper"),
    [
        ("entity/host", "default/a", "node2"),
        ("entity/host", "ip/192.0.2.9", "node2"),
        ("entity/host", "entity/world", "node1"),
        ("entity/host", "default/fixed", "node3"),
        ("default/daemon", "default/a", "node2"),
        ("default/daemon", "entity/world", "node1"),
        ("default/fixed", "default/a", "node3"),
        ("default/a", "default/fixed", "default/a"),
    ],
)
def test_the_host_is_the_node_of_the_other_end(peer: str, beside: str, helper: str) -> None:
    places = Places(PODS, {"192.0.2.9": "default/a"}, {})
    found = places.find(parse_peer(peer), parse_peer(beside))
    assert found.helper == helper
    if helper in NODES:
        assert found == Place(helper, underlay.addresses(helper), True)


def test_the_first_nodes_directory_is_that_of_the_lab() -> None:
    directory = LabDirectory("x")
    assert directory.node("node1").state_dir == directory.state_dir == directory.path / "state"
    assert directory.node("node2").state_dir == directory.path / "node2" / "state"
