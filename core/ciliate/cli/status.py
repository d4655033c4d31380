"""`ciliate status`: one screen, problems first."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from ciliate.api_client import AgentUnavailable
from ciliate.cli.common import client, emit, output_option, table

_MARK = {"ok": "ok", "warning": "warn", "failure": "FAIL", "disabled": "off"}


@click.command()
@click.option("--all-addresses", is_flag=True, help="Show every allocated address with its owner.")
@click.option("--brief", is_flag=True, help="One word, for health checks.")
@click.option("--wait", "wait_seconds", type=float, default=0.0, help="Wait up to this many seconds until all is well.")
@output_option
def command(all_addresses: bool, brief: bool, wait_seconds: float, output: str) -> None:
    """Health of the agent and of each of its parts; exit code 0 only where all is well."""
    status = _fetch(wait_seconds)
    if brief:
        click.echo("OK" if status["state"] == "ok" else status["state"].upper())
    else:
        emit(status, output, lambda value: _text(value, all_addresses))
    sys.exit(0 if status["state"] == "ok" else 1)


def _fetch(wait_seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            status: dict[str, Any] = client().request("GET", "/v1/healthz?detail=true")
            if status["state"] == "ok" or time.monotonic() >= deadline:
                return status
        except AgentUnavailable:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


def _text(status: dict[str, Any], all_addresses: bool) -> str:
    parts = sorted(status["parts"], key=lambda part: part["state"] in ("ok", "disabled"))
    rows = [(_MARK[part["state"]], part["name"], part["message"]) for part in parts]
    lines = [
        f"Node {status['node']}, cluster {status['cluster']}: {_MARK[status['state']]}",
        table(("", "PART", ""), rows),
    ]
    if all_addresses:
        lines.append(table(("ADDRESS", "OWNER"), [(item["ip"], item["owner"]) for item in status["addresses"]]))
    return "\n\n".join(lines)
