"""`ciliate bpf lb list`: the load balancer as the kernel has it."""

from __future__ import annotations

from typing import Any

import click

from ciliate.cli.common import output_option


@click.group()
def group() -> None:
    """Services and backends."""


@group.command("list")
@click.option("--revnat", "view", flag_value="revnat", help="Where answers of each service come from.")
@click.option("--backends", "view", flag_value="backends", help="Backends by number.")
@click.option("--maglev", "view", flag_value="maglev", help="How the places of each table are shared.")
@click.option("--flows", "view", flag_value="flows", help="Flows and the backends they have.")
@output_option
def list_services(view: str | None, output: str) -> None:
    """List services with their backends."""
    from ciliate.cli.bpf import _show
    from ciliate.datapath import lbview

    names = (*lbview.NAMES, "ciliate_lb_flow")
    _show(output, names, lambda *maps: _rows(view, dict(zip(names, maps, strict=True))))


def _rows(view: str | None, maps: dict[str, Any]) -> list[dict[str, Any]]:
    from ciliate.datapath import lbview

    if view is None:
        return list(lbview.services(maps))
    if view == "maglev":
        return list(lbview.maglev(maps))
    table, row, header = {
        "revnat": ("ciliate_lb_reverse", lbview.reverse_row, ("service", "frontend")),
        "backends": ("ciliate_lb_backends", lbview.backend_row, ("id", "backend")),
        "flows": ("ciliate_lb_flow", lbview.flow_row, ("flow", "state")),
    }[view]
    found = sorted(maps[table].items())
    return [dict(zip(header, row(key, value), strict=True)) for key, value in found]
