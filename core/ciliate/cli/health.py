"""`ciliate health`: is everything well, part by part and endpoint by endpoint."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from ciliate.cli.common import client, emit, output_option, table


@click.group()
def command() -> None:
    """Health of the agent, its parts and its endpoints."""


@command.command("status")
@click.option("--succinct", is_flag=True, help="Only what is not well.")
@click.option("--probe", is_flag=True, help="Probe every node now instead of showing what the last probes found.")
@output_option
def status(succinct: bool, probe: bool, output: str) -> None:
    """Show the health of every part, endpoint and node; exit code 0 only where all are well."""
    nodes = client().request("PUT", "/v1/health/probe") if probe else client().request("GET", "/v1/health")
    found = _collect() + [_node(node) for node in nodes["nodes"]]
    well = all(row["ok"] for row in found)
    if succinct:
        found = [row for row in found if not row["ok"]]
    emit(found, output, _text)
    sys.exit(0 if well else 1)


@command.command("ping")
@click.option("-c", "--count", type=click.IntRange(1), default=1, show_default=True, help="How often to ask.")
def ping(count: int) -> None:
    """Ask the agent for its state and measure how long it takes; exit code 1 where a part of it has failed."""
    failed = False
    for _ in range(count):
        begin = time.perf_counter()
        state = client().request("GET", "/v1/healthz?detail=true")["state"]
        click.echo(f"{state} in {1000 * (time.perf_counter() - begin):.1f} ms")
        failed = failed or state == "failure"
    sys.exit(1 if failed else 0)


def _collect() -> list[dict[str, Any]]:
    parts = client().request("GET", "/v1/healthz?detail=true")["parts"]
    rows = [
        {"what": part["name"], "ok": part["state"] == "ok", "health": part["state"], "message": part["message"]}
        for part in parts
    ]
    return rows + [_endpoint(endpoint) for endpoint in client().request("GET", "/v1/endpoint")]


def _node(node: dict[str, Any]) -> dict[str, Any]:
    ways = "; ".join(_way(path) for path in node["paths"])
    return {
        "what": f"node {node['name']}" + (" (this node)" if node["local"] else ""),
        "ok": node["reachable"],
        "health": "ok" if node["reachable"] else "failure",
        "message": node["problem"] or ways,
        "node": node,
    }


def _way(path: dict[str, Any]) -> str:
    latencies = [path["icmp"]["latency"]] + ([path["http"]["latency"]] if path["http"] else [])
    return f"{path['kind']} {path['address']} " + ", ".join(f"{latency * 1e3:.2f} ms" for latency in latencies)


def _endpoint(endpoint: dict[str, Any]) -> dict[str, Any]:
    found = endpoint["status"]
    health, pod = found["health"], found["external-identifiers"]["pod-name"]
    return {
        "what": f"endpoint {endpoint['id']}" + (f" ({pod})" if pod else ""),
        "ok": health["overallHealth"] == "OK",
        "health": health["overallHealth"].lower(),
        "message": health["message"] or f"bpf {health['bpf']}, policy {health['policy']}",
    }


def _text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "all is well"
    return table(("WHAT", "HEALTH", ""), [(row["what"], row["health"], row["message"]) for row in rows])
