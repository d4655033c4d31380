"""`ciliate cni`: install the CNI executable and its configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ciliate.cni import install as installing
from ciliate.cni import lists
from ciliate.cni.spec import IDENTIFIER as NETWORK_NAME


@click.group()
def command() -> None:
    """Install the CNI executable and its configuration."""


@command.command()
@click.option(
    "--bin-dir",
    type=click.Path(path_type=Path),
    default=installing.DEFAULT_BIN_DIR,
    show_default=True,
    help="Where the container runtime looks for CNI plugins.",
)
@click.option(
    "--conf-dir",
    type=click.Path(path_type=Path),
    default=installing.DEFAULT_CONF_DIR,
    show_default=True,
    help="Where the container runtime looks for network configurations.",
)
@click.option("--socket", default=installing.DEFAULT_SOCKET, show_default=True, help="The agent's CNI socket.")
@click.option("--name", default="ciliate", show_default=True, help="The network's name.")
@click.option("--mtu", type=click.IntRange(1280, 65535), help="MTU of the pods' devices instead of the node's.")
@click.option("--no-conf", is_flag=True, help="Write the executable only.")
@click.option("--python-only", is_flag=True, help="No launcher in C, even where there is a compiler.")
def install(
    bin_dir: Path, conf_dir: Path, socket: str, name: str, mtu: int | None, no_conf: bool, python_only: bool
) -> None:
    """Write the executable `ciliate-cni` and a configuration list that names it.

    Both are replaced in one step, so a runtime never sees half a file. Other files are left alone.
    """
    if not NETWORK_NAME.match(name):
        raise click.UsageError(f"--name: {name!r} given, expected letters, digits, '_', '.' and '-', the first no sign")
    if not socket.startswith("/"):
        raise click.UsageError(f"--socket: {socket!r} given, expected an absolute path")
    try:
        for path in installing.install_executable(bin_dir, socket, not python_only):
            click.echo(path)
        if not no_conf:
            click.echo(installing.install_configuration(conf_dir, name, mtu or 0))
    except OSError as error:
        click.echo(f"ciliate: {error.filename}: cannot be written: {error.strerror}", err=True)
        sys.exit(1)
    except installing.InstallError as error:
        click.echo(f"ciliate: {error}", err=True)
        sys.exit(1)


@command.command()
@click.option(
    "--conf-dir",
    type=click.Path(path_type=Path),
    default=installing.DEFAULT_CONF_DIR,
    show_default=True,
    help="Where the container runtime looks for network configurations.",
)
def check(conf_dir: Path) -> None:
    """Say which plugins cannot work beside ours in the lists of a directory; ends with 1 where there are any."""
    try:
        found = lists.look(conf_dir)
    except OSError as error:
        click.echo(f"ciliate: {error.filename}: cannot be read: {error.strerror}", err=True)
        sys.exit(1)
    for path, problems in found.items():
        click.echo(f"{path}: {'; '.join(problems) or 'ok'}")
    if not found:
        click.echo(f"{conf_dir}: no list names {installing.EXECUTABLE}")
    sys.exit(1 if any(found.values()) else 0)
