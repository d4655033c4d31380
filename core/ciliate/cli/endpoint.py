"""`ciliate endpoint`: list, get, log, labels."""

from __future__ import annotations

from typing import Any

import click

from ciliate.cli.common import client, emit, output_option, table

_NOISE = "io.cilium.k8s."


@click.group()
def command() -> None:
    """Endpoints of this node."""


@command.command("list")
@output_option
def list_endpoints(output: str) -> None:
    """List the endpoints with identity, policy enforcement and addresses."""
    emit(client().request("GET", "/v1/endpoint"), output, _list_text)


@command.command("get")
@click.argument("endpoint_id", type=int)
def get_endpoint(endpoint_id: int) -> None:
    """Show one endpoint as JSON."""
    emit(client().request("GET", f"/v1/endpoint/{endpoint_id}"), "json", str)


@command.command("log")
@click.argument("endpoint_id", type=int)
@output_option
def endpoint_log(endpoint_id: int, output: str) -> None:
    """Show an endpoint's status log."""
    emit(client().request("GET", f"/v1/endpoint/{endpoint_id}/log"), output, _log_text)


def _list_text(endpoints: list[dict[str, Any]]) -> str:
    header = ("ID", "POLICY", "IDENTITY", "POD", "LABELS", "IPv6", "IPv4", "STATE")
    return table(header, [_row(endpoint) for endpoint in endpoints])


def _row(endpoint: dict[str, Any]) -> list[Any]:
    status = endpoint["status"]
    addressing = (status["networking"]["addressing"] or [{}])[0]
    labels = [label for label in status["labels"] if _NOISE not in label]
    return [
        endpoint["id"],
        status["policy"]["policy-enabled"],
        status["identity"]["id"],
        status["external-identifiers"]["pod-name"] or status["external-identifiers"]["container-id"][:12],
        "\n".join(labels),
        addressing.get("ipv6") or "",
        addressing.get("ipv4") or "",
        status["state"],
    ]


def _log_text(entries: list[dict[str, Any]]) -> str:
    import datetime

    rows = [
        (
            datetime.datetime.fromtimestamp(entry["time"]).isoformat(" ", "milliseconds"),
            entry["state"],
            entry["message"],
        )
        for entry in entries
    ]
    return table(("TIME", "STATE", "MESSAGE"), rows)
