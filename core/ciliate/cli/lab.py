"""`ciliate lab`: a test cluster on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from ciliate.cli.common import output_option, table

DEFAULT_NAME = "lab"
Decorated = Callable[..., Any]


def _name_option(default: str | None) -> Callable[[Decorated], Decorated]:
    return click.option("--name", default=default, show_default=default is not None, help="The lab's name.")


def _shape_options(function: Decorated) -> Decorated:
    """Options that say what a lab is built like."""
    nodes = click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="How many nodes.")
    tunnel = click.option(
        "--tunnel",
        type=click.Choice(["disabled", "vxlan", "geneve"]),
        default="disabled",
        show_default=True,
        help="How packets get from node to node; disabled is by routes.",
    )
    kvstore = click.option(
        "--kvstore",
        type=click.Choice(["embedded", "etcd"]),
        default="embedded",
        show_default=True,
        help="The store of the nodes; etcd is started with the lab.",
    )
    return nodes(tunnel(kvstore(function)))


def _reports_errors(function: Decorated) -> Decorated:
    """Print what went wrong and end with exit code 2."""

    @wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        from ciliate.lab.errors import LabError
        from ciliate.manifest import ManifestError
        from ciliate.policy.problems import PolicyError

        if os.geteuid():
            click.echo("ciliate: a lab needs root: it makes network namespaces and loads BPF programs", err=True)
            sys.exit(2)
        try:
            return function(*arguments, **options)
        except (LabError, ManifestError, PolicyError) as error:
            click.echo(f"ciliate: {error}", err=True)
            sys.exit(2)

    return wrapper


@click.group()
def command() -> None:
    """A test cluster on this machine: nodes and pods are network namespaces, agents and packets are real."""


@command.command()
@_name_option(DEFAULT_NAME)
@_shape_options
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="An option of the agent.")
@click.argument("files", nargs=-1)
@_reports_errors
def up(name: str, nodes: int, tunnel: str, kvstore: str, settings: tuple[str, ...], files: tuple[str, ...]) -> None:
    """Build a lab and, from manifests in FILES, its pods and policies. It stays until `lab down`."""
    from ciliate import manifest
    from ciliate.lab.changes import populate
    from ciliate.lab.lab import Lab
    from ciliate.lab.placement import Shape

    options = {option: value for option, _, value in (setting.partition("=") for setting in settings)}
    documents = manifest.load(files) if files else []
    with Lab.lock(name):
        lab = Lab.create(name, options=options, shape=Shape(nodes, tunnel, kvstore))
        try:
            populate(lab, documents)
        except BaseException:
            lab.destroy()
            raise
    click.echo(f"lab {name!r} is up: {len(lab.state.pods)} pods on {len(lab.nodes)} node{'s'[: len(lab.nodes) > 1]}")
    for node in lab.nodes:
        click.echo(f"  agent   ciliate -H {lab.directory.node(node).api_socket} status")
    click.echo(f"  inside  ciliate lab exec --name {name} POD -- COMMAND")


@command.command()
@output_option
@_name_option(None)
@_shape_options
@click.option("--keep", is_flag=True, help="Leave the lab up afterwards.")
@click.option("--jobs", type=click.IntRange(1, 16), default=1, show_default=True, help="Labs that share the scenarios.")
@click.argument("files", nargs=-1, required=True)
@_reports_errors
def run(
    output: str, name: str | None, nodes: int, tunnel: str, kvstore: str, keep: bool, jobs: int, files: tuple[str, ...]
) -> None:
    """Send the packets of scenario FILES and compare with what they expect.

    A lab of that name which is up is used, and emptied first; else one is built and taken down afterwards. Further labs
    of --jobs are called NAME-2 and so on.
    Exit code 1 where any flow differs.
    """
    from ciliate.lab.placement import Shape
    from ciliate.lab.scenario import run_files

    # told to end, the lab is taken down like at any other end
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = run_files(list(files), name or f"run-{os.getpid()}", keep, shape=Shape(nodes, tunnel, kvstore), jobs=jobs)
    click.echo(report.json() if output == "json" else report.table())
    sys.exit(1 if report.failed else 0)


@command.command("exec", context_settings={"ignore_unknown_options": True})
@_name_option(DEFAULT_NAME)
@click.argument("place")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
@_reports_errors
def execute(name: str, place: str, arguments: tuple[str, ...]) -> None:
    """Run a command in the network namespace of PLACE: a pod (`[namespace/]name`), a node (`node1`) or `world`."""
    from ciliate.lab import cgroups, netns
    from ciliate.lab.lab import Lab

    lab = Lab.open(name)
    line = [*netns.inside(lab.namespace_of(place)), *arguments]
    cgroups.move(os.getpid(), lab.cgroup_of(place))
    os.execvp(line[0], line)


@command.command()
@output_option
@click.option("--name", help="Only this lab.")
@_reports_errors
def status(output: str, name: str | None) -> None:
    """Show the labs of this machine with their pods."""
    from ciliate.lab.describe import describe
    from ciliate.lab.state import all_labs

    labs = [describe(item) for item in ([name] if name else all_labs())]
    if output == "json":
        click.echo(json.dumps({"labs": labs}, indent=2))
        return
    if not labs:
        click.echo("no lab is up")
        return
    rows = [
        (lab["name"], place["name"], place["kind"], ", ".join(place["addresses"]), place["state"])
        for lab in labs
        for place in lab["places"]
    ]
    click.echo(table(["LAB", "PLACE", "KIND", "ADDRESSES", "STATE"], rows))


@command.command()
@_name_option(DEFAULT_NAME)
@click.option("--force", is_flag=True, help="Also clean up after a crash; succeeds where nothing is left.")
@_reports_errors
def down(name: str, force: bool) -> None:
    """Take a lab down: processes, namespaces, pinned maps, files."""
    from ciliate.lab.lab import Lab

    with Lab.lock(name):
        problems = Lab.take_down(name, force)
    for problem in problems:
        click.echo(f"ciliate: {problem}", err=True)
    if problems:
        sys.exit(1)
    click.echo(f"lab {name!r} is down")
