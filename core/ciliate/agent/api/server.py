"""Serves the API on the agent's UNIX socket; nothing listens on TCP."""

from __future__ import annotations

import grp
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from ciliate.agent.api import (
    admission,
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
from ciliate.listeners import Door, Share, http_door
from ciliate.unixsocket import inode_of, making

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

MAX_BODY = 64 * 1024 * 1024
"""Bytes of the largest request: some ten thousand policies in one import."""

MOST = 2048
"""Clients at once. They are root's and its group's; the descriptors that are left are for the agent's other work."""
IDLE = 75.0
"""Seconds for which a connection is kept without a request."""
BACKLOG = 1024
"""Connections that may wait to be accepted; a client with a time-out is refused at once beyond that."""


class _OneLine(logging.Filter):
    """What is no HTTP is the client's mistake: one line without a trace."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
            record.msg, record.args = "no HTTP: %s", (" ".join(error.message.split()),)
        return True


def _protocol_log() -> logging.Logger:
    log = logging.getLogger("ciliate.agent.api.http")
    if not log.filters:
        log.addFilter(_OneLine())
    return log


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add every route of the API."""
    for module in (handlers, endpoint, identity, ipam, maps, node, openapi, policy, service, stream, trace):
        module.routes(router, agent)


class ApiServer:
    """The socket with its routes."""

    def __init__(self, agent: Agent, path: Path, group: str = "") -> None:
        self._path = path
        self._group = group
        self._inode = 0
        self._door: Door | None = None
        self._share = Share("api", MOST, MOST)
        self._app = web.Application(
            middlewares=[timed, problem.middleware, admission.middleware], client_max_size=MAX_BODY
        )
        routes(self._app.router, agent)
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            shutdown_timeout=2.0,
            keepalive_timeout=IDLE,
            auto_decompress=False,  # a body's encoding is refused, so that it is as long as it seems
            logger=_protocol_log(),
        )

    async def start(self) -> None:
        """Listen. The socket is made with mode 0600 and opened to its group afterwards, never the other way."""
        await self._runner.setup()
        self._listen()

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with making(self._path, "socket-path"):
                listener.bind(str(self._path))
        except BaseException:
            listener.close()
            raise
        listener.listen(BACKLOG)
        self._door, self._inode = http_door(listener, self._share, self._runner), inode_of(self._path)
        self._door.open()
        if self._group:
            os.chown(self._path, 0, grp.getgrnam(self._group).gr_gid)
            self._path.chmod(0o660)

    async def ensure(self) -> bool:
        """Listen anew where somebody removed the socket; whether that was so."""
        old = self._door
        if old is None or inode_of(self._path) == self._inode:
            return False
        self._listen()
        old.close()
        return True

    async def stop(self) -> None:
        """Finish what is being answered and remove the socket."""
        self._share.close()
        if self._door is not None:
            self._door.close()
        await self._runner.cleanup()
        if self._inode and inode_of(self._path) == self._inode:
            self._path.unlink(missing_ok=True)
