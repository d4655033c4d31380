"""`ciliate policy`: import, get, delete, wait; simulate, validate and diff need no agent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from ciliate.api_client import ApiError
from ciliate.cli.common import SECONDS, client, emit, output_option, table

OFFLINE = {
    "diff": "Which flows change their verdict between two sets of policies",
    "simulate": "Answer scenario files from the policy engine alone",
    "validate": "List every mistake in policy files",
}


class _PolicyGroup(click.Group):
    """Adds the commands that need the policy engine but no agent, imported only when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *OFFLINE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OFFLINE:
            import ciliate.cli.policy_offline as policy_offline

            command: click.Command = getattr(policy_offline, cmd_name)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_PolicyGroup)
def command() -> None:
    """Network policies."""


@command.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, allow_dash=True))
def import_policies(files: tuple[str, ...]) -> None:
    """Import policies from files or folders; all or none. An object that is there already is replaced.

    Objects of other kinds, as rendered charts have them, are left alone and named.

    Exit code 1 also where an endpoint has to keep its older policy because the new one has too many map entries.
    """
    import msgspec

    from ciliate import manifest

    try:
        documents = manifest.load([Path(file) for file in files])
    except manifest.ManifestError as error:
        click.echo(f"ciliate: {error}", err=True)
        sys.exit(2)
    body = {"documents": [msgspec.to_builtins(document) for document in documents]}
    answer = client().request("PUT", "/v1/policy", body)
    click.echo(
        f"Revision: {answer['revision']}   added {answer['added']}, replaced {answer['replaced']}, "
        f"unchanged {answer['unchanged']}"
    )
    for text in answer["warnings"]:
        click.echo(f"ciliate: warning: {text}", err=True)
    for text in answer.get("left", []):
        click.echo(f"ciliate: left alone: {text}", err=True)
    _tell_refused(answer)


def _tell_refused(answer: dict[str, Any]) -> None:
    """Name the endpoints that keep an older policy, and end with 1 where there are any."""
    for item in answer["refused"]:
        click.echo(f"ciliate: endpoint {item['endpoint']} ({item['pod']}): {item['reason']}", err=True)
    if answer["refused"]:
        sys.exit(1)


def _what(names: tuple[str, ...], labels: tuple[str, ...]) -> list[tuple[str, str]]:
    """Names and labels as parameters of a query. No name has a colon or an equals sign, so labels need no option."""
    given = [("label" if ":" in text or "=" in text else "name", text) for text in names]
    found = [*given, *(("label", text) for text in labels)]
    if len({kind for kind, _ in found}) > 1:
        raise click.UsageError("give either names or labels")
    return found


_LABELS = click.option(
    "-l", "--label", "labels", multiple=True, help="[SOURCE:]KEY[=VALUE], of a rule; may be repeated."
)


@command.command("get")
@click.argument("names", nargs=-1, metavar="[NAMES|LABELS]...")
@_LABELS
@output_option
def get_policies(names: tuple[str, ...], labels: tuple[str, ...], output: str) -> None:
    """Show the policies that are in force: all, those called [NAMESPACE/]NAME, or the rules that carry every label.

    Words with a colon or an equals sign are labels. Exit code 1 where nothing is found.
    """
    query = urlencode(_what(names, labels))
    emit(client().request("GET", f"/v1/policy?{query}" if query else "/v1/policy"), output, _text)


@command.command("delete")
@click.argument("names", nargs=-1, metavar="[NAMES|LABELS]...")
@_LABELS
@click.option("--all", "everything", is_flag=True, help="Delete every policy.")
def delete_policies(names: tuple[str, ...], labels: tuple[str, ...], everything: bool) -> None:
    """Delete policies by NAMESPACE/NAME (or NAME, in every namespace), rules by labels, or everything.

    Words with a colon or an equals sign are labels: the rules that carry every one of them go, and an object keeps its
    others. Every policy has io.cilium.k8s.policy.name, .namespace and .derived-from, too.
    """
    what = _what(names, labels)
    if bool(what) == everything:
        raise click.UsageError("give names, labels or --all")
    query = urlencode(what or [("all", "true")])
    answer = client().request("DELETE", f"/v1/policy?{query}")
    click.echo(f"Revision: {answer['revision']}   deleted {answer['deleted']}")
    _tell_refused(answer)


@command.command("wait")
@click.argument("revision", type=click.IntRange(0))
@click.option("--max-wait-time", type=SECONDS, default=360.0, show_default=True, help="Seconds to wait at most.")
def wait(revision: int, max_wait_time: float) -> None:
    """Wait until every endpoint has realised a policy revision."""
    query = urlencode({"revision": revision, "timeout": max_wait_time})
    answer = client().request("GET", f"/v1/policy/wait?{query}", wait=max_wait_time)
    click.echo(f"Revision: {answer['revision']}")


