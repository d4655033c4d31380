"""`ciliate bpf`: the datapath's maps straight from the kernel; no agent is needed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ciliate.cli.bpf_lb import group as lb_group
from ciliate.cli.bpf_nat import nat_group
from ciliate.cli.common import client, emit, output_option, table

Rows = list[dict[str, Any]]


@click.group()
@click.option("--bpf-root", default="/sys/fs/bpf", show_default=True, help="Where the BPF file system is.")
@click.option("--instance", default="default", show_default=True, help="The agent's instance name.")
@click.pass_context
def command(ctx: click.Context, bpf_root: str, instance: str) -> None:
    """Read the datapath's maps straight from the kernel."""
    ctx.meta["pins"] = Path(bpf_root) / "ciliate" / instance


def _show(output: str, names: tuple[str, ...], read: Callable[..., Rows]) -> None:
    from ciliate.datapath.bpf import Map
    from ciliate.datapath.errors import DatapathError
    from ciliate.datapath.mapversions import require_current

    pins = click.get_current_context().meta["pins"]
    maps = []
    try:
        maps = [Map.open(pins / name) for name in names]
        for table in maps:
            require_current(table)
        emit(read(*maps), output, _text)
    except DatapathError as error:
        click.echo(f"ciliate: {error.strerror or error}", err=True)
        sys.exit(1)
    finally:
        for item in maps:
            item.close()


