"""Keeps the agent's sockets where those who ask it look for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ciliate.directories import make_directory

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

log = logging.getLogger(__name__)
INTERVAL = 5.0
"""Seconds between looks: without the sockets nobody can ask, and no container comes up."""


async def keep_sockets(agent: Agent) -> None:
    """Make again what somebody removed. A duty."""
    config = agent.config
    api, cni = ("socket-path", config.socket_path, agent.api), ("cni-socket-path", config.cni_socket_path, agent.cni)
    for option, path, server in (api, cni):
        make_directory(Path(path).parent, "run-dir", 0o755)
        if await server.ensure():
            log.warning("somebody removed the socket of %s; it was made again", option)
