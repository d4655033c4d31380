"""`ciliate plugins`: list, show, switch, check."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from ciliate.cli.common import client, emit, output_option, table

if TYPE_CHECKING:
    from ciliate.config import AgentConfig


@click.group()
def command() -> None:
    """Plugins: what is installed, what is chosen, whether it keeps its promises."""


@command.command("list")
@click.option("--kind", help="Only providers of this kind.")
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False), help="YAML file of the agent.")
@click.option("--agent", is_flag=True, help="Call active what the running agent uses, not what is configured.")
@output_option
def list_plugins(kind: str | None, config_file: str | None, agent: bool, output: str) -> None:
    """List every provider with its state. Imports no plugin and needs no agent."""
    known = _listing(config_file)
    records = [record for record in known if kind in (None, record["kind"])]
    if kind is not None and not records:
        kinds = ", ".join(sorted({record["kind"] for record in known}))
        raise click.UsageError(f"--kind: {kind!r} given, expected one of {kinds}")
    if agent:
        running = {(item["kind"], item["name"]) for item in client().request("GET", "/v1/plugins")}
        records = [_as_running(record, running) for record in records]
    emit(records, output, _text)


def _as_running(record: dict[str, str], running: set[tuple[str, str]]) -> dict[str, str]:
    if (record["kind"], record["name"]) in running:
        return {**record, "state": "active"}
    return {**record, "state": "available"} if record["state"] == "active" else record


def _configuration(config_file: str | None, flags: Mapping[str, str] = MappingProxyType({})) -> AgentConfig:
    import os
    from pathlib import Path

    from ciliate.config import ConfigError, load_config

    try:
        return load_config(flags, os.environ, None, Path(config_file) if config_file else None).config
    except ConfigError as error:
        click.echo(f"ciliate: {error}", err=True)
        sys.exit(2)


def _listing(config_file: str | None = None) -> list[dict[str, str]]:
    from ciliate.plugin.listing import static_listing

    config = _configuration(config_file)
    disabled = tuple(name.strip() for name in config.disabled_plugins.split(",") if name.strip())
    return static_listing(config.chosen_providers(), disabled, not config.no_third_party_plugins)


def _text(records: list[dict[str, str]]) -> str:
    rows = [
        (
            record["kind"],
            record["name"],
            record["state"],
            f"{record['distribution']} {record['version']}",
            record["reason"] or record["summary"],
        )
        for record in records
    ]
    return table(("KIND", "NAME", "STATE", "DISTRIBUTION", "SUMMARY"), rows)


@command.command("show")
@click.argument("name")
@output_option
def show(name: str, output: str) -> None:
    """Load the plugin or provider NAME and show its hooks and options."""
    from ciliate.plugin import PluginManager

    manager = PluginManager.load()
    found = [
        plugin
        for plugin in manager.plugins
        if name == plugin.name or any(provider.name == name for provider in plugin.providers)
    ]
    if not found:
        known = ", ".join(sorted(plugin.name for plugin in manager.plugins))
        click.echo(f"ciliate: plugin {name!r} is unknown; there are: {known}", err=True)
        sys.exit(1)
    emit([_described(plugin) for plugin in found], output, _show_text)


def _described(plugin: Any) -> dict[str, Any]:
    from ciliate.plugin.options import describe_options

    return {
        "plugin": plugin.name,
        "module": plugin.module,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "error": plugin.error,
        "providers": [
            {
                "kind": provider.kind,
                "name": provider.name,
                "summary": provider.summary,
                "options": describe_options(provider.options),
            }
            for provider in plugin.providers
        ],
    }


def _show_text(plugins: list[dict[str, Any]]) -> str:
    lines = []
    for plugin in plugins:
        lines.append(f"{plugin['plugin']}   {plugin['distribution']} {plugin['version']}   module {plugin['module']}")
        if plugin["error"]:
            lines.append(f"  broken: {plugin['error']}")
        for provider in plugin["providers"]:
            lines.append(f"  {provider['kind']}/{provider['name']}: {provider['summary']}")
            lines.extend(
                f"    option {item['name']} = {item['default']!r} ({item['type']})" for item in provider["options"]
            )
    return "\n".join(lines)


@command.command("switch")
@click.argument("kind")
@click.argument("name")
def switch(kind: str, name: str) -> None:
    """Let the running agent start provider NAME of KIND in place of the active one."""
    from ciliate.config import PROVIDER_OPTIONS, dashed

    active = client().request("POST", "/v1/plugins/switch", {"kind": kind, "name": name})
    rows = [(item["kind"], item["name"], item["distribution"]) for item in active]
    click.echo(table(("KIND", "ACTIVE", "DISTRIBUTION"), rows))
    option = dashed(PROVIDER_OPTIONS[kind])
    click.echo(f"The agent's next start goes by its configuration: set {option}={name} there to keep this.")


@command.command("check")
@click.argument("target")
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False), help="YAML file of the agent.")
@click.option("--kvstore", help="Store under an identity backend.")
@click.option("--kvstore-opt", help="Where a store's server is, as etcd.address=HOST:PORT,etcd.qps=0.")
@output_option
def check(target: str, config_file: str | None, kvstore: str | None, kvstore_opt: str | None, output: str) -> None:
    """Run the conformance kit on MODULE, or on the plugin or provider NAME; exit 1 where a case fails.

    A store that is a server is checked in a namespace of its own, which is emptied afterwards.
    """
    import asyncio

    from ciliate.plugin import PluginError
    from ciliate.plugin.conformance import check_target

    flags = {"kvstore": kvstore, "kvstore-opt": kvstore_opt}
    config = _configuration(config_file, {name: value for name, value in flags.items() if value is not None})
    try:
        report = asyncio.run(check_target(target, config))
    except PluginError as error:
        click.echo(f"ciliate: {error}", err=True)
        sys.exit(2)
    emit(report, output, _check_text)
    sys.exit(1 if any(item["state"] == "failed" for item in report) else 0)


def _check_text(report: list[dict[str, Any]]) -> str:
    rows = [(item["state"], f"{item['kind']}/{item['provider']}", item["case"], item["message"]) for item in report]
    failed = sum(item["state"] == "failed" for item in report)
    passed = sum(item["state"] == "passed" for item in report)
    return f"{table(('', 'PROVIDER', 'CASE', ''), rows)}\n{passed} passed, {failed} failed"
