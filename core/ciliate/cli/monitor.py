"""`ciliate monitor`: what the datapath does, as it happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ciliate.api_client import AgentUnavailable
from ciliate.cli.common import client

TYPES = ("drop", "debug", "trace", "policy-verdict", "agent")


@click.command()
@click.option("-t", "--type", "types", multiple=True, type=click.Choice(TYPES), help="Only events of this type.")
@click.option("--from", "source", type=int, help="Only packets from this endpoint id.")
@click.option("--to", "destination", type=int, help="Only packets to this endpoint id.")
@click.option("--related-to", type=int, help="Only packets from or to this endpoint id.")
@click.option("-j", "--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--bpf-root", default="/sys/fs/bpf", show_default=True, help="Where to look while no agent answers.")
@click.option("--instance", default="default", show_default=True, help="The agent's instance name there.")
@click.option("--hex", "with_packet", is_flag=True, help="Show the packet's head in hexadecimal.")
def command(
    types: tuple[str, ...],
    source: int | None,
    destination: int | None,
    related_to: int | None,
    as_json: bool,
    with_packet: bool,
    bpf_root: str,
    instance: str,
) -> None:
    """Watch drops, policy verdicts and traces until interrupted.

    While no agent answers, events come straight from the kernel, without names.
    """
    wanted = _filter(types, source, destination, related_to)
    try:
        for event in _events(Path(bpf_root) / "ciliate" / instance / "ciliate_events"):
            if wanted(event):
                _show(event, as_json, with_packet)
    except KeyboardInterrupt:
        return  # its usual end


def _events(pin: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from client().stream("/v1/monitor")
    except AgentUnavailable:
        if not pin.exists():
            raise
        click.echo("ciliate: no agent answers; straight from the kernel", err=True)
        yield from _from_kernel(pin)


def _from_kernel(pin: Path) -> Iterator[dict[str, Any]]:
    import select

    from ciliate.agent.monitor import plain
    from ciliate.datapath.events import EventReader, decode

    reader = EventReader(pin)
    poller = select.epoll()
    poller.register(reader.fileno(), select.EPOLLIN)
    try:
        while True:
            for record in reader.read():
                event = decode(record)
                what = event.reason_text or event.observation or event.verdict
                text = f"{event.type} {what} {event.direction} endpoint {event.endpoint}"
                who = f"identity {event.src_identity} -> {event.dst_identity}: {event.summary}"
                yield {**plain(event), "text": f"{text} {who}"}
            poller.poll()
    finally:
        poller.close()
        reader.close()


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
