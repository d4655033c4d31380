"""`ciliate config`: every option with its value and where it comes from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ciliate.cli.common import emit, output_option, table


@click.group()
def command() -> None:
    """The agent's configuration: flag > environment > config directory > file > default."""


@command.command("show")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file.")
@click.option("--config-dir", type=click.Path(path_type=Path), help="Directory with one file per option.")
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="As a flag of the agent would.")
@output_option
def show(config_file: Path | None, config_dir: Path | None, settings: tuple[str, ...], output: str) -> None:
    """Print every effective value and its origin; refuses what the agent would refuse."""
    from ciliate.config import ConfigError, load_config

    flags = dict(setting.partition("=")[::2] for setting in settings)
    try:
        result = load_config(flags, os.environ, config_dir, config_file)
    except ConfigError as error:
        click.echo(f"ciliate: {error}", err=True)
        sys.exit(2)
    for warning in result.warnings:
        click.echo(f"ciliate: {warning}", err=True)
    emit(_records(result), output, _text)


def _records(result: Any) -> list[dict[str, Any]]:
    from ciliate import wire
    from ciliate.config import dashed, documentation

    values, docs = wire.plain(result.config), documentation()
    return [
        {
            "option": dashed(field),
            "value": values[field],
            "origin": origin,
            "unit": docs[field].unit,
            "reader": docs[field].reader,
            "description": docs[field].text,
        }
        for field, origin in result.origins.items()
    ]


def _text(records: list[dict[str, Any]]) -> str:
    rows = [
        (record["option"], record["value"], record["unit"], record["origin"], record["description"])
        for record in records
    ]
    return table(("OPTION", "VALUE", "UNIT", "FROM", "WHAT"), rows)
