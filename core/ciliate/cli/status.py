"""`ciliate status`: one screen, problems first, with what to do about each."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from ciliate.api_client import AgentUnavailable
from ciliate.cli.common import SECONDS, client, emit, output_option, table

_MARK = {"ok": "ok", "warning": "warn", "failure": "FAIL"}
_ORDER = ("failure", "warning", "ok")
_FEATURES = ("masquerade", "encryption", "monitor", "plugins")
_WHOLE = {"ok": "all is well", "warning": "works, but look at this", "failure": "something has failed"}


@click.command()
@click.option("--all-addresses", is_flag=True, help="Show every allocated address with its pod or other owner.")
@click.option("--all-controllers", is_flag=True, help="Show every background duty with its history.")
@click.option("--verbose", is_flag=True, help="All of that, and the maps.")
@click.option("--brief", is_flag=True, help="One word, for health checks.")
@click.option(
    "--wait", "wait_seconds", type=SECONDS, default=0.0, help="Wait up to this many seconds until all is well."
)
@output_option
def command(
    all_addresses: bool, all_controllers: bool, verbose: bool, brief: bool, wait_seconds: float, output: str
) -> None:
    """Health of the agent and of each of its parts; exit code 0 only where all is well, 3 where no agent answers."""
    status = _fetch(wait_seconds)
    if brief:
        click.echo("OK" if status["state"] == "ok" else status["state"].upper())
    else:
        sections = list(_sections(status, all_addresses or verbose, all_controllers or verbose, verbose))
        emit(status, output, lambda _: "\n\n".join(sections))
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


def _sections(status: dict[str, Any], addresses: bool, controllers: bool, maps: bool) -> Iterator[str]:
    yield f"Node {status['node']} of cluster {status['cluster']}: {_WHOLE[status['state']]}"
    yield _parts(status["parts"])
    yield _facts(status)
    if addresses:
        from ciliate.cli.ip import addresses_text

        yield addresses_text(status["addresses"])
    if controllers:
        yield _controllers(status["controllers"])
    if maps:
        from ciliate.cli.map import list_text

        yield list_text(status["maps"], False)


def _parts(parts: list[dict[str, Any]]) -> str:
    rows = []
    for part in sorted(parts, key=lambda part: _ORDER.index(part["state"])):
        rows.append((_MARK[part["state"]], part["name"], part["message"]))
        if part.get("remedy"):
            rows.append(("", "", f"-> {part['remedy']}"))
    return table(("", "PART", ""), rows)


def _facts(status: dict[str, Any]) -> str:
    features = status["features"]
    about = {
        "up": duration(status["uptime"]),
        "version": f"{status['version']}, kernel {status['kernel']}, JIT {features['jit']}, BTF {features['btf']}",
        "node": ", ".join(status["node-addresses"]) or "no address",
        "datapath": f"{features['mode']}; {features['families']}; loader {features['loader']}",
        "features": ", ".join(f"{name} {features[name]}" for name in _FEATURES),
    }
    width = max(map(len, about))
    return "\n".join(f"{name.ljust(width)}   {text}" for name, text in about.items())


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``5 min 6 s``: the two largest units that say something."""
    units: list[str] = []
    left = int(seconds)
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not units):
            units.append(f"{count} {name}")
    return " ".join(units[:2])


def _controllers(controllers: list[dict[str, Any]]) -> str:
    rows = [
        (
            item["name"],
            f"{item['interval']:g} s",
            item["success_count"],
            item["failure_count"],
            f"{duration(time.time() - item['last_success'])} ago" if item["last_success"] else "never",
            item["last_error"],
        )
        for item in controllers
    ]
    return table(("CONTROLLER", "EVERY", "WELL", "FAILED", "LAST WELL", "LAST ERROR"), rows)
