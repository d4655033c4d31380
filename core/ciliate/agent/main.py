"""`ciliate-agent`: reads the configuration, runs the agent until it is told to end."""

from __future__ import annotations

from typing import NoReturn

from ciliate.config import AgentConfig
from ciliate.daemonize import Daemon, run_daemon
from ciliate.plugin import PluginManager

USAGE = """Usage: ciliate-agent [--config FILE] [--config-dir DIR] [--OPTION=VALUE ...]

Runs the agent of this node. `ciliate config show` lists every option with its value and where it comes from."""


def main() -> NoReturn:
    """Entry point. Exit codes: 0 told to end, 1 a part failed, 2 configuration or command line is wrong."""
    run_daemon("ciliate-agent", USAGE, _make)


def _make(config: AgentConfig, plugins: PluginManager) -> Daemon:
    from ciliate.agent.daemon import Agent

    return Agent(config, plugins)


if __name__ == "__main__":
    main()
