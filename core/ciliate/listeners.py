"""Listening sockets with bounds: so many connections in all and from one source, and a time to say what is wanted.

Whoever opens connections without end, a pod towards the health port or a client of the API, uses up its own share: it
is refused, counted and named, and neither descriptors nor time of the process run out for others.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address

from aiohttp import web

from ciliate.measure import Count

log = logging.getLogger(__name__)
REFUSED = Count(
    "refused_connections", "Connections that were refused or ended, by listener and source", ("listener", "source")
)
SOURCES = 32
"""Sources of one listener that are counted by name; what more there are is counted together, as ``others``."""
OTHERS = "others"
RECENT = 300.0
"""Seconds for which the status speaks of a source that was refused."""
TURN = 16
"""Connections that are accepted before others have their turn."""
REST = 0.02
"""Seconds without accepting after a turn in which somebody was refused: refusing must not become what we do."""
EXHAUSTED = 1.0
"""Seconds without accepting where the process has no descriptor left."""
DESCRIPTORS = 8
"""One listener has at most this part of the descriptors that the process may have: one eighth."""
HEAD = 10.0
"""Seconds within which a client has to say what it wants."""
_CREDENTIALS = struct.Struct("3i")
_RESET = struct.pack("ii", 1, 0)


class Share:
    """Who is connected to one listener. ``most`` connections in all, ``each`` from one source."""

    def __init__(self, name: str, most: int, each: int, called: Callable[[str], str] | None = None) -> None:
        """``called`` says what people call a source: the pod of an address."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.name = name
        self.most = max(1, min(most, soft // DESCRIPTORS))
        self.each = max(1, min(each, self.most))
        self.connected: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._called = called or str
        self._last = float("-inf"), ""
        _shares.append(self)

    def enter(self, source: str) -> bool:
        """Count a connection, or refuse it."""
        if self.connected.total() >= self.most or self.connected[source] >= self.each:
            self.refuse(source)
            return False
        self.connected[source] += 1
        return True

    def leave(self, source: str) -> None:
        """A connection has ended."""
        self.connected[source] -= 1
        if self.connected[source] <= 0:
            del self.connected[source]

    def refuse(self, source: str) -> None:
        """Count one that was refused, or ended because it said nothing."""
        name = self._called(source)
        if name not in self.refused and len(self.refused) >= SOURCES:
            name = OTHERS
        if not self.refused[name] or self.recently() != name:
            log.warning("listener %s: connections of %s are refused: %s", self.name, name, self._use())
        self.refused[name] += 1
        self._last = time.monotonic(), name
        REFUSED.add(self.name, name)

    def _use(self) -> str:
        return f"{self.connected.total()} of {self.most} are connected, {self.each} of one source at most"

    def recently(self) -> str:
        """Who was refused last, not long ago; empty where nobody was."""
        when, name = self._last
        return name if time.monotonic() - when < RECENT else ""

    def text(self) -> str:
        """One line for people."""
        name = self.recently()
        told = f"{self.name} {self.connected.total()} of {self.most}"
        return f"{told}: {self.refused[name]} connections of {name} were refused" if name else told

    def close(self) -> None:
        """The listener ends."""
        with contextlib.suppress(ValueError):
            _shares.remove(self)


_shares: list[Share] = []


def status() -> tuple[str, str]:
    """State and one line for people, of every listener of the process."""
    text = "; ".join(share.text() for share in _shares)
    return ("warning" if any(share.recently() for share in _shares) else "ok"), text or "none"


def source_of(connection: socket.socket) -> str:
    """Who is at the other end: an address, or a user of this machine. OSError where the connection has gone."""
    if connection.family == socket.AF_UNIX:
        return f"user {user_of(connection)}"
    address = ip_address(str(connection.getpeername()[0]).partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def user_of(connection: socket.socket) -> int:
    """The user at the other end of a UNIX socket."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(data)[1])


class Door:
    """Accepts what comes to a listening socket, as far as the share goes. ``make`` gives each connection a protocol."""

    def __init__(self, listener: socket.socket, share: Share, make: Callable[[], asyncio.Protocol]) -> None:
        self.listener = listener
        self.share = share
        self._make = make
        self._rest: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        listener.setblocking(False)

    def open(self) -> None:
        """Begin to accept."""
        self._rest = None
        asyncio.get_running_loop().add_reader(self.listener, self._accept)

    def close(self) -> None:
        """Accept no more; connections live on. The socket is closed."""
        if self._rest is not None:
            self._rest.cancel()
        elif self.listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self.listener)
        self.listener.close()

    def _pause(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.listener)
        self._rest = loop.call_later(seconds, self.open)

    def _accept(self) -> None:
        refused = False
        for _ in range(TURN):
            try:
                connection, _ = self.listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error("listener %s: %s", self.share.name, error.strerror)
                self._pause(EXHAUSTED)
                return
            refused = not self._take(connection) or refused
        if refused:
            self._pause(REST)

    def _take(self, connection: socket.socket) -> bool:
        try:
            source = source_of(connection)
        except OSError:  # it has gone again
            connection.close()
            return True
        if not self.share.enter(source):
            with contextlib.suppress(OSError):  # a reset leaves nothing that waits in the kernel
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.close()
            return False
        connection.setblocking(False)
        task = asyncio.create_task(self._serve(connection, source), name=f"{self.share.name}-connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _serve(self, connection: socket.socket, source: str) -> None:
        gate = _Gate(self._make(), self.share, source)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: gate, connection)
        except BaseException:
            gate.left()
            connection.close()
            raise


class _Gate(asyncio.Protocol):
    """Between a transport and the protocol that serves it: knows when the connection ends, and when nothing came."""

    def __init__(self, inner: asyncio.Protocol, share: Share, source: str) -> None:
        self._inner = inner
        self._share = share
        self._source = source
        self._inside = True
        self._head: bytes | None = b""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(HEAD, self._silent)
        self._inner.connection_made(transport)

    def _silent(self) -> None:
        self._share.refuse(self._source)
        if isinstance(self._transport, asyncio.Transport):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head = self._head[-3:] + data
            if b"\r\n\r\n" in self._head:
                self._heard()
        self._inner.data_received(data)

    def _heard(self) -> None:
        self._head = None
        if self._timer is not None:
            self._timer.cancel()

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.left()
        self._inner.connection_lost(exc)

    def left(self) -> None:
        """Give the place in the share back."""
        self._heard()
        if self._inside:
            self._inside = False
            self._share.leave(self._source)


def tcp_listener(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens there, on both families where no host is given. OSError where that cannot be."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=backlog)


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Listener:
    """HTTP at the ``address:port`` that an option gives: ``answers`` by path."""

    MOST, EACH, BACKLOG = 64, 16, 64

    def __init__(self, option: str, address: str, answers: Mapping[str, Answer]) -> None:
        self._option = option
        self.address = address
        self.problem = ""
        """Why nobody is served yet; empty where all is well."""
        self._app = web.Application()
        for path, answer in answers.items():
            self._app.router.add_get(path, answer)
        self._runner: web.AppRunner | None = None
        self._door: Door | None = None
        self._share = Share(option.removesuffix("-serve-addr"), self.MOST, self.EACH)

    @property
    def port(self) -> int:
        """Where it listens; 0 where it does not."""
        return int(self._door.listener.getsockname()[1]) if self._door is not None else 0

    async def ensure(self) -> None:
        """Listen, unless it does. OSError where there is no such address; ``problem`` says who has the port already."""
        if self._door is not None:
            return
        if self._runner is None:
            self._runner = web.AppRunner(self._app, access_log=None)
            await self._runner.setup()
        host, _, port = self.address.rpartition(":")
        try:
            listener = tcp_listener(host.strip("[]"), int(port), self.BACKLOG)
        except OSError as error:
            text = f"{self._option} {self.address}: cannot listen there: {error.strerror}; choose another or free it"
            if error.errno != errno.EADDRINUSE:
                raise OSError(error.errno, text) from error
            if not self.problem:
                log.warning("%s; it is tried again", text)
            self.problem = text
            return
        self._door, self.problem = http_door(listener, self._share, self._runner), ""
        self._door.open()

    async def stop(self) -> None:
        """Stop listening."""
        self._share.close()
        if self._door is not None:
            self._door.close()
        if self._runner is not None:
            await self._runner.cleanup()


def http_door(listener: socket.socket, share: Share, runner: web.AppRunner) -> Door:
    """The door of an HTTP server that is set up."""
    if runner.server is None:
        raise RuntimeError("the runner is not set up")
    return Door(listener, share, runner.server)
