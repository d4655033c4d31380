"""`ciliate map`: list, get."""

from __future__ import annotations

import sys
from typing import Any
from urllib.parse import quote, urlencode

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """The datapath's maps, as the agent knows them; `ciliate bpf` reads them without an agent."""


@command.command("list")
@click.option("--verbose", is_flag=True, help="With sizes and paths.")
@output_option
def list_maps(verbose: bool, output: str) -> None:
    """List the maps and how full they are."""
    emit(client().request("GET", "/v1/map")["maps"], output, lambda maps: list_text(maps, verbose))


@command.command("get")
@click.argument("name")
@click.option("--limit", type=click.IntRange(1), default=10000, show_default=True, help="Entries to show at most.")
@output_option
def get_map(name: str, limit: int, output: str) -> None:
    """Show what is in a map; exit 1 where the kernel has something else than the agent wants."""
    if not name:
        raise click.UsageError("NAME is empty")
    found = client().request("GET", f"/v1/map/{quote(name, safe='')}?{urlencode({'limit': limit})}")
    emit(found, output, _content)
    sys.exit(1 if any(entry["desired-action"] != "ok" for entry in found["cache"]) else 0)


def list_text(maps: list[dict[str, Any]], verbose: bool) -> str:
    """The table of maps."""
    header = ["NAME", "TYPE", "ENTRIES", "CAPACITY", "USED"]
    rows = [[item["name"], item["type"], _entries(item), item["max-entries"], _used(item)] for item in maps]
    if verbose:
        header += ["KEY", "VALUE", "PATH"]
        rows = [
            [*row, item["key-size"], item["value-size"], item["path"]] for row, item in zip(rows, maps, strict=True)
        ]
    return table(header, rows)


def _entries(item: dict[str, Any]) -> str:
    return "-" if item["entries"] is None else str(item["entries"])


def _used(item: dict[str, Any]) -> str:
    return "-" if item["entries"] is None else f"{100 * item['entries'] / item['max-entries']:.1f} %"


def _content(found: dict[str, Any]) -> str:
    if not found["cache"]:
        return "no entries"
    rows = [(entry["key"], entry["value"], entry["desired-action"]) for entry in found["cache"]]
    text = table(("KEY", "VALUE", "KERNEL"), rows)
    return f"{text}\n(more entries than --limit)" if found["truncated"] else text
