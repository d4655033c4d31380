"""`ciliate-agent`: reads the configuration, runs the agent until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from ciliate.config import AgentConfig, ConfigError, load_config
from ciliate.plugin.loading import PluginSettings

log = logging.getLogger("ciliate.agent")
USAGE = """Usage: ciliate-agent [--config FILE] [--config-dir DIR] [--OPTION=VALUE ...]

Runs the agent of this node. `ciliate config show` lists every option with its value and where it comes from."""


class UsageError(Exception):
    """The command line is malformed; the text says where."""


def parse_arguments(arguments: list[str]) -> tuple[dict[str, str], Path | None, Path | None]:
    """Split ``--option=value``, ``--option value`` and ``--flag`` into options, config file and config directory."""
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or len(argument) == 2:
            raise UsageError(f"argument {argument!r}: expected --option=value")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        flags[name] = value
    file, directory = flags.pop("config", None), flags.pop("config-dir", None)
    return flags, Path(file) if file else None, Path(directory) if directory else None


def main() -> NoReturn:
    """Entry point. Exit codes: 0 told to end, 1 a part failed, 2 configuration or command line is wrong."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        sys.exit(0)
    try:
        flags, file, directory = parse_arguments(sys.argv[1:])
        result = load_config(flags, os.environ, directory, file)
    except UsageError as error:
        print(f"ciliate-agent: {error}\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    except ConfigError as error:
        print(f"ciliate-agent: {error}", file=sys.stderr)
        sys.exit(2)
    _configure_logging(result.config.debug)
    for warning in result.warnings:
        log.warning("%s", warning)
    sys.exit(run(result.config))


def run(config: AgentConfig) -> int:
    """Run one agent until SIGTERM or SIGINT; returns the exit code."""
    try:
        asyncio.run(_serve(config))
    except Exception as error:
        if config.debug:
            log.exception("the agent ends")
        log.error("the agent ends: %s: %s", type(error).__name__, error)
        return 1
    return 0


async def _serve(config: AgentConfig) -> None:
    from ciliate.agent.daemon import Agent
    from ciliate.plugin import PluginManager

    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    agent = Agent(config, PluginManager.load(plugin_settings(config)))
    await agent.start()
    log.info("ready: node %s, API on %s", config.node_name, config.socket_path)
    try:
        await ending.wait()
    finally:
        await agent.stop()


def plugin_settings(config: AgentConfig) -> PluginSettings:
    """What the configuration says of plugins."""
    disabled = tuple(name.strip() for name in config.disabled_plugins.split(",") if name.strip())
    return PluginSettings(disabled=disabled, prefer=config.preferences(), third_party=not config.no_third_party_plugins)


def _configure_logging(debug: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("pyroute2", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
