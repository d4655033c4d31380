"""`ciliate debuginfo`: everything that helps to understand an agent from afar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ciliate.cli.common import client


@click.command()
@click.option("-f", "--file", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write there.")
@click.option("--file-per-command", is_flag=True, help="One file per section, in the output directory.")
@click.option(
    "--output-directory", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Default: here."
)
@click.option("-o", "--output", type=click.Choice(["markdown", "json"]), default="markdown", show_default=True)
def command(file: Path | None, file_per_command: bool, output_directory: Path, output: str) -> None:
    """Collect status, configuration (without secrets), endpoints with their logs, policies, maps, metrics, tasks."""
    if file and file_per_command:
        raise click.UsageError("give either --file or --file-per-command")
    found = client().request("GET", "/v1/debuginfo")
    try:
        if file_per_command:
            _write_sections(found, output_directory, output)
        elif file:
            file.write_text(_text(found, output))
        else:
            click.echo(_text(found, output), nl=False)
    except BrokenPipeError:
        raise  # not ours to tell
    except OSError as error:
        click.echo(f"ciliate: {error.filename or file or 'output'}: cannot be written: {error.strerror}", err=True)
        sys.exit(2)


def _write_sections(found: dict[str, Any], directory: Path, output: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    suffix = "json" if output == "json" else "md"
    for name, value in found.items():
        path = directory / f"debuginfo-{name}.{suffix}"
        path.write_text(_json(value) if output == "json" else _section(name, value))
        click.echo(str(path))


def _text(found: dict[str, Any], output: str) -> str:
    if output == "json":
        return _json(found)
    return "# Ciliate debugging information\n\n" + "\n".join(_section(name, value) for name, value in found.items())


def _section(name: str, value: Any) -> str:
    return f"## {name}\n\n```json\n{_json(value)}```\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
