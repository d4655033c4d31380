"""Serves the API on the agent's UNIX socket; nothing listens on TCP."""

from __future__ import annotations

import contextlib
import grp
import os
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from ciliate.agent.api import (
    endpoint,
    handlers,
    identity,
    ipam,
    maps,
    node,
    openapi,
    policy,
    problem,
    service,
    stream,
    trace,
)
from ciliate.agent.counting import timed
from ciliate.unixsocket import making

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

MAX_BODY = 64 * 1024 * 1024
"""Bytes of the largest request: some ten thousand policies in one import."""


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add every route of the API."""
    for module in (handlers, endpoint, identity, ipam, maps, node, openapi, policy, service, stream, trace):
        module.routes(router, agent)


class ApiServer:
    """The socket with its routes."""

    def __init__(self, agent: Agent, path: Path, group: str = "") -> None:
        self._path = path
        self._group = group
        self._listening = False
        self._app = web.Application(middlewares=[timed, problem.middleware], client_max_size=MAX_BODY)
        routes(self._app.router, agent)
        self._runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=2.0)

    async def start(self) -> None:
        """Listen. The socket is made with mode 0600 and opened to its group afterwards, never the other way."""
        await self._runner.setup()
        with making(self._path, "socket-path"):
            await web.UnixSite(self._runner, str(self._path)).start()
        self._listening = True
        if self._group:
            os.chown(self._path, 0, grp.getgrnam(self._group).gr_gid)
            self._path.chmod(0o660)

    async def stop(self) -> None:
        """Finish what is being answered and remove the socket."""
        await self._runner.cleanup()
        if self._listening:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
