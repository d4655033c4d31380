"""`ciliate kvstore`: read and change keys, ask for health, move a node to another store."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ciliate.cli.common import client, emit, output_option, table

if TYPE_CHECKING:
    from ciliate.config import AgentConfig
    from ciliate.kvstore import Kvstore

T = TypeVar("T")


@click.group()
@click.option("--kvstore", help="Provider; default: what the running agent uses.")
@click.option("--kvstore-opt", help="Its options, as etcd.address=HOST:PORT,…")
@click.option("--config", "config_file", type=click.Path(exists=True, dir_okay=False), help="YAML file of the agent.")
@click.pass_context
def command(context: click.Context, kvstore: str | None, kvstore_opt: str | None, config_file: str | None) -> None:
    """The key-value store, asked directly: the agent is needed to find it, not to answer."""
    context.obj["store"] = {"kvstore": kvstore, "kvstore-opt": kvstore_opt, "config": config_file}


@command.command("get")
@click.argument("key")
@click.option("--recursive", is_flag=True, help="Every key that begins with KEY.")
@output_option
def get(key: str, recursive: bool, output: str) -> None:
    """Print the value of KEY; exit 1 where there is none."""

    async def read(store: Kvstore) -> list[Any]:
        if recursive:
            return [item async for page in store.pages(key) for item in page.items]
        item = await store.get(key)
        return [] if item is None else [item]

    items = _with_store(read)
    if not items:
        click.echo(f"ciliate: no key {'begins with' if recursive else ''} {key!r}".replace("  ", " "), err=True)
        sys.exit(1)
    records = [
        {
            "key": item.key,
            "value": item.value.decode(errors="replace"),
            "mod-revision": item.mod_revision,
            "lease": f"{item.lease:x}" if item.lease else "",
        }
        for item in items
    ]
    if not recursive and output == "text":
        click.echo(records[0]["value"])
        return
    emit(records, output, lambda found: table(("KEY", "VALUE"), [(item["key"], item["value"]) for item in found]))


@command.command("set")
@click.argument("key")
@click.argument("value")
def set_key(key: str, value: str) -> None:
    """Write KEY. For repairs: what agents wrote themselves they write again."""

    async def write(store: Kvstore) -> int:
        return await store.put(key, value.encode())

    click.echo(f"written with revision {_with_store(write)}")


@command.command("delete")
@click.argument("key")
@click.option("--recursive", is_flag=True, help="Every key that begins with KEY.")
def delete(key: str, recursive: bool) -> None:
    """Delete KEY; exit 1 where there is none. Keys in use come back: their owners write them again."""
    if not key:
        raise click.UsageError("KEY is empty: that would be everything")

    async def remove(store: Kvstore) -> int:
        return await store.delete_prefix(key) if recursive else int(await store.delete(key))

    count = _with_store(remove)
    click.echo(f"{count} keys deleted")
    sys.exit(0 if count else 1)


@command.command("status")
@output_option
def status(output: str) -> None:
    """Health of the store; exit 1 where it is not well."""

    async def ask(store: Kvstore) -> Any:
        return await store.status()

    answer = _with_store(ask)
    record = {"ok": answer.ok, "message": answer.message, "revision": answer.revision}
    emit(record, output, lambda found: str(found["message"]))
    sys.exit(0 if answer.ok else 1)


@command.command("migrate")
@click.option("--to", "target", required=True, metavar="PROVIDER", help="The store to move to.")
def migrate(target: str) -> None:
    """Move the running agent to another store, with the same identity numbers and without a lost packet.

    Keys are copied, the agent's parts begin to use the new store, what was written meanwhile is copied, and this node's
    own keys are written under a new lease. Where anything fails the old store stays in use. Options of the new store
    come from the agent's configuration and from --kvstore-opt.
    """
    from ciliate.config import store_options
    from ciliate.redaction import hide_secrets

    api, given = client(), click.get_current_context().obj["store"]["kvstore-opt"]
    try:
        options = store_options(given or "").get(target, {})
    except ValueError as error:
        raise click.UsageError(f"--kvstore-opt: {error}") from error
    before = _identities(api)
    api.request("POST", "/v1/plugins/switch", {"kind": "kvstore", "name": target, "options": options})
    after = _identities(api)
    changed = {labels: (number, after.get(labels)) for labels, number in before.items() if after.get(labels) != number}
    click.echo(f"the agent uses {target}; {len(before) - len(changed)} of {len(before)} identities have their numbers")
    setting = f" kvstore-opt={hide_secrets(given)}" if given else ""
    click.echo(f"The agent's next start goes by its configuration: set kvstore={target}{setting} there.")
    for labels, (old, new) in changed.items():
        click.echo(f"ciliate: identity {old} ({labels}) became {new or 'unknown'}", err=True)
    sys.exit(1 if changed else 0)


def _identities(api: Any) -> dict[str, int]:
    from ciliate.identity import is_assigned, is_local

    found = api.request("GET", "/v1/identity")
    return {
        " ".join(item["labels"]): item["id"]
        for item in found
        if not is_assigned(item["id"]) and not is_local(item["id"])
    }


def _with_store(work: Callable[[Kvstore], Awaitable[T]]) -> T:
    """Do something with the store; exit 3 where it cannot be used."""
    from ciliate.kvstore import KvstoreError
    from ciliate.plugin import PluginError

    config = _configuration()
    try:
        return asyncio.run(_run(config, work))
    except (KvstoreError, PluginError) as error:
        click.echo(f"ciliate: {error}", err=True)
        sys.exit(3)


async def _run(config: AgentConfig, work: Callable[[Kvstore], Awaitable[T]]) -> T:
    from ciliate.daemonize import plugin_settings
    from ciliate.plugin import PluginContext, PluginManager
    from ciliate.services import Services

    plugins = PluginManager.load(plugin_settings(config))
    with tempfile.TemporaryDirectory(prefix="ciliate-kvstore-") as run:
        context = PluginContext(config, None, Path(config.state_dir), Path(run), Services())
        store = await plugins.start("kvstore", config.kvstore, context)
        try:
            return await work(store)
        finally:
            await plugins.stop()


def _configuration() -> AgentConfig:
    """What the options say; without any, what the running agent uses, else what the environment says."""
    from ciliate import wire
    from ciliate.api_client import AgentUnavailable
    from ciliate.config import AgentConfig, ConfigError, load_config

    given = click.get_current_context().obj["store"]
    flags = {name: given[name] for name in ("kvstore", "kvstore-opt") if given[name]}
    if not flags and not given["config"]:
        try:
            running: AgentConfig = wire.convert(client().request("GET", "/v1/config?secrets=true"), AgentConfig)
            return running
        except AgentUnavailable as error:
            click.echo(f"ciliate: {error}; going by the environment", err=True)
    try:
        return load_config(flags, os.environ, None, Path(given["config"]) if given["config"] else None).config
    except ConfigError as error:
        click.echo(f"ciliate: {error}", err=True)
        sys.exit(2)
