"""`ciliate config`: every option with its value and where it comes from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """The agent's configuration: flag > environment > config directory > file > default.

    `show` and `describe` need no agent; `get` and `set` are about the one that runs.
    """


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


@command.command("get")
@click.argument("options", nargs=-1)
@output_option
def get(options: tuple[str, ...], output: str) -> None:
    """Print what the running agent goes by: every option, or those named."""
    found = {name.replace("_", "-"): value for name, value in client().request("GET", "/v1/config").items()}
    if unknown := [name for name in options if name not in found]:
        raise click.UsageError(f"{unknown[0]!r} given, expected an option (`ciliate config describe` lists them)")
    chosen = {name: found[name] for name in options or found}
    emit(chosen, output, lambda values: table(("OPTION", "VALUE"), list(values.items())))


@command.command("set")
@click.argument("options", nargs=-1, required=True, metavar="OPTION=VALUE...")
def set_options(options: tuple[str, ...]) -> None:
    """Change options of the running agent until it ends: enable-policy, monitor-aggregation, debug (true or false)."""
    if wrong := [option for option in options if "=" not in option]:
        raise click.UsageError(f"{wrong[0]!r} given, expected OPTION=VALUE")
    changes: dict[str, Any] = dict(option.split("=", 1) for option in options)
    if changes.get("debug") in ("true", "false"):
        changes["debug"] = changes["debug"] == "true"
    client().request("PATCH", "/v1/config", {"options": changes})
    click.echo(f"changed until the agent ends: {', '.join(options)}")


@command.command("describe")
@click.option("-o", "--output", type=click.Choice(["text", "json", "markdown"]), default="text")
def describe(output: str) -> None:
    """Describe every option: default, unit, which part reads it, what it means."""
    from ciliate.config import load_config

    records = [{**record, "value": _default(record)} for record in _records(load_config())]
    if output != "markdown":
        emit(records, output, _described)
        return
    for line in markdown(records):
        click.echo(line)


def _default(record: dict[str, Any]) -> Any:
    """The default as it is on every machine."""
    return "" if record["option"] in ("node-name", "socket-path", "cni-socket-path") else record["value"]


def _described(records: list[dict[str, Any]]) -> str:
    rows = [(item["option"], item["value"], item["unit"], item["reader"], item["description"]) for item in records]
    return table(("OPTION", "DEFAULT", "UNIT", "READ BY", "WHAT"), rows)


def markdown(records: list[dict[str, Any]]) -> list[str]:
    """The table of docs/configuration.md."""
    lines = ["| option | default | unit | read by | what |", "|---|---|---|---|---|"]
    for item in records:
        default = f"`{item['value']}`" if item["value"] not in ("", {}) else ""
        cells = (f"`{item['option']}`", default, item["unit"], item["reader"], item["description"])
        lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def _records(result: Any) -> list[dict[str, Any]]:
    from ciliate import wire
    from ciliate.config import dashed, documentation
    from ciliate.redaction import hide_secrets

    values, docs = hide_secrets(wire.plain(result.config)), documentation()
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
