"""`ciliate endpoint`: list, get, config, labels, log, health, regenerate, disconnect."""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.parse import quote, urlencode

import click

from ciliate.cli.common import client, emit, output_option, table

_NOISE = "io.cilium.k8s."
_NAME = "An id, or container-id:ID, pod-name:NAMESPACE/NAME, ipv4:ADDRESS, ipv6:ADDRESS."
_HEALTH = ("overallHealth", "bpf", "policy")


_SPELT = {
    **dict.fromkeys(("enabled", "enable", "true", "on"), "Enabled"),
    **dict.fromkeys(("disabled", "disable", "false", "off"), "Disabled"),
    "default": "Default",
}
"""How people write values of options."""


@click.group(epilog=f"ENDPOINT is how one is named. {_NAME}")
def command() -> None:
    """Endpoints of this node."""


def _path(endpoint: str, *rest: str) -> str:
    return "/".join(("/v1/endpoint", quote(endpoint, safe=""), *rest))


@command.command("list")
@click.option("-l", "--label", "labels", multiple=True, help="Only those with this label, [source:]key[=value].")
@click.option("--no-headers", is_flag=True, help="Leave the line of titles out.")
@output_option
def list_endpoints(labels: tuple[str, ...], no_headers: bool, output: str) -> None:
    """List the endpoints with identity, policy enforcement and addresses; exit 1 where no endpoint has the labels."""
    query = f"?{urlencode([('labels', label) for label in labels])}" if labels else ""
    emit(client().request("GET", f"/v1/endpoint{query}"), output, lambda found: _list_text(found, no_headers))


@command.command("get")
@click.argument("endpoint", required=False)
@click.option("-l", "--label", "labels", multiple=True, help="Those with this label, instead of ENDPOINT.")
def get_endpoint(endpoint: str | None, labels: tuple[str, ...]) -> None:
    """Show one endpoint, or those with labels, as JSON."""
    if bool(endpoint) == bool(labels):
        raise click.UsageError("give either ENDPOINT or --label")
    path = _path(endpoint) if endpoint else f"/v1/endpoint?{urlencode([('labels', label) for label in labels])}"
    emit(client().request("GET", path), "json", str)


@command.command("config")
@click.argument("endpoint")
@click.argument("options", nargs=-1, metavar="[OPTION=VALUE]...")
@output_option
def endpoint_config(endpoint: str, options: tuple[str, ...], output: str) -> None:
    """Show the options that hold for an endpoint, or change some: DropNotification, TraceNotification (Enabled or
    Disabled), MonitorAggregationLevel (none, low, medium, maximum). Default is as the node's again."""
    path = _path(endpoint, "config")
    if not options:
        emit(client().request("GET", path), output, _config_text)
        return
    if wrong := [option for option in options if "=" not in option]:
        raise click.UsageError(f"{wrong[0]!r} given, expected OPTION=VALUE")
    pairs = (option.split("=", 1) for option in options)
    changes = {name: _SPELT.get(value.lower(), value) for name, value in pairs}
    emit(client().request("PATCH", path, {"options": changes}), output, _config_text)


@command.command("labels")
@click.argument("endpoint")
@click.option("-a", "--add", multiple=True, metavar="LABEL", help="Add [source:]key[=value].")
@click.option("-d", "--delete", multiple=True, metavar="LABEL", help="Delete a label; an orchestrator's is disabled.")
@output_option
def endpoint_labels(endpoint: str, add: tuple[str, ...], delete: tuple[str, ...], output: str) -> None:
    """Show or change an endpoint's labels; when this returns the endpoint has the identity of its labels."""
    path = _path(endpoint, "labels")
    if add or delete:
        answer = client().request("PATCH", path, {"add": list(add), "delete": list(delete)})
    else:
        answer = client().request("GET", path)
    emit(answer, output, _labels_text)


@command.command("log")
@click.argument("endpoint")
@output_option
def endpoint_log(endpoint: str, output: str) -> None:
    """Show an endpoint's status log, the oldest entry first."""
    emit(client().request("GET", _path(endpoint, "log")), output, _log_text)


@command.command("health")
@click.argument("endpoint")
@output_option
def endpoint_health(endpoint: str, output: str) -> None:
    """Show an endpoint's health; exit code 0 only where it is well."""
    health = client().request("GET", _path(endpoint, "healthz"))
    emit(health, output, _health_text)
    sys.exit(0 if health["overallHealth"] == "OK" else 1)


@command.command("regenerate")
@click.argument("endpoints", nargs=-1, required=True, metavar="ENDPOINT...")
def regenerate(endpoints: tuple[str, ...]) -> None:
    """Write policy, entries and filters of endpoints anew."""
    for endpoint in endpoints:
        client().request("PATCH", _path(endpoint, "config"), {})
        click.echo(f"endpoint {endpoint}: regenerated")


@command.command("disconnect")
@click.argument("endpoint")
def disconnect(endpoint: str) -> None:
    """Take the network from an endpoint. The runtime's DEL still removes its device and frees its addresses."""
    problems = client().request("DELETE", _path(endpoint))["problems"]
    for problem in problems:
        click.echo(f"ciliate: {problem}", err=True)
    click.echo(f"endpoint {endpoint}: disconnected")
    sys.exit(1 if problems else 0)


def _list_text(endpoints: list[dict[str, Any]], no_headers: bool) -> str:
    header = ("ID", "POLICY", "IDENTITY", "POD", "LABELS", "IPv6", "IPv4", "STATE")
    text = table(header, [_row(endpoint) for endpoint in endpoints])
    return text.partition("\n")[2] if no_headers else text


def _row(endpoint: dict[str, Any]) -> list[Any]:
    status = endpoint["status"]
    addressing = (status["networking"]["addressing"] or [{}])[0]
    labels = [label for label in status["labels"] if _NOISE not in label]
    health = status.get("health", {}).get("overallHealth", "OK")
    return [
        endpoint["id"],
        status["policy"]["policy-enabled"],
        status["identity"]["id"],
        status["external-identifiers"]["pod-name"] or status["external-identifiers"]["container-id"][:12],
        "\n".join(labels),
        addressing.get("ipv6") or "",
        addressing.get("ipv4") or "",
        status["state"] if health in ("OK", "Pending", "Bootstrap") else f"{status['state']} ({health})",
    ]


def _config_text(config: dict[str, Any]) -> str:
    own, found = config["own"], config["realized"]["options"]
    rows = [(name, value, "its own" if name in own else "as the node") for name, value in found.items()]
    rows += [(name, value, "fixed") for name, value in config["immutable"].items()]
    return table(("OPTION", "VALUE", ""), rows)


def _labels_text(labels: dict[str, Any]) -> str:
    status = labels["status"]
    user = set(status["realized"]["user"])
    rows = [("identity", label, "of a user" if label in user else "") for label in status["security-relevant"]]
    rows += [("information", label, "the label filter leaves it out") for label in status["derived"]]
    rows += [("disabled", label, "by a user") for label in status["disabled"]]
    return table(("KIND", "LABEL", ""), rows)


def _health_text(health: dict[str, Any]) -> str:
    rows = [(name.removesuffix("Health"), health[name]) for name in _HEALTH]
    rows.append(("connected", json.dumps(health["connected"])))
    return "\n".join([table(("PART", "HEALTH"), rows), *([health["message"]] if health["message"] else [])])


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
