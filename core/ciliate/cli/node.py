"""`ciliate node`: list, get, delete."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """Nodes of the cluster, as this one knows them."""


@command.command("list")
@output_option
def list_nodes(output: str) -> None:
    """List this node and every other one with addresses and pod ranges."""
    emit(client().request("GET", "/v1/node"), output, _text)


@command.command("get")
@click.argument("name")
@output_option
def get_node(name: str, output: str) -> None:
    """Show one node; exit 1 where it is not known."""
    emit(client().request("GET", _path(name)), output, lambda node: _text([node]))


@command.command("delete")
@click.argument("name")
def delete_node(name: str) -> None:
    """Tell the whole cluster that a node will not come back: its routes, tunnels and pods' addresses go at once.

    Stop its agent first: one that runs makes its node known again.
    """
    count = client().request("DELETE", _path(name))["addresses"]
    click.echo(f"node {name} and {count} addresses of its pods are removed")


def _path(name: str) -> str:
    if not name:
        raise click.UsageError("NAME is empty")
    return f"/v1/node/{quote(name, safe='')}"


def _text(nodes: list[dict[str, Any]]) -> str:
    header = ["NAME", "CLUSTER", "ADDRESS", "POD RANGE", "KEY", "STATE"]
    return table(header, [_row(node) for node in nodes])


def _row(node: dict[str, Any]) -> list[Any]:
    name = f"{node['name']} (this node)" if node["local"] else node["name"]
    addresses, ranges = _lines(node["primary-address"]), _lines(node["pod-range"])
    return [name, node["cluster"], addresses, ranges, node["encryption-key"] or "-", node["problem"] or "ok"]


def _lines(families: dict[str, str]) -> str:
    return "\n".join(text for text in families.values() if text) or "-"
