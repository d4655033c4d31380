"""The desired table of other nodes and the kernel: deltas, failures, what an earlier run left."""

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address

import pytest

from ciliate.node import Node, Peers

A, B = (Node(name=name, ipv4=IPv4Address(text)) for name, text in (("a", "192.0.2.1"), ("b", "192.0.2.2")))
MOVED = Node(name="a", ipv4=IPv4Address("192.0.2.9"))


class Kernel:
    """Nodes as a kernel would have them; ``broken`` names those that it refuses."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {"default/old": Node(name="old")}
        self.broken: set[str] = set()
        self.calls = 0

    async def update_nodes(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> Mapping[str, OSError]:
        self.calls += 1
        failed = {node.id: OSError(f"{node.name} refused") for node in (*upserts, *deletes) if node.id in self.broken}
        self.nodes.update((node.id, node) for node in upserts if node.id not in failed)
        for node in deletes:
            if node.id not in failed:
                del self.nodes[node.id]
        return failed

    async def sync_nodes(self, nodes: Sequence[Node], prune: bool = True) -> Mapping[str, OSError]:
        if prune:
            self.nodes = {}
        return await self.update_nodes(nodes, ())


async def test_changes_reach_the_kernel_and_only_changes() -> None:
    kernel = Kernel()
    peers = Peers(kernel)
    peers.change([A, B])
    await peers.reconcile()
    assert kernel.nodes == {"default/old": Node(name="old"), A.id: A, B.id: B}
    peers.change([MOVED], [B])
    await peers.reconcile()
    assert kernel.nodes == {"default/old": Node(name="old"), A.id: MOVED}
    peers.change([MOVED])
    await peers.reconcile()
    assert kernel.calls == 2


async def test_a_sync_removes_what_an_earlier_run_left() -> None:
    kernel = Kernel()
    peers = Peers(kernel)
    peers.change([A])
    await peers.sync(prune=False)
    assert kernel.nodes == {"default/old": Node(name="old"), A.id: A}
    await peers.sync()
    assert kernel.nodes == {A.id: A}


async def test_what_failed_is_tried_again_and_named_meanwhile() -> None:
    kernel = Kernel()
    peers = Peers(kernel)
    kernel.broken = {A.id}
    peers.change([A, B])
    with pytest.raises(OSError, match="1 nodes cannot be reached: default/a: a refused"):
        await peers.reconcile()
    assert B.id in kernel.nodes
    kernel.broken = set()
    await peers.reconcile()
    assert kernel.nodes[A.id] == A
    assert not peers.errors


async def test_a_deletion_that_failed_is_tried_again() -> None:
    kernel = Kernel()
    peers = Peers(kernel)
    peers.change([A])
    await peers.reconcile()
    kernel.broken = {A.id}
    peers.change([], [A])
    with pytest.raises(OSError, match="a refused"):
        await peers.reconcile()
    kernel.broken = set()
    await peers.reconcile()
    assert A.id not in kernel.nodes