@command.command("counters")
@click.option("--endpoint", type=int, help="Only this endpoint id.")
@output_option
def counters(endpoint: int | None, output: str) -> None:
    """Packets and bytes that each entry of the kernel's policy map met, with the rule that it comes from."""
    query = f"?endpoint={endpoint}" if endpoint is not None else ""
    emit(client().request("GET", f"/v1/policy/counters{query}"), output, _counters_text)


def _counters_text(rows: list[dict[str, Any]]) -> str:
    header = ("ENDPOINT", "POD", "DIRECTION", "IDENTITY", "PLACE", "PORT", "VERDICT", "PACKETS", "BYTES", "RULE")
    cells = [
        (
            *(item["endpoint"], item["pod"], item["direction"], item["identity"] or "any", item["place"]),
            *(f"{item['port']}/{item['protocol']}", item["verdict"], item["packets"], item["bytes"], item["rule"]),
        )
        for item in rows
    ]
    return table(header, cells) if rows else "no entries: no endpoint is isolated"


@command.command("trace")
@click.option("-s", "--src", "source_labels", multiple=True, metavar="LABEL", help="Source by a label.")
@click.option("-d", "--dst", "destination_labels", multiple=True, metavar="LABEL", help="Destination by a label.")
@click.option("--src-k8s-pod", metavar="NAMESPACE/NAME", help="Source by pod.")
@click.option("--dst-k8s-pod", metavar="NAMESPACE/NAME", help="Destination by pod.")
@click.option("--src-endpoint", type=int, help="Source by endpoint id.")
@click.option("--dst-endpoint", type=int, help="Destination by endpoint id.")
@click.option("--src-identity", type=int, help="Source by identity.")
@click.option("--dst-identity", type=int, help="Destination by identity.")
@click.option(
    "--dport",
    "ports",
    multiple=True,
    metavar="PORT[/PROTOCOL]",
    help="Destination port by number or name, such as 80/TCP, http, 53 (TCP and UDP), ICMP, 3/ICMP; may be repeated.",
)
@click.option("-v", "--verbose", is_flag=True, help="Also show every section, and the rules that select neither end.")
@output_option
def trace(
    source_labels: tuple[str, ...],
    destination_labels: tuple[str, ...],
    ports: tuple[str, ...],
    verbose: bool,
    output: str,
    **ends: Any,
) -> None:
    """Explain rule by rule why a flow is allowed or denied, by the policies in force.

    Shows egress of the source and ingress of the destination; without --dport, what all traffic between them meets.
    Labels without a source are Kubernetes labels; a pod's own also need -s io.kubernetes.pod.namespace=NAMESPACE.

    Exit code 0 where everything that was asked is allowed, 1 where any of it is denied or an end is not known, 2 for
    wrong options, 3 where no agent answers.
    """
    query = [
        ("from", _end("src", source_labels, ends)),
        ("to", _end("dst", destination_labels, ends)),
        *(("port", port) for port in ports),
        *([("verbose", "true")] if verbose else []),
    ]
    found = _resolved(query)
    emit(found, output, lambda value: "\n\n".join("\n".join(item["lines"]) for item in value["traces"]))
    sys.exit(0 if found["verdict"] == "allow" else 1)


def _resolved(query: list[tuple[str, str]]) -> Any:
    try:
        return client().request("GET", f"/v1/policy/resolve?{urlencode(query)}")
    except ApiError as error:
        if error.status != 400:
            raise
        raise click.UsageError(str(error)) from error  # not a denied flow, which is exit code 1


def _end(side: str, labels: tuple[str, ...], ends: dict[str, Any]) -> str:
    """One end of a flow as the API wants it; a usage error where it is given not at all or in several ways."""
    ways = {"pod": ends[f"{side}_k8s_pod"], "endpoint": ends[f"{side}_endpoint"], "identity": ends[f"{side}_identity"]}
    given = [f"{kind}:{value}" for kind, value in ways.items() if value is not None]
    if labels:
        given.append(f"labels:{','.join(labels)}")
    if len(given) != 1:
        names = f"--{side}, --{side}-k8s-pod, --{side}-endpoint, --{side}-identity"
        raise click.UsageError(f"{len(given)} ways given to say one end, expected exactly one of {names}")
    return given[0]


def _text(policy: dict[str, Any]) -> str:
    rows = [
        (item["kind"], item["namespace"] or "-", item["name"], item["rules"], item["origin"])
        for item in policy["policies"]
    ]
    listing = table(("KIND", "NAMESPACE", "NAME", "RULES", "FROM"), rows)
    documents = "\n".join(json.dumps(item["object"], indent=2) for item in policy["policies"])
    return "\n".join(part for part in (listing, documents, f"Revision: {policy['revision']}") if part)
