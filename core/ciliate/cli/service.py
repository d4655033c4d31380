"""`ciliate service`: list, get, update, delete."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """Services: what clients speak to, and the backends behind it."""


@command.command("list")
@output_option
def list_services(output: str) -> None:
    """List services with their backends."""
    emit(client().request("GET", "/v1/service")["services"], output, list_text)


@command.command("get")
@click.argument("number", type=int)
@output_option
def get_service(number: int, output: str) -> None:
    """Show one service by its id."""
    emit(client().request("GET", f"/v1/service/{number}"), output, lambda item: list_text([item]))


@command.command("update")
@click.option("--id", "number", type=click.IntRange(1), required=True, help="The service's id; a new one is made.")
@click.option("--frontend", required=True, metavar="ADDRESS:PORT", help="What clients speak to.")
@click.option("--protocol", type=click.Choice(["TCP", "UDP", "SCTP"]), default="TCP", show_default=True)
@click.option("--backends", default="", metavar="ADDRESS:PORT,…", help="The backends; none: clients are refused.")
@click.option("--affinity", type=click.IntRange(0), default=0, help="Seconds that a client stays with its backend.")
@click.option("--name", default="", help="NAMESPACE/NAME, for people.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["ClusterIP", "NodePort", "LoadBalancer", "ExternalIP"]),
    default="ClusterIP",
    show_default=True,
)
@click.option("--local", is_flag=True, help="From outside only backends of this node (externalTrafficPolicy: Local).")
@click.option("--source-range", "ranges", multiple=True, metavar="CIDR", help="From outside only these sources.")
@output_option
def update_service(number: int, frontend: str, protocol: str, backends: str, output: str, **fields: Any) -> None:
    """Make a service so."""
    ip, port = _place("--frontend", frontend)
    namespace, _, name = fields["name"].rpartition("/")
    places = [_place("--backends", text.strip()) for text in backends.split(",") if text.strip()]
    body = {
        "frontend-address": {"ip": ip, "port": port, "protocol": protocol},
        "backend-addresses": [{"ip": ip, "port": port} for ip, port in places],
        "session-affinity-timeout": fields["affinity"],
        "name": name,
        "namespace": namespace,
        "type": fields["kind"],
        "external-traffic-policy": "Local" if fields["local"] else "Cluster",
        "source-ranges": list(fields["ranges"]),
    }
    emit(client().request("PUT", f"/v1/service/{number}", body), output, lambda item: list_text([item]))


@command.command("apply")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def apply_services(files: tuple[Path, ...]) -> None:
    """Take in the Service, Endpoints and EndpointSlice manifests of these files, all or none."""
    from ciliate import manifest
    from ciliate.service.objects import KINDS

    try:
        documents = manifest.load(files)
    except manifest.ManifestError as error:
        click.echo(f"ciliate: {error}", err=True)
        sys.exit(2)
    found = [item.object for item in documents if item.object.get("kind") in KINDS]
    if not found:
        raise click.UsageError(f"{', '.join(map(str, files))}: no {', '.join(sorted(KINDS))} in there")
    done = client().request("PUT", "/v1/service-objects", {"objects": found})
    for text in done["left"]:
        click.echo(f"left out: {text}", err=True)
    click.echo(f"{len(found)} objects, {done['services']} services concerned")


@command.command("delete")
@click.argument("numbers", nargs=-1, type=int)
@click.option("--all", "everything", is_flag=True, help="Every service.")
def delete_services(numbers: tuple[int, ...], everything: bool) -> None:
    """Delete services by id."""
    if everything == bool(numbers):
        raise click.UsageError("give ids, or --all")
    if everything:
        count = client().request("DELETE", "/v1/service?all=true")["deleted"]
    else:
        wanted = dict.fromkeys(numbers)
        for number in wanted:
            client().request("GET", f"/v1/service/{number}")  # none is deleted where one is not there
        count = sum(client().request("DELETE", f"/v1/service/{number}")["deleted"] for number in wanted)
    click.echo(f"{count} services deleted")


def list_text(services: list[dict[str, Any]]) -> str:
    """The table of services."""
    header = ("ID", "NAME", "TYPE", "FRONTEND", "BACKENDS")
    return table(header, [_row(item["spec"]) for item in services]) if services else "no services"


def _row(spec: dict[str, Any]) -> tuple[Any, ...]:
    front = spec["frontend-address"]
    text = f"{_text(front)}/{front['protocol']}"
    backends = [f"{_text(item)}{_remark(item)}" for item in spec["backend-addresses"]]
    name = "/".join(part for part in (spec["namespace"], spec["name"]) if part)
    return spec["id"], name or "-", spec["type"], text, "\n".join(backends) or "none"


def _remark(item: dict[str, Any]) -> str:
    said = [word for word in ("local", "terminating") if item[word]]
    return f" ({', '.join(said)})" if said else ""


def _text(item: dict[str, Any]) -> str:
    return f"[{item['ip']}]:{item['port']}" if ":" in item["ip"] else f"{item['ip']}:{item['port']}"


def _place(option: str, text: str) -> tuple[str, int]:
    ip, _, port = text.rpartition(":")
    bare = ip.removeprefix("[").removesuffix("]")
    whole = ip == (f"[{bare}]" if ":" in bare else bare)
    if not whole or not bare or not (port.isascii() and port.isdigit() and len(port) < 6):
        raise click.UsageError(f"{option}: {text!r} given, expected ADDRESS:PORT, IPv6 addresses in brackets")
    return bare, int(port)
