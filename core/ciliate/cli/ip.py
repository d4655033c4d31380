"""`ciliate ip`: addresses in use and their owners."""

from __future__ import annotations

from typing import Any

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """Addresses of this node's ranges."""


@command.command("list")
@output_option
def list_addresses(output: str) -> None:
    """List every allocated address with its owner."""
    emit(client().request("GET", "/v1/ipam"), output, _text)


def _text(ipam: dict[str, Any]) -> str:
    return table(("ADDRESS", "OWNER"), sorted((entry["ip"], entry["owner"]) for entry in ipam["addresses"]))
