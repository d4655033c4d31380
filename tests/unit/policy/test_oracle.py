"""Property: for generated clusters, the oracle, the simulation and the map state give the same verdict."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.policy.generated import PORTS, WORLD, clusters, manifests
from tests.unit.policy.mapverdict import by_map
from tests.unit.policy.oracle import Party, allowed

from ciliate.policy.simulate import Simulation

OUTSIDE = [("entity/host", Party("host"))] + [(f"ip/{address}", Party("world", address=address)) for address in WORLD]


def _ends(parties: list[Party]) -> list[tuple[str, Party]]:
    return [(f"{party.namespace}/p{index}", party) for index, party in enumerate(parties)] + OUTSIDE


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    clusters(),
    st.lists(
        st.tuples(st.sampled_from(["TCP", "UDP", "SCTP"]), st.sampled_from(PORTS)), min_size=1, max_size=4, unique=True
    ),
)
def test_engine_reads_policies_as_the_oracle_does(cluster: Any, wanted: list[tuple[str, int]]) -> None:
    parties, policies = cluster
    simulation = Simulation([*manifests(parties), *policies])
    for own_name, own in _ends(parties)[: len(parties)]:
        for peer_name, peer in _ends(parties):
            if peer is own:
                continue
            for proto, port in wanted:
                for egress in (False, True):
                    src, dst = (own_name, peer_name) if egress else (peer_name, own_name)
                    one, two = (own, peer) if egress else (peer, own)
                    flow = {
                        "from": src,
                        "to": dst,
                        "port": port,
                        "protocol": proto,
                        "direction": "egress" if egress else "ingress",
                    }
                    expected = allowed(policies, one, two, egress, proto, port)
                    result = simulation.verdict(flow)
                    assert (result.verdict == "allow") == expected, (flow, result.why)
                    assert by_map(simulation, flow, egress) == expected, flow
