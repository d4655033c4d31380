"""The agent's side of the CNI executable: a UNIX socket that takes frames with a namespace's file descriptor.

Many requests are worked on at once, those of one container one after the other. The wire format is described in the
executable (plugins/cni/ciliate_cni/shim.py). DELs that were queued while no agent ran are done before anything else.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ciliate.cni.modes import ChainingMode, ReportingMode
from ciliate.cni.spec import VERSIONS, CniError, CniResult, Command, ErrorCode, Request, parse_request
from ciliate.datapath.errors import DatapathError
from ciliate.unixsocket import inode_of, making

log = logging.getLogger(__name__)
MAGIC = b"CNI1"
HEADER = 12
MAX_FRAME = 4 * 1024 * 1024
MOST = 512
"""Requests at once; what more there are waits in the kernel to be accepted."""
MOST_FILES = 4
"""File descriptors that one request may bring; one is used."""
READ_TIMEOUT = 10.0
"""Seconds within which a client has to send its frame."""
STOP_TIMEOUT = 10.0
"""Seconds that running requests have when the agent stops, before they are cancelled and undone."""
NEED_NAMESPACE = (Command.ADD, Command.CHECK)
"""DEL has to succeed whatever the path leads to by now, so only these look at the namespace."""
MISTAKES = (
    ErrorCode.INCOMPATIBLE_VERSION,
    ErrorCode.UNSUPPORTED_FIELD,
    ErrorCode.INVALID_ENVIRONMENT,
    ErrorCode.DECODING_FAILURE,
    ErrorCode.INVALID_CONFIGURATION,
)
"""What a queued DEL is dropped for; it stays queued, for the next start, for anything else."""
NS_GET_NSTYPE = 0xB703
CLONE_NEWNET = 0x40000000


class FrameError(Exception):
    """A client sent something that is no frame."""


class CniServer:
    """Answers CNI requests. ``modes`` are the chaining modes by name."""

    def __init__(self, socket_path: Path, modes: Mapping[str, ChainingMode], spool_dir: Path | None = None) -> None:
        self._path = socket_path
        self._modes = modes
        self._spool = spool_dir or socket_path.parent / "cni-spool"
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._inode = 0

    async def start(self) -> None:
        """Do the queued DELs, then listen. Raises OSError where the socket cannot be made."""
        await self._work_off_spool()
        self._listen()
        await self._work_off_spool()  # what was queued since we looked, by those whom nobody heard

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with making(self._path, "cni-socket-path"):
                listener.bind(str(self._path))
        except BaseException:
            listener.close()
            raise
        listener.listen(1024)
        self._listener, self._inode = listener, inode_of(self._path)
        self._accepting = asyncio.create_task(self._accept(listener), name="cni-accept")

    async def ensure(self) -> bool:
        """Listen anew where somebody removed the socket, and do the DELs that came meanwhile; whether that was so."""
        if self._listener is None or inode_of(self._path) == self._inode:
            return False
        listener, accepting = self._listener, self._accepting
        self._listen()
        if accepting is not None:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
        listener.close()
        await self._work_off_spool()
        return True

    async def stop(self) -> None:
        """Take no more requests and finish those that run."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._listener is not None:
            if inode_of(self._path) == self._inode:
                self._path.unlink(missing_ok=True)
            self._listener.close()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if len(self._tasks) >= MOST:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                # out of file descriptors: running requests will give some back
                log.error("cni: a connection could not be accepted: %s", error)
                await asyncio.sleep(0.1)
                continue
            connection.setblocking(False)
            task = asyncio.create_task(self._serve(connection), name="cni-request")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        files: list[int] = []
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                frame = await _receive_frame(connection, files)
            if not frame:
                return  # somebody only looked whether we listen
            code, output = await self.answer(*_split(frame), files[0] if files else None)
            reply = bytes([code]) + len(output).to_bytes(4, "big") + output
            async with asyncio.timeout(READ_TIMEOUT):  # whoever asks has to take the answer, too
                await asyncio.get_running_loop().sock_sendall(connection, reply)
        except (FrameError, OSError, TimeoutError) as error:
            log.warning("cni: a client went away or sent no valid frame: %s", error or type(error).__name__)
        finally:
            connection.close()
            for file in files:
                os.close(file)

    async def answer(
        self, environment: Mapping[str, str], configuration: bytes, netns_fd: int | None
    ) -> tuple[int, bytes]:
        """Do one request; returns the executable's exit code and standard output."""
        try:
            if netns_fd is not None and environment.get("CNI_COMMAND") in NEED_NAMESPACE:
                _check_namespace(netns_fd, environment.get("CNI_NETNS", ""))
            request = parse_request(environment, configuration, netns_fd)
            document = await self._perform(request)
        except CniError as error:
            log.warning("cni: %s refused: %s", environment.get("CNI_COMMAND", "?"), error.message)
            return 1, _encode(error.document(_told_version(configuration)))
        except OSError as error:
            log.warning("cni: %s failed: %s", environment.get("CNI_COMMAND", "?"), error)
            number = ErrorCode.DATAPATH_FAILURE if isinstance(error, DatapathError) else ErrorCode.IO_FAILURE
            return 1, _encode(CniError(number, _text(error)).document(_told_version(configuration)))
        except Exception as error:
            log.exception("cni: %s failed", environment.get("CNI_COMMAND", "?"))
            failure = CniError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")
            return 1, _encode(failure.document(_told_version(configuration)))
        return 0, b"" if document is None else _encode(document)

    async def _perform(self, request: Request) -> dict[str, Any] | None:
        version = request.config.version
        if request.command is Command.VERSION:
            return {"cniVersion": version, "supportedVersions": list(VERSIONS)}
        if request.command is Command.GC:
            await self._collect(request)
            return None
        mode = self._mode(request)
        if request.command is Command.STATUS:
            if isinstance(mode, ReportingMode):
                await mode.status(request)
            return None
        async with self._exclusive(request.container_id):
            if request.command is Command.ADD:
                result = await mode.add(request)
                return result.document(version) if isinstance(result, CniResult) else result
            await (mode.delete(request) if request.command is Command.DEL else mode.check(request))
        return None

    def _mode(self, request: Request) -> ChainingMode:
        name = request.config.mode
        if name not in self._modes:
            known = ", ".join(sorted(self._modes)) or "none is loaded"
            text = f"chaining-mode: {name!r} given, expected one of: {known}"
            raise CniError(ErrorCode.INVALID_CONFIGURATION, text)
        return self._modes[name]

    async def _collect(self, request: Request) -> None:
        """Collect in every mode, as much as can be; the first failure is told at the end."""
        failures = []
        for name, mode in self._modes.items():
            try:
                await mode.collect(request.config.name, request.config.valid_attachments)
            except Exception as error:
                log.error("cni: GC in chaining mode %s: %s", name, error)
                failures.append(error)
        if failures:
            raise failures[0]

    @contextlib.asynccontextmanager
    async def _exclusive(self, container_id: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(container_id, (asyncio.Lock(), 0))
        self._locks[container_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[container_id]
            if users == 1:
                del self._locks[container_id]
            else:
                self._locks[container_id] = lock, users - 1

    async def _work_off_spool(self) -> None:
        for path in sorted(self._spool.glob("*.del")):
            try:
                environment, configuration = _split(path.read_bytes())
            except (FrameError, OSError) as error:
                log.error("cni: queued DEL %s cannot be read and is dropped: %s", path, error)
            else:
                code, output = await self.answer(environment, configuration, None)
                if code and _may_pass(output):
                    log.error("cni: queued DEL %s failed and stays queued: %s", path, output.decode())
                    continue
                if code:
                    log.error("cni: queued DEL %s is refused and dropped: %s", path, output.decode())
            path.unlink(missing_ok=True)


def _split(frame: bytes) -> tuple[dict[str, str], bytes]:
    """Environment and standard input of one whole frame; FrameError where it is none."""
    if len(frame) < HEADER or frame[:4] != MAGIC or len(frame) != _frame_size(frame):
        raise FrameError(
            f"{len(frame)} bytes that begin with {frame[:4]!r}, expected a frame that begins with {MAGIC!r}"
        )
    boundary = HEADER + int.from_bytes(frame[4:8], "big")
    pairs = frame[HEADER:boundary].decode("utf-8", "surrogateescape").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair), frame[boundary:]


def _frame_size(head: bytes | bytearray) -> int:
    return HEADER + int.from_bytes(head[4:8], "big") + int.from_bytes(head[8:12], "big")


async def _receive_frame(connection: socket.socket, files: list[int]) -> bytes:
    """One frame, or nothing where none was begun; received descriptors are added to ``files``, whatever happens."""
    data = bytearray()
    expected = HEADER
    while len(data) < expected:
        chunk = await _receive(connection, files)
        if not chunk and not data:
            break
        if not chunk:
            raise FrameError(f"connection ended after {len(data)} of {expected} bytes")
        data += chunk
        if len(data) >= HEADER:
            expected = _frame_size(data)
        if data[:4] != MAGIC[: len(data)] or expected > MAX_FRAME:
            raise FrameError(f"expected a frame that begins with {MAGIC!r} and has at most {MAX_FRAME} bytes")
    return bytes(data)


async def _receive(connection: socket.socket, files: list[int]) -> bytes:
    space = socket.CMSG_SPACE(4 * array.array("i").itemsize)
    while True:
        try:
            data, ancillary, _, _ = connection.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            await _readable(connection)
            continue
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                files.extend(array.array("i", payload[: len(payload) // 4 * 4]))
        if len(files) > MOST_FILES:
            raise FrameError(f"{len(files)} file descriptors, expected at most {MOST_FILES}")
        return data


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)


def _check_namespace(file: int, path: str) -> None:
    """Refuse a descriptor that is no network namespace, or is the agent's own."""
    try:
        kind = fcntl.ioctl(file, NS_GET_NSTYPE)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        kind = 0
    own = Path("/proc/thread-self/ns/net").stat()
    given = os.fstat(file)
    if kind != CLONE_NEWNET:
        raise CniError(ErrorCode.INVALID_ENVIRONMENT, f"CNI_NETNS: {path!r} given, expected a network namespace")
    if (own.st_dev, own.st_ino) == (given.st_dev, given.st_ino):
        raise CniError(ErrorCode.INVALID_ENVIRONMENT, f"CNI_NETNS: {path!r} is the node's own network namespace")


def _may_pass(output: bytes) -> bool:
    """Whether an error answer speaks of a failure, not of a mistake in the request."""
    return msgspec.json.decode(output)["code"] not in MISTAKES


def _told_version(configuration: bytes) -> str:
    """The version that an error answer carries: the one asked for where it can be read."""
    try:
        version = msgspec.json.decode(configuration).get("cniVersion")
    except (msgspec.DecodeError, AttributeError, UnicodeDecodeError, RecursionError):
        return VERSIONS[-1]
    return version if isinstance(version, str) else VERSIONS[-1]


def _text(error: OSError) -> str:
    """What was refused and why, without the error's number."""
    path = f"{error.filename}: " if error.filename else ""
    return path + (error.strerror or str(error))


def _encode(document: Mapping[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
