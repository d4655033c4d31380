"""What our daemons have in common: the command line, logging, signals, exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

from ciliate import __version__
from ciliate.allocator import keep_little
from ciliate.config import AgentConfig, ConfigError, load_config
from ciliate.plugin import PluginManager
from ciliate.plugin.loading import PluginSettings
from ciliate.redaction import hide_secrets, shown

log = logging.getLogger("ciliate")


FILES = ("config", "config-dir")
"""Options that say where options are."""


class UsageError(Exception):
    """The command line is malformed; the text says where."""


class Daemon(Protocol):
    """Something that runs until it is told to end."""

    async def start(self) -> None:
        """Return when it is ready."""

    async def stop(self) -> None:
        """End."""


def parse_arguments(arguments: list[str]) -> tuple[dict[str, str], Path | None, Path | None]:
    """Split ``--option=value``, ``--option value`` and ``--flag`` into options, config file and config directory."""
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or len(argument) == 2:
            name, equals, value = argument.partition("=")
            told = f"{name}={shown(name, value)}" if equals else hide_secrets(argument)
            raise UsageError(f"argument {told!r}: expected --option=value")
        name, equals, value = argument[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and name in FILES:
            raise UsageError(f"argument --{name}: expected a path behind it")
        elif not equals:
            value = "true"
        flags[name] = value
    file, directory = flags.pop("config", None), flags.pop("config-dir", None)
    return flags, Path(file) if file else None, Path(directory) if directory else None


def run_daemon(name: str, usage: str, make: Callable[[AgentConfig, PluginManager], Daemon]) -> NoReturn:
    """Run until SIGTERM or SIGINT. Exit codes: 0 told to end, 1 a part failed, 2 configuration or usage is wrong."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage)
        sys.exit(0)
    if "--version" in sys.argv[1:]:
        print(f"{name} {__version__}")
        sys.exit(0)
    try:
        flags, file, directory = parse_arguments(sys.argv[1:])
        result = load_config(flags, os.environ, directory, file)
    except UsageError as error:
        print(f"{name}: {error}\n\n{usage}", file=sys.stderr)
        sys.exit(2)
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    _configure_logging(result.config.debug)
    keep_little()
    allow_open_files()
    for warning in result.warnings:
        log.warning("%s", warning)
    sys.exit(_run(name, result.config, make))


def allow_open_files() -> None:
    """As many open files as the kernel lets us have: clients that stay connected must not keep pods from starting."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(name: str, config: AgentConfig, make: Callable[[AgentConfig, PluginManager], Daemon]) -> int:
    try:
        asyncio.run(_serve(config, make))
    except Exception as error:
        if config.debug:
            log.exception("%s ends", name)
        log.error("%s ends: %s: %s", name, type(error).__name__, error)
        return 1
    return 0


async def _serve(config: AgentConfig, make: Callable[[AgentConfig, PluginManager], Daemon]) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    daemon = make(config, PluginManager.load(plugin_settings(config)))
    await daemon.start()
    log.info("ready: node %s", config.node_name)
    try:
        await ending.wait()
    finally:
        await daemon.stop()


def plugin_settings(config: AgentConfig) -> PluginSettings:
    """What the configuration says of plugins."""
    disabled = tuple(name.strip() for name in config.disabled_plugins.split(",") if name.strip())
    return PluginSettings(disabled=disabled, prefer=config.preferences(), third_party=not config.no_third_party_plugins)


def set_log_level(debug: bool) -> None:
    """Log more, or the usual."""
    logging.getLogger().setLevel(logging.DEBUG if debug else logging.INFO)


def _configure_logging(debug: bool) -> None:
    logging.basicConfig(
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    set_log_level(debug)
    for noisy in ("pyroute2", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
