"""`ciliate policy simulate | validate | diff`: what needs the policy engine but neither agent nor root."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import click
import msgspec

from ciliate import manifest
from ciliate.cli.common import output_option, table
from ciliate.identity.filter import LabelFilter
from ciliate.manifest import Document, ManifestError
from ciliate.policy.cautions import cautions
from ciliate.policy.importer import is_policy, left_alone, need_policies, sort_out
from ciliate.policy.porttable import Proxies
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.repository import Repository
from ciliate.policy.simulate import Simulation
from ciliate.policy.world import World
from ciliate.scenario import report
from ciliate.scenario.model import KIND, Flow, load_scenarios, read_expectation
from ciliate.scenario.run import simulate as run_scenarios

FILES = click.argument("files", nargs=-1, required=True)


def _proxies_option(default: str) -> Callable[[Any], Any]:
    """Add ``--proxies``."""
    text = "Layer-7 parsers that a proxy serves, comma-separated: http, kafka, dns or a parser's name; all, none."
    return click.option("--proxies", default=default, show_default=True, metavar="PARSERS", help=text)


def _proxies(text: str) -> list[str] | None:
    """The parsers that are served; None: every one."""
    names = [name for part in text.split(",") if (name := part.strip())]
    if names == ["all"]:
        return None
    if "all" in names or ("none" in names and len(names) > 1):
        raise click.UsageError(f"--proxies: {text!r} given, expected all, none or names of parsers")
    return [] if names == ["none"] else names


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
@_proxies_option("all")
@FILES
@_bad_input_is_2
def simulate(output: str, cluster: str, proxies: str, files: tuple[str, ...]) -> None:
    """Answer scenario FILES from the policy engine alone; exit code 1 where a flow differs from what is expected.

    What layer-7 and DNS rules allow gets through where a proxy serves them: see --proxies.
    """
    results = run_scenarios(load_scenarios(files), cluster, _proxies(proxies))
    click.echo(json.dumps(report.to_json(results), indent=2) if output == "json" else report.render_table(results))
    counted = sorted({name for result in results for flow in result.flows for name in flow.assumed})
    if counted:
        click.echo(f"ciliate: proxies taken to be active: {', '.join(counted)} (see --proxies)", err=True)
    sys.exit(1 if report.failed(results) else 0)


@click.command()
@output_option
@_proxies_option("none")
@FILES
@_bad_input_is_2
def validate(output: str, proxies: str, files: tuple[str, ...]) -> None:
    """List every mistake in policy FILES with file, line and field; exit code 1 where there is any.

    It refuses what an import of these files would refuse, warns of what import warns of, and names what import leaves.
    Files with an Expectation are scenarios: each is read for itself, its pods and services too.
    """
    found = read_files(files, _proxies(proxies))
    if output == "json":
        lists = {name: [msgspec.to_builtins(item) for item in items] for name, items in found.lists().items()}
        click.echo(json.dumps({"objects": found.objects, **lists}, indent=2))
    else:
        for problem in found.problems:
            click.echo(problem.text)
        for problem in found.warnings:
            click.echo(f"warning: {problem.text}")
        for problem in found.left:
            click.echo(f"left: {problem.place}: {problem.object}")
        counts = f"{found.objects} objects, {len(found.problems)} problems"
        click.echo(f"{counts}, {len(found.warnings)} warnings, {len(found.left)} objects of other kinds left")
    sys.exit(1 if found.problems else 0)


class Findings(msgspec.Struct):
    """What is wrong with files, what is worth a warning, and what of them is no concern of an import.

    ``objects`` counts those that concern policy or, in scenarios, the cluster.
    """

    objects: int = 0
    problems: list[Problem] = []
    warnings: list[Problem] = []
    left: list[Problem] = []

    def lists(self) -> dict[str, list[Problem]]:
        """Everything but the count."""
        return {"problems": self.problems, "warnings": self.warnings, "left": self.left}


def read_files(files: Sequence[str | Path], proxies: Sequence[str] | None) -> Findings:
    """What an import of the files would say; a file that is not YAML is a problem. ``proxies`` None: all are active."""
    found = Findings()
    by_file: dict[str, list[Document]] = {}
    for file in files:
        try:
            documents = manifest.load([file])
        except ManifestError as error:
            found.problems.extend(_unreadable(line) for line in str(error).splitlines())
            continue
        for document in documents:
            by_file.setdefault(document.file, []).append(document)
    together: list[Document] = []
    for items in by_file.values():
        if any(map(_is_expectation, items)):
            _read(items, proxies, found)
        else:
            together += items
    # beside scenarios they may be the cluster that all of these share
    _read(together, proxies, found, alone=len(together) == sum(map(len, by_file.values())))
    for listed in found.lists().values():
        listed.sort(key=lambda item: (item.file, item.line))
    return found


def _read(documents: list[Document], proxies: Sequence[str] | None, found: Findings, alone: bool = False) -> None:
    concerned, left = sort_out(documents)
    scenario = any(map(_is_expectation, documents))
    found.objects += len(documents if scenario else concerned)
    try:
        if alone:
            need_policies(concerned, left)
        repository = Repository()
        repository.import_documents(concerned)
        served = None if proxies is None else Proxies(tuple((name, 1) for name in proxies))
        keeps = cache(LabelFilter().keeps)
        found.warnings += [text for item in repository.objects() for text in cautions(item, keeps, served)]
    except PolicyError as error:
        found.problems += error.problems
    if not scenario:
        found.left += map(left_alone, left)
        return
    found.problems += World(left).problems
    for document in filter(_is_expectation, documents):
        found.problems += read_expectation(document)[1]


def _is_expectation(document: Document) -> bool:
    return document.object.get("kind") == KIND


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
