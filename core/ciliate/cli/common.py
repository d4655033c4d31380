"""What sub-commands share: the API client, tables, output formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import click

from ciliate.api_client import DEFAULT_SOCKET, ApiClient


class _Seconds(click.FloatRange):
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:  # nan is in no range, but click asks whether it is outside
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return number


SECONDS = _Seconds(0, 86400)
"""The type of options that say how long to wait."""
Decorated = Callable[..., Any]


def client() -> ApiClient:
    """A client of the agent that the root options name."""
    context = click.get_current_context()
    root = context.find_root().obj or {}
    return ApiClient(root.get("socket") or DEFAULT_SOCKET)


def output_option(function: Decorated) -> Decorated:
    """Add ``-o/--output`` with the choice of text or json."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        help="Table for people, JSON for programs.",
    )(function)


def emit(value: Any, output: str, text: Callable[[Any], str]) -> None:
    """Print ``value`` as JSON, or what ``text`` makes of it."""
    click.echo(json.dumps(value, indent=2, sort_keys=False) if output == "json" else text(value))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned by their widest cell; cells may have several lines."""
    cells = [[str(cell).split("\n") for cell in row] for row in [header, *rows]]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(len(header))]
    lines = []
    for row in cells:
        for index in range(max(len(cell) for cell in row)):
            parts = [
                (cell[index] if index < len(cell) else "").ljust(width) for cell, width in zip(row, widths, strict=True)
            ]
            lines.append("   ".join(parts).rstrip())
    return "\n".join(lines)
