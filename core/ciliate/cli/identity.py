"""`ciliate identity`: list, get."""

from __future__ import annotations

from typing import Any

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """Security identities: numbers that stand for label sets."""


@command.command("list")
@output_option
def list_identities(output: str) -> None:
    """List the reserved identities and those known to this node."""
    emit(client().request("GET", "/v1/identity"), output, _text)


@command.command("get")
@click.argument("number", type=int)
@output_option
def get_identity(number: int, output: str) -> None:
    """Show one identity."""
    emit(client().request("GET", f"/v1/identity/{number}"), output, lambda identity: _text([identity]))


def _text(identities: list[dict[str, Any]]) -> str:
    rows = [(identity["id"], "\n".join(identity["labels"])) for identity in identities]
    return table(("ID", "LABELS"), rows)
