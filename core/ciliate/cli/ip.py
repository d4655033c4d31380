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
    """List every allocated address with its owner: pod and endpoint, or what else has it."""
    addresses = client().request("GET", "/v1/healthz?detail=true")["addresses"]
    emit({"addresses": addresses}, output, lambda ipam: addresses_text(ipam["addresses"]))


def addresses_text(addresses: list[dict[str, Any]]) -> str:
    """The table of addresses."""
    rows = [(item["ip"], _owner(item), item["endpoint"] or "") for item in addresses]
    return table(("ADDRESS", "OWNER", "ENDPOINT"), rows)


def _owner(item: dict[str, Any]) -> str:
    owner: str = item["pod"] or item["owner"]
    return f"{owner} (rests: {item['resting']})" if "resting" in item else owner
