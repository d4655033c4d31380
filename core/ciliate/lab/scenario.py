"""Runs scenario files in a lab: pods and policies in, packets out, and the table that `policy simulate` prints too."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from ciliate.lab import underlay
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.manifests import Cluster, sort_documents
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
from ciliate.lab.propagation import wait_propagated
from ciliate.lab.services import ServicePlan
from ciliate.lab.state import ROOT, WORLD
from ciliate.manifest import Document
from ciliate.policy.simulate import Result, Simulation
from ciliate.scenario.model import ALLOW, DENY, Expectation, Flow, Scenario, load_scenarios
from ciliate.scenario.report import FlowResult, ScenarioResult, failed, render_table, to_json

TIMEOUT = 1.0
"""Seconds without an answer after which a flow counts as denied."""
SECOND_TIMEOUT = 3.0
"""The limit at the second try of a flow that should have been allowed: a busy machine is no denial."""
SCTP = 132
PROXY = "to reach the proxy"
"""How the engine says that a flow goes to a proxy."""
Outcome = dict[str, Any]


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
    files: Sequence[Path | str], name: str, keep: bool = False, root: Path = ROOT, shape: Shape = ONE_NODE
) -> LabReport:
    """Run scenario files in the lab ``name``, which is built in this shape and taken down where it is not up.

    Raises LabError where the lab cannot do its work, ManifestError and PolicyError for wrong files.
    """
    scenarios = load_scenarios(files)
    report = LabReport()
    with Lab.lock(name, root), _borrowed(name, scenarios[0].expectations[0].enforcement, keep, root, shape) as lab:
        for scenario in scenarios:
            _run_scenario(lab, scenario, report)
    return report


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


def _run_scenario(lab: Lab, scenario: Scenario, report: LabReport) -> None:
    lab.reset()
    cluster = populate(lab, scenario.objects)
    places = cluster.places(lab.state.pods)
    backends = cluster.plan.outside if cluster.plan else []
    lab.add_world_addresses([*outside_addresses(_flows(scenario), places), *backends])
    results: list[FlowResult] = []
    for expectation in scenario.expectations:
        lab.set_enforcement(expectation.enforcement)
        run = ExpectationRun(lab, scenario, expectation, places)
        results += run.results(report.skipped)
    report.results.append(ScenarioResult(scenario.name, results))


def _flows(scenario: Scenario) -> Iterator[Flow]:
    return (flow for expectation in scenario.expectations for flow in expectation.flows)


def populate(lab: Lab, documents: Iterable[Document]) -> Cluster:
    """Make the pods of these manifests and apply their policies; returns once every endpoint enforces them."""
    cluster = sort_documents(documents)
    lab.everywhere("PUT", "/v1/workloads", {"objects": cluster.workloads()})
    lab.add_pods(list(cluster.pods.values()))
    if cluster.services:
        cluster.plan = ServicePlan(cluster.services, cluster.pods, lab.state.pods, cluster.pod_addresses)
        lab.everywhere("PUT", "/v1/service-objects", {"objects": cluster.plan.objects})
    if cluster.policies:
        body = {"documents": [msgspec.to_builtins(document) for document in cluster.policies]}
        for node, answer in zip(lab.nodes, lab.everywhere("PUT", "/v1/policy", body), strict=True):
            lab.request("GET", f"/v1/policy/wait?revision={answer['revision']}", node=node)
    wait_propagated(lab)
    return cluster


class ExpectationRun:
    """The flows of one expectation, sent at once."""

    def __init__(self, lab: Lab, scenario: Scenario, expectation: Expectation, places: Places) -> None:
        self._lab = lab
        self._scenario = scenario.name
        self._flows = expectation.flows
        self._places = places
        self._engine = Simulation(scenario.objects, enforcement=expectation.enforcement)
        self._known = Simulation(known_to_lab(scenario.objects), enforcement=expectation.enforcement)

    def results(self, skipped: list[Skipped]) -> list[FlowResult]:
        """Send everything and judge it; flows that cannot be sent or judged go to ``skipped``."""
        reasons: dict[int, str] = {}
        probes = self._plan(reasons)
        self._serve(probes)
        outcomes = self._send(probes, TIMEOUT)
        self._send_again(probes, outcomes)
        seen: dict[int, list[tuple[Probe, Outcome]]] = {}
        for probe, outcome in zip(probes, outcomes, strict=True):
            seen.setdefault(probe.flow, []).append((probe, outcome))
        results = []
        for index, flow in enumerate(self._flows):
            try:
                if index in reasons:
                    raise SkippedError(reasons[index])
                results.append(self._judge(flow, seen[index]))
            except SkippedError as reason:
                skipped.append(Skipped(self._scenario, flow, str(reason)))
        return results

    def _plan(self, reasons: dict[int, str]) -> list[Probe]:
        probes: list[Probe] = []
        sctp = kernel_has_sctp()
        for index, flow in enumerate(self._flows):
            try:
                probes += plan_flow(index, flow, self._places, sctp)
            except SkippedError as reason:
                reasons[index] = str(reason)
        return probes

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

    def _send_again(self, probes: Sequence[Probe], outcomes: list[Outcome]) -> None:
        """A second try, with more time, for what should be allowed and did not get through."""
        again = [
            number
            for number, (probe, outcome) in enumerate(zip(probes, outcomes, strict=True))
            if not probe.reached(outcome) and self._flows[probe.flow].verdict == ALLOW
        ]
        if again:
            second = self._send([probes[number] for number in again], SECOND_TIMEOUT)
            for number, outcome in zip(again, second, strict=True):
                outcomes[number] = outcome

    def _judge(self, flow: Flow, seen: Sequence[tuple[Probe, Outcome]]) -> FlowResult:
        strangers = [outcome["who"] for probe, outcome in seen if outcome["who"] not in ("", *probe.receivers)]
        if strangers:
            return FlowResult(flow, "error", f"answered by {strangers[0]}")
        # where one of a service's backends may not be reached, the service may not
        reached = {probe.reached(outcome) for probe, outcome in seen}
        if len(reached) > 1 and flow.dst.kind == "service":
            reached = {False}
        if len(reached) > 1:
            return FlowResult(flow, "error", f"the families differ: {_notes(seen)}")
        actual = ALLOW if reached.pop() else DENY
        if flow.direction and actual == DENY:
            self._blame(flow)
        engine = self._engine.verdict(flow)
        if engine.verdict == actual:
            return FlowResult(flow, actual, engine.why)
        self._excuse(flow, engine)
        return FlowResult(flow, actual, f"{_notes(seen)}; the policy engine says {engine.verdict}: {engine.why}")

    def _blame(self, flow: Flow) -> None:
        """A packet passes both sides: where the other one denies, it tells nothing of the side that is asked for."""
        other = "egress" if flow.direction == "ingress" else "ingress"
        if self._engine.verdict(msgspec.structs.replace(flow, direction=other)).verdict == DENY:
            raise SkippedError(f"{other} denies it too, so packets cannot tell what {flow.direction} does")

    def _excuse(self, flow: Flow, engine: Result) -> None:
        """A difference is none where the scenario counts on something that no lab has yet."""
        if PROXY in engine.why:
            raise SkippedError("it goes through a proxy, and a lab has none yet")
        known = msgspec.structs.replace(flow, src=self._places.real(flow.src), dst=self._places.real(flow.dst))
        if self._known.verdict(known).verdict != engine.verdict:
            raise SkippedError("it counts on pod addresses of the manifest, and a lab has its own")


def known_to_lab(documents: Iterable[Document]) -> list[Document]:
    """The manifests without what a lab does not honour: the addresses that pods say they have."""
    known = []
    for document in documents:
        if document.object.get("kind") == "Pod":
            pod = {key: value for key, value in document.object.items() if key != "status"}
            document = msgspec.structs.replace(document, object=pod)
        known.append(document)
    return known


def _notes(seen: Iterable[tuple[Probe, Outcome]]) -> str:
    return ", ".join(f"IPv{probe.family}: {outcome['note']}" for probe, outcome in seen)


def kernel_has_sctp() -> bool:
    """Whether this kernel can speak SCTP."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, SCTP).close()
    except OSError:
        return False
    return True
