"""`ciliate bpf nat`: the mappings of BPF masquerading, straight from the kernel."""

from __future__ import annotations

import time
from typing import Any

import click

from ciliate.cli.common import output_option


@click.group("nat")
def nat_group() -> None:
    """Mappings of masqueraded flows: who is behind which port of the node."""


@nat_group.command("list")
@click.option("--host", is_flag=True, help="Also the node's own flows, which keep their ports.")
@output_option
def list_nat(host: bool, output: str) -> None:
    """List every mapping with its peer, its age and how long ago it was used, in seconds."""
    from ciliate.cli.bpf import _show
    from ciliate.datapath import snat

    _show(output, (snat.MAP,), lambda table: rows(snat.entries(table), host))


def rows(entries: Any, host: bool) -> list[dict[str, Any]]:
    """Mappings as plain data, by protocol, pod and peer."""
    from ciliate.datapath.reasons import protocol_name

    now = int(time.monotonic())
    chosen = [entry for entry in entries if host or not entry.host]
    chosen.sort(key=lambda entry: (entry.proto, str(entry.source), entry.source_port, str(entry.remote)))
    return [
        {
            "protocol": protocol_name(entry.proto),
            "source": f"{entry.source} {entry.source_port}",
            "node": f"{entry.node} {entry.node_port}",
            "peer": f"{entry.remote} {entry.remote_port}",
            "age": max(0, now - entry.created),
            "idle": max(0, now - entry.refreshed),
            "expires": entry.lifetime - now,
            **({"host": entry.host} if host else {}),
        }
        for entry in chosen
    ]


@nat_group.command("flush")
@click.option("--source", help="Only mappings of the pod with this address.")
@output_option
def flush_nat(source: str | None, output: str) -> None:
    """Remove mappings: flows under way are cut, where their next packet does not get the same port again."""
    from ciliate.cli.bpf import _show
    from ciliate.datapath import snat

    def run(table: Any) -> list[dict[str, Any]]:
        if source is None:
            return [{"removed": snat.flush_all(table)}]
        return [{"removed": snat.flush(table, lambda entry: str(entry.source) == source)}]

    _show(output, (snat.MAP,), run)
