"""Runs scenario files in a lab: pods and policies in, packets out, and the table that `policy simulate` prints too."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from ciliate.lab import underlay
from ciliate.lab.changes import change
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.manifests import Cluster
from ciliate.lab.placement import ONE_NODE, Shape
from ciliate.lab.plan import (
    Places,
    Probe,
    SkippedError,
    by_sender,
    outside_addresses,
    plan_flow,
    ports_to_serve,
)
from ciliate.lab.state import ROOT, WORLD
from ciliate.manifest import Document
from ciliate.policy.simulate import Result
from ciliate.scenario.model import ALLOW, DENY, Flow, Scenario, Stage, load_scenarios
from ciliate.scenario.report import FlowResult, ScenarioResult, failed, render_table, to_json
from ciliate.scenario.run import simulation

TIMEOUT = 0.5
"""Seconds without an answer after which a flow counts as denied."""
SECOND_TIMEOUT = 3.0
"""The limit at the second try of a flow that should have been allowed: a busy machine is no denial."""
PROXY = "to reach the proxy"
"""How the engine says that a flow goes to a proxy."""
Outcome = dict[str, Any]
Judged = dict[int, FlowResult | str]
"""Flows by their number: the result, or why there is none."""


class Skipped(msgspec.Struct, frozen=True):
    """A flow that was not sent, and why."""

    scenario: str
    flow: Flow
    reason: str

    def __str__(self) -> str:
        flow = self.flow
        port = "/".join(str(part) for part in (flow.port, flow.protocol) if part) or "any"
        return f"skipped: {self.scenario}: {flow.src} -> {flow.dst} {port}: {self.reason}"


class LabReport(msgspec.Struct):
    """The results of every scenario, and the flows that the lab cannot send yet."""

    results: list[ScenarioResult] = []
    skipped: list[Skipped] = []

    @property
    def failed(self) -> int:
        """How many flows differ from what was expected."""
        return failed(self.results)

    def table(self) -> str:
        """For people: as `policy simulate` prints it, then a line for each skipped flow."""
        lines = [render_table(self.results), *map(str, self.skipped)]
        if self.skipped:
            lines.append(f"{len(self.skipped)} flows were skipped and count neither way")
        return "\n".join(lines)

    def json(self) -> str:
        """For programs: the document of `policy simulate`, with ``skipped`` where there is any."""
        document = to_json(self.results)
        if self.skipped:
            document["skipped"] = [
                {"scenario": item.scenario, "from": str(item.flow.src), "to": str(item.flow.dst), "reason": item.reason}
                for item in self.skipped
            ]
        return json.dumps(document, indent=2)


def run_files(
    files: Sequence[Path | str],
    name: str,
    keep: bool = False,
    root: Path = ROOT,
    shape: Shape = ONE_NODE,
    jobs: int = 1,
) -> LabReport:
    """Run scenario files in the lab ``name``, which is built in this shape and taken down where it is not up.

    ``jobs`` labs share the scenarios: most of a scenario's time is waiting for answers that must not come. The further
    labs are called ``name-2`` and so on. Raises LabError where a lab cannot do its work, ManifestError and PolicyError
    for wrong files.
    """
    scenarios = load_scenarios(files)
    waiting = deque(enumerate(scenarios))
    reports: dict[int, LabReport] = {}

    def work(name: str) -> None:
        try:
            with (
                Lab.lock(name, root),
                _borrowed(name, scenarios[0].expectations[0].enforcement, keep, root, shape) as lab,
            ):
                while waiting:
                    with contextlib.suppress(IndexError):  # another lab took the last one
                        index, scenario = waiting.popleft()
                        reports[index] = _run_scenario(lab, scenario)
        except BaseException:
            waiting.clear()
            raise

    others = [f"{name}-{number}" for number in range(2, min(jobs, len(scenarios)) + 1)]
    with ThreadPoolExecutor(max(1, len(others)), "lab") as pool:
        running = [pool.submit(work, other) for other in others]
        work(name)
        for done in running:
            done.result()
    return LabReport(
        [result for _, report in sorted(reports.items()) for result in report.results],
        [item for _, report in sorted(reports.items()) for item in report.skipped],
    )


@contextlib.contextmanager
def _borrowed(name: str, enforcement: str, keep: bool, root: Path, shape: Shape) -> Iterator[Lab]:
    existed = Lab.exists(name, root)
    lab = Lab.open(name, root) if existed else Lab.create(name, root, enforcement, shape=shape)
    try:
        yield lab
    finally:
        problems = [] if keep or existed else lab.destroy()
    if problems:
        raise LabError("; ".join(problems))


def _run_scenario(lab: Lab, scenario: Scenario) -> LabReport:
    lab.reset()
    cluster, objects = Cluster(), None
    results: list[FlowResult] = []
    skipped: list[Skipped] = []
    for stage in scenario.stages():
        lab.set_enforcement(stage.expectation.enforcement)
        lab.set_option("allow-localhost", "always" if stage.expectation.allow_localhost else "policy")
        if stage.objects is not objects:
            cluster, objects = change(lab, cluster, stage.objects), stage.objects
        places = cluster.places(lab.state.pods)
        backends = cluster.plan.outside if cluster.plan else []
        lab.add_world_addresses([*outside_addresses(stage.flows, places), *backends])
        results += StageRun(lab, scenario.name, stage, places).results(skipped)
    return LabReport([ScenarioResult(scenario.name, results)], skipped)


class StageRun:
    """The flows of one stage of a scenario, sent at once."""

    def __init__(self, lab: Lab, scenario: str, stage: Stage, places: Places) -> None:
        self._lab = lab
        self._scenario = scenario
        self._step = stage.step
        self._flows = stage.flows
        self._places = places
        self._engine = simulation(stage, stage.objects, names=stage.expectation.dns)
        self._known = simulation(stage, known_to_lab(stage.objects))

    def results(self, skipped: list[Skipped]) -> list[FlowResult]:
        """Send everything and judge it; flows that cannot be sent or judged go to ``skipped``."""
        probes, judged = self._plan()
        self._serve(probes)
        judged |= self._judged(probes, TIMEOUT)
        late = {index for index, found in judged.items() if isinstance(found, FlowResult) and _may_be_late(found)}
        judged |= self._judged([probe for probe in probes if probe.flow in late], SECOND_TIMEOUT)
        skipped += [
            Skipped(self._scenario, self._flows[index], found)
            for index, found in sorted(judged.items())
            if isinstance(found, str)
        ]
        return [found for _, found in sorted(judged.items()) if isinstance(found, FlowResult)]

    def _plan(self) -> tuple[list[Probe], Judged]:
        """What is to be sent, and why some flows are not."""
        probes: list[Probe] = []
        reasons: Judged = {}
        for index, flow in enumerate(self._flows):
            try:
                probes += plan_flow(index, flow, self._places)
            except SkippedError as reason:
                reasons[index] = str(reason)
        return probes, reasons

    def _judged(self, probes: Sequence[Probe], timeout: float) -> Judged:
        """Send probes, and judge their flows by what came back."""
        seen: dict[int, list[tuple[Probe, Outcome]]] = {}
        for probe, outcome in zip(probes, self._send(probes, timeout), strict=True):
            seen.setdefault(probe.flow, []).append((probe, outcome))
        judged: Judged = {}
        for index, found in seen.items():
            try:
                judged[index] = self._judge(self._flows[index], found)
            except SkippedError as reason:
                judged[index] = str(reason)
        return judged

    def _serve(self, probes: Sequence[Probe]) -> None:
        for place, ports in ports_to_serve(probes).items():
            self._lab.helper(place).serve(ports, self._addresses(place))

    def _addresses(self, place: str) -> Sequence[str]:
        if place in self._lab.nodes:
            return underlay.addresses(place)
        return self._lab.state.world_addresses if place == WORLD else self._lab.state.pods[place].addresses

    def _send(self, probes: Sequence[Probe], timeout: float) -> list[Outcome]:
        """Send probes from all their helpers at once; returns the outcome of each, in order."""
        outcomes: list[Outcome] = [{}] * len(probes)

        def work(sender: str, numbers: list[int]) -> None:
            requests = [probes[number].request(number, timeout) for number in numbers]
            answers = self._lab.helper(sender).probe(requests, timeout * (1 + len(numbers) // 64) + 30)
            for number, answer in zip(numbers, answers, strict=True):
                outcomes[number] = answer

        senders = by_sender(probes)
        with ThreadPoolExecutor(max(1, len(senders)), "probe") as pool:
            for done in [pool.submit(work, sender, numbers) for sender, numbers in senders.items()]:
                done.result()
        return outcomes

    def _judge(self, flow: Flow, seen: Sequence[tuple[Probe, Outcome]]) -> FlowResult:
        strangers = [outcome["who"] for probe, outcome in seen if outcome["who"] not in ("", *probe.receivers)]
        if strangers:
            return self._result(flow, "error", f"answered by {strangers[0]}")
        actual = {family: self._reached(flow, seen, family) for family in sorted({probe.family for probe, _ in seen})}
        if flow.direction and DENY in actual.values():
            self._blame(flow)
        # which family a flow without one takes is the engine's to say; every other one is held against it, too
        engine = self._engine.verdict(flow)
        family = self._engine.family(flow)
        wrong = []
        for version, verdict in actual.items():
            own = engine if version == family else self._engine.verdict(_of_family(flow, version))
            if verdict != own.verdict:
                self._excuse(flow, version, own)
                wrong.append(own)
        if not wrong:
            return self._result(flow, actual.get(family, engine.verdict), engine.why)
        differing = next(verdict for verdict in (actual.get(family), *actual.values()) if verdict is not None)
        if len(actual) > 1 and len(set(actual.values())) > 1:
            differing = "error"
        words = f"{_notes(seen)}; the policy engine says {wrong[0].verdict}: {wrong[0].why}"
        return self._result(flow, differing, words)

    def _reached(self, flow: Flow, seen: Sequence[tuple[Probe, Outcome]], family: int) -> str:
        """What happened in one address family. A service of whose backends one may not be reached may not be."""
        reached = {probe.reached(outcome) for probe, outcome in seen if probe.family == family}
        return ALLOW if reached == {True} else DENY

    def _result(self, flow: Flow, actual: str, why: str) -> FlowResult:
        return FlowResult(flow, actual, why, self._step)

    def _blame(self, flow: Flow) -> None:
        """A packet passes both sides: where the other one denies, it tells nothing of the side that is asked for."""
        other = "egress" if flow.direction == "ingress" else "ingress"
        if self._engine.verdict(msgspec.structs.replace(flow, direction=other)).verdict == DENY:
            raise SkippedError(f"{other} denies it too, so packets cannot tell what {flow.direction} does")

    def _excuse(self, flow: Flow, family: int, engine: Result) -> None:
        """A difference is none where the scenario counts on something that no lab has yet."""
        if PROXY in engine.why:
            raise SkippedError("it goes through a proxy, and a lab has none yet")
        own = _of_family(flow, family)
        known = msgspec.structs.replace(own, src=self._places.real(flow.src), dst=self._places.real(flow.dst))
        if self._known.verdict(known).verdict != engine.verdict:
            raise SkippedError("it counts on addresses of the manifest or on DNS names, and a lab has its own or none")


def _may_be_late(result: FlowResult) -> bool:
    """Whether a second try is due, with more time: what is to be allowed and did not all get through."""
    return not result.good and result.flow.verdict == ALLOW


def known_to_lab(documents: Iterable[Document]) -> list[Document]:
    """The manifests without what a lab does not honour: the addresses that pods say they have."""
    known = []
    for document in documents:
        if document.object.get("kind") == "Pod":
            pod = {key: value for key, value in document.object.items() if key != "status"}
            document = msgspec.structs.replace(document, object=pod)
        known.append(document)
    return known


def _of_family(flow: Flow, family: int) -> Flow:
    """The same flow in one address family, where its ends leave it open."""
    given = any(peer.address is not None for peer in (flow.src, flow.dst)) or flow.protocol in ("ICMP", "ICMPv6")
    return flow if given else msgspec.structs.replace(flow, family=family)


def _notes(seen: Iterable[tuple[Probe, Outcome]]) -> str:
    return ", ".join(f"IPv{probe.family}: {outcome['note']}" for probe, outcome in seen)
