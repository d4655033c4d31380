"""Policies with every corner of both APIs: the simulator answers as their documentation does, read by itself."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from tests.unit.policy.mapverdict import by_map
from tests.unit.policy.stranger import End, World, addresses_of
from tests.unit.policy.strangers import NODES, WORLD, Stranger

from ciliate.policy.simulate import Simulation

SEEDS = range(300)
FLOWS = 60


def ends(world: World, manifests: list[dict[str, Any]]) -> Iterator[tuple[str, End]]:
    """Everybody, with the name that flows have for it: each address of a pod is an end of its own."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            addresses = addresses_of(manifest)
            for address in addresses if not manifest["spec"].get("hostNetwork") else ():
                yield f"ip/{address}", world.pod(manifest, address)
            if not addresses:
                name = f"{manifest['metadata']['namespace']}/{manifest['metadata']['name']}"
                yield name, world.pod(manifest, None)
    for text in NODES:
        yield f"ip/{text}", End("host", ip_address(text), labels={("reserved", "host"): ""})
    for text in WORLD:
        yield f"ip/{text}", End("world", ip_address(text), labels={("reserved", "world"): ""})
    yield "entity/host", End("host", labels={("reserved", "host"): ""})
    yield "entity/init", End("init", labels={("reserved", "init"): ""})


def joined(one: End, two: End) -> bool:
    """Whether two ends can meet: addresses of one family, and not of one pod."""
    if one.address is None or two.address is None:
        return True
    return one.address.version == two.address.version


@pytest.mark.parametrize("seed", SEEDS)
def test_the_simulator_reads_policies_as_the_documentation_does(seed: int) -> None:
    stranger = Stranger(seed)
    manifests = stranger.cluster()
    world, simulation = World(manifests), Simulation(manifests)
    everybody = list(ends(world, manifests))
    for _ in range(FLOWS):
        (own_name, own), (peer_name, peer) = stranger.choice(everybody), stranger.choice(everybody)
        if own is peer or own.kind not in ("pod", "init") or not joined(own, peer):
            continue
        egress = stranger.random() < 0.5
        proto, port = stranger.packet((peer if egress else own).ports)
        names = (own_name, peer_name) if egress else (peer_name, own_name)
        flow = dict(zip(("from", "to"), names, strict=True), port=port, protocol=proto)
        flow["direction"] = "egress" if egress else "ingress"
        expected = world.allows(own, peer, egress, proto, port)
        found = simulation.verdict(flow)
        assert (found.verdict == "allow") == expected, (flow, found.why)
        assert by_map(simulation, flow, egress) == expected, flow
