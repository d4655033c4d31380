"""`ciliate metrics`: list."""

from __future__ import annotations

import re
from typing import Any

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """What the agent counts, as Prometheus would see it."""


@command.command("list")
@click.option("-p", "--match-pattern", "pattern", default="", help="Only names that this regular expression finds.")
@output_option
def list_metrics(pattern: str, output: str) -> None:
    """List every metric with labels and value."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise click.UsageError(f"--match-pattern: {pattern!r} given, expected a regular expression: {error}") from error
    samples = [item for item in client().request("GET", "/v1/metrics") if wanted.search(item["name"])]
    emit(samples, output, _text)


def _text(samples: list[dict[str, Any]]) -> str:
    rows = [
        (item["name"], ", ".join(f"{name}={value}" for name, value in item["labels"].items()), f"{item['value']:g}")
        for item in samples
    ]
    return table(("METRIC", "LABELS", "VALUE"), rows)
