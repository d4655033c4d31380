"""The verdict of the map state that the kernel would have, for flows that oracles judge."""

from __future__ import annotations

from typing import Any

from ciliate.policy.mapstate import lookup
from ciliate.policy.model import PROTOCOLS
from ciliate.policy.simulate import Simulation
from ciliate.scenario.model import parse_flow


def by_map(simulation: Simulation, flow: dict[str, Any], egress: bool) -> bool:
    """Whether it allows the flow."""
    parsed = parse_flow(flow)
    family = simulation.family(parsed)
    src, dst = simulation._end(parsed.src, family), simulation._end(parsed.dst, family)
    own, peer = (src, dst) if egress else (dst, src)
    policy = simulation.repository.resolve(own.endpoint)
    if not (policy.enforce_egress if egress else policy.enforce_ingress):
        return True
    proto, port = PROTOCOLS[flow["protocol"]], flow["port"]
    return lookup(policy.map_state, int(egress), peer.identity, proto, port, peer.place) is not None
