"""Who is named as having used up its share of conntrack. Tier unit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ciliate.agent.flowshares import FlowShares
from ciliate.datapath.flows import FlowUsage


class Flows:
    """The tables as the datapath tells of them."""

    def __init__(self) -> None:
        self.parts = {"TCP": 0.8, "non-TCP": 0.0}
        self.found: list[FlowUsage] = []

    async def full(self) -> dict[str, float]:
        return self.parts

    async def usage(self, endpoints: Any) -> list[FlowUsage]:
        assert sorted(endpoints) == [4, 5]
        return self.found

    def wants_collection(self) -> bool:
        return max(self.parts.values()) > 0.5


async def test_who_replaces_its_own_flows_is_named_and_dead_ones_are_collected() -> None:
    flows, asked = Flows(), list[str]()
    endpoints = [SimpleNamespace(id=4, pod="default/quiet"), SimpleNamespace(id=5, pod="default/loud")]
    agent: Any = SimpleNamespace(
        datapath=SimpleNamespace(flows=flows),
        endpoints=SimpleNamespace(endpoints=lambda: endpoints),
        controllers=SimpleNamespace(trigger=asked.append),
    )
    shares = FlowShares(agent)
    flows.found = [FlowUsage(4, "TCP", 900, 0.9, 0), FlowUsage(5, "TCP", 5000, 5.0, 70)]
    await shares.look()
    assert shares.status() == ("ok", "TCP 80% full, non-TCP 0% full"), "what an earlier agent saw is no news"
    assert [item.endpoint for item in shares.usage] == [5, 4]
    assert asked == ["conntrack-gc"]
    flows.found = [FlowUsage(4, "TCP", 9000, 9.0, 0), FlowUsage(5, "TCP", 5000, 5.0, 71)]
    await shares.look()
    state, text = shares.status()
    assert (state, "default/loud (endpoint 5) used up its share of TCP" in text) == ("warning", True)
    assert "default/quiet" not in text
    assert [item.endpoint for item in shares.usage] == [5, 4], "offenders first"
    flows.parts, flows.found = {"TCP": 0.01, "non-TCP": 0.0}, []
    await shares.look()
    assert shares.usage == []
    assert shares.status()[0] == "ok"
