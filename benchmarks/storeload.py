"""What agents ask of the store while nothing happens: thousands of them as coroutines, in simulated time.

Each simulated agent is made of the parts of a real one that have timers toward the store: `LocalKeys` with the keys of
a node and its pods, and the controllers with the duty that asks for the store's health. Their store counts what it is
asked. The event loop's clock jumps from timer to timer, so that hours pass in seconds.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ciliate.agent.daemon import STORE_INTERVAL
from ciliate.backoff import ClusterSize, cluster_size
from ciliate.controller import Controllers
from ciliate.kvstore import Compare, Op, StoreStatus, TxnResult
from ciliate.kvstore.local_keys import LEASE_TTL, SYNC_INTERVAL, LocalKeys

KEYS = 21
"""Of one node: itself, and the addresses of 20 pods."""
WARM_UP, LENGTH = 1800.0, 3600.0
"""Simulated seconds before counting, and while counting."""
Log = Counter[str]


class Lease:
    """A lease that never runs out."""

    def __init__(self, store: CountingStore, ttl: float) -> None:
        self._store = store
        self.id = 1
        self.ttl = ttl

    async def keep_alive(self) -> None:
        """One operation."""
        self._store.asked["keep-alive"] += 1

    async def revoke(self) -> None:
        """One operation."""
        self._store.asked["revoke"] += 1

    async def keys(self) -> set[str]:
        """One operation."""
        self._store.asked["lease keys"] += 1
        return set(self._store.held)


class CountingStore:
    """What one agent asks its store, by kind. The store has what was put, and does nothing else."""

    def __init__(self, asked: Log) -> None:
        self.asked = asked
        self.held: set[str] = set()

    async def lease(self, ttl: float, lease_id: int = 0) -> Lease:
        """One operation."""
        self.asked["lease"] += 1
        return Lease(self, ttl)

    async def transaction(self, compare: Sequence[Compare], success: Sequence[Op], failure: Any = ()) -> TxnResult:
        """One operation."""
        self.asked["transaction"] += 1
        self.held.update(operation.key for operation in success)
        return TxnResult(True, 1)

    async def status(self) -> StoreStatus:
        """One operation."""
        self.asked["status"] += 1
        return StoreStatus(True, "counted")


class _Jumping(selectors.EpollSelector):
    """Instead of waiting, it moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """What is ready now; else the clock is where the next timer is due."""
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop in simulated time."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Simulated seconds."""
        return self._jumping.now


async def _agent(size: ClusterSize, asked: Log) -> tuple[LocalKeys, Controllers]:
    store = CountingStore(asked)
    keys = LocalKeys(store, cluster=size)  # type: ignore[arg-type]
    for number in range(KEYS):
        keys.set(f"key{number}", b"value")
    await keys.start()
    controllers = Controllers(size)

    async def status() -> None:
        await store.status()

    controllers.run("kvstore-status", status, STORE_INTERVAL, shared=True)
    return keys, controllers


async def _operations(nodes: int) -> Log:
    asked: Log = Counter()
    size = ClusterSize(nodes)
    agents = [await _agent(size, asked) for _ in range(nodes)]
    await asyncio.sleep(WARM_UP)
    asked.clear()
    await asyncio.sleep(LENGTH)
    found = Counter(asked)
    for keys, controllers in agents:
        await controllers.stop()
        await keys.stop()
    return found


def per_node_and_minute(nodes: int) -> float:
    """Operations on the store of each of ``nodes`` simulated agents and minute, while nothing happens."""
    loop = JumpingLoop()
    try:
        found = loop.run_until_complete(_operations(nodes))
    finally:
        loop.close()
    return found.total() / nodes / (LENGTH / 60)


def by_formula(nodes: int) -> float:
    """The same by inventory 4.12: what has to be asked at fixed times, and what spreads as ln(1 + n)."""
    return 60 / (LEASE_TTL / 3) + (60 / STORE_INTERVAL + 60 / SYNC_INTERVAL) / cluster_size(1.0, nodes)