def _text(rows: Rows) -> str:
    if not rows:
        return "no entries"
    return table([name.upper() for name in rows[0]], [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


command.add_command(lb_group, "lb")


@command.group("endpoint")
def endpoint_group() -> None:
    """Endpoints as the programs see them."""


@endpoint_group.command("list")
@output_option
def list_endpoints(output: str) -> None:
    """List valid endpoints."""
    _show(output, ("ciliate_lxc", "ciliate_ep"), _endpoints)


def _endpoints(lxc: Any, ep: Any) -> Rows:
    from ciliate.datapath import layout

    rows = []
    for key, value in lxc.items():
        ifindex, identity, number, _, mac, node_mac = layout.ENDPOINT_INFO.unpack(value)
        config = ep.lookup(number.to_bytes(4, "little"))
        flags = layout.EP_CONFIG.unpack(config)[7] if config else 0
        enforced = [
            name
            for name, bit in (("ingress", layout.EP_ENFORCE_INGRESS), ("egress", layout.EP_ENFORCE_EGRESS))
            if flags & bit
        ]
        rows.append(
            {
                "address": str(layout.endpoint_address(key)),
                "endpoint": number,
                "identity": identity,
                "ifindex": ifindex,
                "mac": mac.hex(":"),
                "node-mac": node_mac.hex(":"),
                "valid": bool(flags & layout.EP_VALID),
                "enforced": enforced,
            }
        )
    return sorted(rows, key=lambda row: (row["endpoint"], row["address"]))


@command.group("template")
def template_group() -> None:
    """Compiled programs and the endpoints that run them; asks the agent."""


@template_group.command("list")
@output_option
def list_templates(output: str) -> None:
    """List every template with its endpoints; "-" where none runs it."""
    emit(client().request("GET", "/v1/templates"), output, _templates)


def _templates(found: Rows) -> str:
    rows = [(item["sha"], item["source"], ", ".join(map(str, item["endpoints"])) or "-") for item in found]
    return table(("DATAPATH SHA", "SOURCE", "ENDPOINT(S)"), rows)


@template_group.command("get")
@click.argument("sha")
@output_option
def get_template(sha: str, output: str) -> None:
    """Show what a template was compiled from; SHA may be shortened."""
    found = [item for item in client().request("GET", "/v1/templates") if item["sha"].startswith(sha)]
    if len(found) != 1:
        click.echo(f"ciliate: sha {sha!r}: {len(found)} templates begin so, expected one", err=True)
        sys.exit(1)
    emit(found[0], output, lambda item: "\n".join(f"{name}: {_cell(value)}" for name, value in item.items()))


@command.group("ipcache")
def ipcache_group() -> None:
    """Which identity is behind an address."""


@ipcache_group.command("list")
@output_option
def list_ipcache(output: str) -> None:
    """List every prefix."""
    _show(output, ("ciliate_ipcache",), _ipcache)


def _ipcache(ipcache: Any) -> Rows:
    from ciliate.datapath import layout

    entries = [(layout.ipcache_prefix(key), layout.ipcache_entry_of(value)) for key, value in ipcache.items()]
    entries.sort(key=lambda entry: (entry[0].version, entry[0].network_address.packed, entry[0].prefixlen))
    return [
        {"prefix": str(prefix), "identity": entry.identity, "node": str(entry.node or ""), "key": entry.key}
        for prefix, entry in entries
    ]


@command.group("tunnel")
def tunnel_group() -> None:
    """Pod ranges of other nodes, and where they are tunnelled to."""


@tunnel_group.command("list")
@output_option
def list_tunnels(output: str) -> None:
    """List every range; addresses that the ipcache knows have their node there."""
    _show(output, ("ciliate_tunnel",), _tunnels)


def _tunnels(tunnels: Any) -> Rows:
    from ciliate.datapath import layout

    entries = [(layout.ipcache_prefix(key), *layout.tunnel_entry_of(value)) for key, value in tunnels.items()]
    entries.sort(key=lambda entry: (entry[0].version, entry[0].network_address.packed, entry[0].prefixlen))
    return [{"prefix": str(prefix), "node": str(node), "key": key} for prefix, node, key in entries]


@command.group("policy")
def policy_group() -> None:
    """Policy entries with their counters."""


@policy_group.command("list")
@click.option("--endpoint", type=int, help="Only this endpoint id.")
@output_option
def list_policy(endpoint: int | None, output: str) -> None:
    """List the entries of every endpoint, or of one."""
    _show(output, ("ciliate_policy", "ciliate_place"), lambda policy, places: _policy(policy, places, endpoint))


def _policy(policy: Any, places: Any, only: int | None) -> Rows:
    from ciliate.datapath import layout
    from ciliate.datapath.reasons import DIRECTIONS, protocol_name

    rows = []
    prefixes = {layout.place_entry_of(value): str(layout.ipcache_prefix(key)) for key, value in places.items()}
    for data, value in policy.items():
        endpoint, key = layout.policy_key_of(data)
        if only not in (None, endpoint):
            continue
        entry, packets, size = layout.policy_entry_of(value)
        last = key.port + (1 << (16 - key.prefix)) - 1
        port = "any" if not key.prefix else str(key.port) if key.prefix == 16 else f"{key.port}-{last}"
        rows.append(
            {
                "endpoint": endpoint,
                "direction": DIRECTIONS[key.direction],
                "identity": key.identity or "any",
                "place": prefixes.get(key.place, key.place) if key.place else "any",
                "protocol": protocol_name(key.proto) if key.proto else "any",
                "port": port,
                "verdict": entry.verdict.name.lower(),
                "rule": entry.rule,
                "packets": packets,
                "bytes": size,
            }
        )
    return sorted(rows, key=lambda row: (row["endpoint"], row["direction"], str(row["identity"]), row["port"]))


@command.group("metrics")
def metrics_group() -> None:
    """Packets that went on and packets that were dropped, by reason."""


@metrics_group.command("list")
@output_option
def list_metrics(output: str) -> None:
    """List the counters."""
    _show(output, ("ciliate_metrics",), _metrics)


def _metrics(metrics: Any) -> Rows:
    from ciliate.datapath.node import read_metrics
    from ciliate.datapath.reasons import DIRECTIONS, reason_text

    return [
        {
            "reason": reason_text(reason),
            "number": reason,
            "direction": DIRECTIONS[way],
            "packets": packets,
            "bytes": size,
        }
        for (reason, way), (packets, size) in sorted(read_metrics(metrics).items())
    ]


@command.group("ct")
def conntrack_group() -> None:
    """Tracked flows."""


@conntrack_group.command("list")
@click.option("--endpoint", type=int, help="Only flows of this endpoint id.")
@output_option
def list_conntrack(endpoint: int | None, output: str) -> None:
    """List every flow, as its initiator sees it."""
    from ciliate.datapath.conntrack import MAPS

    _show(output, MAPS, lambda *maps: _conntrack(maps, endpoint))


def _conntrack(maps: Any, only: int | None) -> Rows:
    from ciliate.datapath.conntrack import entries
    from ciliate.datapath.reasons import DIRECTIONS, protocol_name

    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    return [
        {
            "protocol": protocol_name(flow.proto),
            "source": f"{flow.source} {flow.source_port}",
            "destination": f"{flow.destination} {flow.destination_port}",
            "endpoint": flow.endpoint,
            "direction": DIRECTIONS[flow.direction],
            "expires": round(flow.lifetime - now),
            "sent": flow.tx_packets,
            "answered": flow.rx_packets,
            "peer-identity": flow.peer_identity,
            "rule": flow.rule,
        }
        for flow in entries(maps)
        if only in (None, flow.endpoint)
    ]


@conntrack_group.command("flush")
@click.option("--endpoint", type=int, help="Only flows of this endpoint id.")
@output_option
def flush_conntrack(endpoint: int | None, output: str) -> None:
    """Forget flows: open connections have to pass policy anew."""
    from ciliate.datapath.conntrack import MAPS, flush

    def run(*maps: Any) -> Rows:
        sweep = flush(maps, lambda flow: endpoint in (None, flow.endpoint))
        return [{"seen": sweep.seen, "removed": sweep.removed}]

    _show(output, MAPS, run)


command.add_command(nat_group)


@command.command("features")
@output_option
def list_features(output: str) -> None:
    """Ask this kernel what it has of what the datapath needs, and which build of the programs it gets.

    Exit code 1 where something is missing without which the datapath does not work.
    """
    from ciliate.datapath.errors import DatapathError
    from ciliate.datapath.kernel import missing, probed

    try:
        found = probed()
        lacking = missing(found)
        emit(_features(found, lacking), output, _features_text)
    except DatapathError as error:
        click.echo(f"ciliate: {error.strerror or error}", err=True)
        sys.exit(1)
    if lacking:
        sys.exit(1)


def _features(found: dict[str, bool], lacking: list[str]) -> dict[str, Any]:
    from ciliate.datapath.kernel import FEATURES, choose, minimum

    build = choose("auto", found)
    rows = [
        {"feature": item.name, "available": found[item.name], "since": item.since, "needed": item.needed}
        | {"purpose": item.purpose}
        for item in FEATURES
    ]
    return {
        "kernel": os.uname().release,
        "minimum": minimum(),
        "build": None if lacking else build.name,
        "reason": f"missing: {', '.join(lacking)}" if lacking else build.reason,
        "features": rows,
    }


def _features_text(shown: dict[str, Any]) -> str:
    rows = [
        [
            item["feature"],
            *(("no", "yes")[item[key]] for key in ("available", "needed")),
            item["since"],
            item["purpose"],
        ]
        for item in shown["features"]
    ]
    build = f"build {shown['build']}: {shown['reason']}" if shown["build"] else f"no build: {shown['reason']}"
    head = f"kernel {shown['kernel']}; the datapath needs Linux {shown['minimum']} or newer"
    return "\n".join([head, build, "", table(["FEATURE", "AVAILABLE", "NEEDED", "SINCE LINUX", "FOR"], rows)])
