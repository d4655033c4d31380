"""Node ports on two nodes: who reaches which backend. Tier node; tier modes has the other routing modes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nodeport_matrix import ENGINES, lost, nodeport_lab, switch

from ciliate.lab import netns, world
from ciliate.lab.command import run
from ciliate.lab.lab import Lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with nodeport_lab("vxlan") as made:
        yield made


@pytest.mark.parametrize("engine", ENGINES)
def test_everybody_reaches_every_backend(lab: Lab, engine: str) -> None:
    """Pods, the world and both nodes; backends of this node and of the other one, both families and protocols."""
    switch(lab, engine)
    assert not lost(lab)


def test_the_stack_takes_none_of_the_nodes_addresses_from_outside(lab: Lab) -> None:
    for node in lab.nodes:
        inside = netns.inside(lab.directory.namespace(node))
        assert run(*inside, "cat", f"/proc/sys/net/ipv4/conf/{world.NODE_DEVICE}/accept_local").strip() == "0"
