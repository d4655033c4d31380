"""Scenarios answered by the policy engine."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ciliate.document import Document
from ciliate.policy.simulate import Simulation
from ciliate.scenario.model import Names, Scenario, Stage
from ciliate.scenario.report import FlowResult, ScenarioResult


def simulate(
    scenarios: Iterable[Scenario], cluster: str = "default", proxies: Collection[str] | None = None
) -> list[ScenarioResult]:
    """Ask every flow of every scenario; PolicyError where objects or flows cannot be used.

    ``proxies``: the layer-7 parsers that are served, None: every one.
    """
    return [_one(scenario, cluster, proxies) for scenario in scenarios]


def _one(scenario: Scenario, cluster: str, proxies: Collection[str] | None) -> ScenarioResult:
    results = []
    made: list[tuple[Stage, Simulation]] = []
    for stage in scenario.stages():
        engine = next((engine for before, engine in made if _alike(before, stage)), None)
        if engine is None:
            engine = simulation(stage, stage.objects, cluster, stage.expectation.dns, proxies)
            made.append((stage, engine))
        for flow in stage.flows:
            answer = engine.verdict(flow)
            results.append(FlowResult(flow, answer.verdict, answer.why, stage.step, answer.assumed))
    return ScenarioResult(scenario.name, results)


def _alike(one: Stage, other: Stage) -> bool:
    """Whether one engine answers for both."""
    return one.objects is other.objects and _settings(one) == _settings(other)


def _settings(stage: Stage) -> tuple[Any, ...]:
    expectation = stage.expectation
    return expectation.enforcement, expectation.allow_localhost, expectation.dns


def simulation(
    stage: Stage,
    objects: Iterable[Document],
    cluster: str = "default",
    names: Names | None = None,
    proxies: Collection[str] | None = None,
) -> Simulation:
    """The engine as a stage of a scenario wants it, with these objects and names."""
    expectation = stage.expectation
    return Simulation(objects, expectation.enforcement, cluster, expectation.allow_localhost, names, proxies)
