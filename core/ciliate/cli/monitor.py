"""`ciliate monitor`: what the datapath does, as it happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from ciliate.cli.common import client

TYPES = ("drop", "trace", "policy-verdict", "agent")


@click.command()
@click.option("-t", "--type", "types", multiple=True, type=click.Choice(TYPES), help="Only events of this type.")
@click.option("--from", "source", type=int, help="Only packets from this endpoint id.")
@click.option("--to", "destination", type=int, help="Only packets to this endpoint id.")
@click.option("--related-to", type=int, help="Only packets from or to this endpoint id.")
@click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--hex", "with_packet", is_flag=True, help="Show the packet's head in hexadecimal.")
def command(
    types: tuple[str, ...],
    source: int | None,
    destination: int | None,
    related_to: int | None,
    as_json: bool,
    with_packet: bool,
) -> None:
    """Watch drops, policy verdicts and traces until interrupted."""
    wanted = _filter(types, source, destination, related_to)
    try:
        for event in client().stream("/v1/monitor"):
            if wanted(event):
                _show(event, as_json, with_packet)
    except KeyboardInterrupt:
        return


def _filter(
    types: tuple[str, ...], source: int | None, destination: int | None, related: int | None
) -> Callable[[dict[str, Any]], bool]:
    def wanted(event: dict[str, Any]) -> bool:
        ends = (event.get("src_endpoint"), event.get("dst_endpoint"))
        return (
            (not types or event.get("type") in types)
            and (source is None or ends[0] == source)
            and (destination is None or ends[1] == destination)
            and (related is None or related in ends)
        )

    return wanted


def _show(event: dict[str, Any], as_json: bool, with_packet: bool) -> None:
    if as_json:
        click.echo(json.dumps(event))
        return
    click.echo(event["text"])
    if with_packet and event.get("packet"):
        packet = event["packet"]
        for offset in range(0, len(packet), 32):
            click.echo(f"    {offset // 2:04x}  {packet[offset : offset + 32]}")
