"""`ciliate identity`: list, get."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """Security identities: numbers that stand for label sets."""


@command.command("list")
@click.argument("labels", nargs=-1)
@click.option("--endpoints", is_flag=True, help="Only identities of this node's endpoints, with how many have each.")
@output_option
def list_identities(labels: tuple[str, ...], endpoints: bool, output: str) -> None:
    """List the reserved identities and those known to this node, or those with every one of LABELS."""
    if endpoints and labels:
        raise click.UsageError("give either LABELS or --endpoints")
    if endpoints:
        emit(client().request("GET", "/v1/identity/endpoints"), output, _counted)
    else:
        emit(client().request("GET", f"/v1/identity{_query(labels)}"), output, _text)


@command.command("get")
@click.argument("number", type=int, required=False)
@click.option("--label", "labels", multiple=True, help="Those with this label, instead of NUMBER.")
@output_option
def get_identity(number: int | None, labels: tuple[str, ...], output: str) -> None:
    """Show one identity by number, or those with labels; exit 1 where there is none."""
    if (number is None) == (not labels):
        raise click.UsageError("give either NUMBER or --label")
    if number is None:
        emit(client().request("GET", f"/v1/identity{_query(labels)}"), output, _text)
    else:
        emit(client().request("GET", f"/v1/identity/{number}"), output, lambda identity: _text([identity]))


def _query(labels: tuple[str, ...]) -> str:
    return f"?{urlencode([('labels', label) for label in labels])}" if labels else ""


def _text(identities: list[dict[str, Any]]) -> str:
    rows = [(identity["id"], "\n".join(identity["labels"])) for identity in identities]
    return table(("ID", "LABELS"), rows)


def _counted(items: list[dict[str, Any]]) -> str:
    rows = [(item["identity"]["id"], "\n".join(item["identity"]["labels"]), item["refCount"]) for item in items]
    return table(("ID", "LABELS", "ENDPOINTS"), rows)
