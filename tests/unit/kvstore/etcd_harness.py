"""Real etcd for tests: stores in namespaces of their own, and a way to the server that can be disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from ciliate.kvstore import Event, KvstoreError
from ciliate.lab.etcdserver import Etcd
from ciliate_kvstore.etcd3lib.connection import Etcd3Connection
from ciliate_kvstore.etcdv3.connection import Connection
from ciliate_kvstore.etcdv3.settings import Options, settings_of
from ciliate_kvstore.etcdv3.store import EtcdStore

CONNECTIONS: dict[str, type[Connection]] = {"etcd": Connection, "etcd3": Etcd3Connection}


async def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def opened(address: str | Etcd, provider: str = "etcd", **options: Any) -> AsyncIterator[EtcdStore]:
    """A store, without rate limit and with patience for a few seconds, where ``options`` say nothing else."""
    text = address.address if isinstance(address, Etcd) else address
    given = Options(address=text, **{"qps": 0.0, "timeout": 5.0, **options})
    settings = settings_of(given)
    store = EtcdStore(settings, CONNECTIONS[provider](settings, lambda: settings_of(given)))
    await store.start()
    try:
        yield store
    finally:
        await store.stop()


async def write(store: EtcdStore, key: str, value: bytes = b"") -> None:
    """As every writer of a key without conditions: again and again until it is done."""
    while True:
        try:
            await store.put(key, value)
            return
        except KvstoreError:
            await asyncio.sleep(0.05)


def namespace() -> str:
    """A prefix that nobody else uses."""
    return f"test-{uuid.uuid4().hex}/"


class Collected:
    """Follows a prefix in the background as every user of a watch does: goes on from what was told last."""

    def __init__(self, store: Any, prefix: str, start: int) -> None:
        self.events: list[Event] = []
        self.batches = 0
        self.errors: list[Exception] = []
        self.standing = asyncio.Event()
        self._arguments = (store, prefix, start)
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        from ciliate.kvstore import following

        store, prefix, start = self._arguments
        while True:
            try:
                async for batch in store.watch_prefix(prefix, start):
                    self.standing.set()
                    self.events += batch
                    self.batches += 1
                    start = following(batch, start)
                return
            except KvstoreError as error:
                self.errors.append(error)
                self.standing.clear()
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Proxy:
    """A way to an etcd member that can be cut, stalled or slowed down."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        """Seconds that everything on its way to the server takes longer."""
        self._target = port
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Proxy:
        await self.listen()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.refuse()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def listen(self) -> None:
        """Take connections (again)."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Reset every connection and take no new one."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    def stall(self) -> None:
        """Connections stay and nothing passes, as behind a rule that drops packets."""
        self._open.clear()

    def go_on(self) -> None:
        """Let everything pass again."""
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        for source, sink, slow in ((reader, back, True), (to, writer, False)):
            task = asyncio.create_task(self._pump(source, sink, slow))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, slow: bool) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        forward = asyncio.create_task(self._forward(queue, sink))
        loop = asyncio.get_running_loop()
        try:
            while data := await source.read(65536):
                queue.put_nowait((loop.time() + (self.delay if slow else 0.0), data))
        except OSError:
            pass
        finally:
            forward.cancel()
            sink.transport.abort()
            self._writers.discard(sink)

    async def _forward(self, queue: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            moment, data = await queue.get()
            await asyncio.sleep(max(0.0, moment - loop.time()))
            await self._open.wait()
            sink.write(data)
