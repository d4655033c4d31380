"""`ciliate policy simulate | validate | diff`: what needs the policy engine but neither agent nor root."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click
import msgspec

from ciliate import manifest
from ciliate.cli.common import output_option, table
from ciliate.manifest import Document, ManifestError
from ciliate.policy.importer import is_policy, parse_documents
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.simulate import Simulation
from ciliate.policy.world import World
from ciliate.scenario import report
from ciliate.scenario.model import Flow, load_scenarios, read_expectation
from ciliate.scenario.run import simulate as run_scenarios

FILES = click.argument("files", nargs=-1, required=True)


def _bad_input_is_2(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print every problem of bad input and exit with 2."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except PolicyError as error:
            lines = [problem.text for problem in error.problems]
        except ManifestError as error:
            lines = str(error).splitlines()
        for line in lines:
            click.echo(line, err=True)
        click.echo(f"ciliate: {len(lines)} problem{'s' if len(lines) != 1 else ''}", err=True)
        sys.exit(2)

    return wrapped


@click.command()
@output_option
@click.option("--cluster", default="default", show_default=True, help="Name of the cluster that the policies are in.")
@FILES
@_bad_input_is_2
def simulate(output: str, cluster: str, files: tuple[str, ...]) -> None:
    """Answer scenario FILES from the policy engine alone; exit code 1 where a flow differs from what is expected."""
    results = run_scenarios(load_scenarios(files), cluster)
    click.echo(json.dumps(report.to_json(results), indent=2) if output == "json" else report.render_table(results))
    sys.exit(1 if report.failed(results) else 0)


@click.command()
@output_option
@FILES
@_bad_input_is_2
def validate(output: str, files: tuple[str, ...]) -> None:
    """List every mistake in policy FILES with file, line and field; exit code 1 where there is any."""
    problems, count = find_problems(files)
    if output == "json":
        click.echo(
            json.dumps({"objects": count, "problems": [msgspec.to_builtins(item) for item in problems]}, indent=2)
        )
    else:
        for problem in problems:
            click.echo(problem.text)
        click.echo(f"{count} objects, {len(problems)} problems")
    sys.exit(1 if problems else 0)


def find_problems(files: Sequence[str | Path]) -> tuple[list[Problem], int]:
    """Every problem in the manifests of some files, and how many objects there are. A file that is not YAML is one."""
    problems: list[Problem] = []
    documents: list[Document] = []
    for file in files:
        try:
            documents.extend(manifest.load([file]))
        except ManifestError as error:
            problems.extend(_unreadable(line) for line in str(error).splitlines())
    by_file: dict[str, list[Document]] = {}
    for document in documents:
        by_file.setdefault(document.file, []).append(document)
    for found in by_file.values():
        # file by file: several scenarios may well have pods and policies of the same name
        problems.extend(_policy_problems([item for item in found if is_policy(item.object)]))
        problems.extend(World([item for item in found if not is_policy(item.object)]).problems)
        for document in found:
            if document.object.get("kind") == "Expectation":
                problems.extend(read_expectation(document)[1])
    return sorted(problems, key=lambda item: (item.file, item.line)), len(documents)


def _policy_problems(policies: list[Document]) -> list[Problem]:
    try:
        parse_documents(policies)
    except PolicyError as error:
        return error.problems
    return []


def _unreadable(line: str) -> Problem:
    place, _, text = line.partition(": ")
    file, _, number = place.rpartition(":")
    if not (number.isascii() and number.isdigit()):
        file, number = place, "0"
    return Problem(file, int(number), "", "file", "", text)


@click.command()
@output_option
@click.option("--scenario", "scenarios", multiple=True, required=True, help="Scenario file or folder with the flows.")
@click.argument("old")
@click.argument("new")
@_bad_input_is_2
def diff(output: str, scenarios: tuple[str, ...], old: str, new: str) -> None:
    """Which flows of the scenarios change their verdict between the policies of OLD and of NEW.

    Policies in the scenario files themselves do not count. Exit code 1 where any flow changes.
    """
    changes = changed_flows([old], [new], scenarios)
    if output == "json":
        click.echo(json.dumps({"changes": changes}, indent=2))
    else:
        rows = [(item["from"], item["to"], item["port"], item["old"], item["new"], item["why"]) for item in changes]
        click.echo(table(("FROM", "TO", "PORT", "OLD", "NEW", "WHY"), rows) if rows else "no flow changes")
    sys.exit(1 if changes else 0)


def changed_flows(
    old: Sequence[str | Path], new: Sequence[str | Path], scenarios: Sequence[str | Path]
) -> list[dict[str, Any]]:
    """The flows that two sets of policies decide differently, with both verdicts and the reason for the new one."""
    before, after = ([item for item in manifest.load(files) if is_policy(item.object)] for files in (old, new))
    changes = []
    for scenario in load_scenarios(scenarios):
        cluster = [item for item in scenario.objects if not is_policy(item.object)]
        for expectation in scenario.expectations:
            first = Simulation([*cluster, *before], expectation.enforcement)
            second = Simulation([*cluster, *after], expectation.enforcement)
            changes.extend(_changes(scenario.name, expectation.flows, first, second))
    return changes


def _changes(name: str, flows: Sequence[Flow], first: Simulation, second: Simulation) -> list[dict[str, Any]]:
    changes = []
    for flow in flows:
        one, two = first.verdict(flow), second.verdict(flow)
        if one.verdict != two.verdict:
            port = f"{flow.port}/{flow.protocol}" if flow.port is not None else flow.protocol or "any"
            ends = {"scenario": name, "from": str(flow.src), "to": str(flow.dst), "port": port}
            changes.append({**ends, "old": one.verdict, "new": two.verdict, "why": two.why})
    return changes
