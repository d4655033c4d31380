"""Scenarios answered by the policy engine."""

from __future__ import annotations

from collections.abc import Iterable

from ciliate.policy.simulate import Simulation
from ciliate.scenario.model import Scenario
from ciliate.scenario.report import FlowResult, ScenarioResult


def simulate(scenarios: Iterable[Scenario], cluster: str = "default") -> list[ScenarioResult]:
    """Ask every flow of every scenario; PolicyError where objects or flows cannot be used."""
    return [_one(scenario, cluster) for scenario in scenarios]


def _one(scenario: Scenario, cluster: str) -> ScenarioResult:
    results = []
    simulations: dict[str, Simulation] = {}
    for expectation in scenario.expectations:
        mode = expectation.enforcement
        if mode not in simulations:
            simulations[mode] = Simulation(scenario.objects, mode, cluster)
        for flow in expectation.flows:
            answer = simulations[mode].verdict(flow)
            results.append(FlowResult(flow, answer.verdict, answer.why))
    return ScenarioResult(scenario.name, results)
