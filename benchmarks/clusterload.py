"""The rest of a cluster, as its store sees it: nodes and pods that come and go. Run by `scale.py` beside the etcd.

Reads one command a line (JSON) and answers each with one line. Keys and documents are those of real agents.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from statistics import quantiles
from typing import Any

from ciliate.datapath import layout
from ciliate.datapath.bpf import Map
from ciliate.kvstore import MAX_OPS, Delete, Op, Put
from ciliate.node import Node, model, records
from ciliate.node.addresses import PREFIX
from ciliate.node.registry import PREFIX as NODES
from ciliate_kvstore.etcdv3.settings import Options, settings_of
from ciliate_kvstore.etcdv3.store import EtcdStore

IDENTITIES = "cilium/state/identities/v1/id/"
FIRST_IDENTITY, IDENTITY_COUNT = 1000, 1000
AT_ONCE = 64
"""Pods that are being replaced at once, at most."""
IN_FLIGHT = 8
"""Transactions under way at once."""
POLL = 0.0002


def node(number: int) -> Node:
    """Node ``number`` of the simulated cluster, with a /24 of its own."""
    return Node(
        name=f"sim{number}",
        ipv4=IPv4Address("172.20.0.1") + number,
        pods4=IPv4Network((int(IPv4Address("11.0.0.0")) + (number << 8), 24)),
        pods6=IPv6Network((0xFD02 << 112 | number << 16, 112)),
    )


def record(pod: int, nodes: int, generation: int = 0) -> tuple[str, bytes]:
    """Key and document of one pod's address; pods go round the nodes. ``generation`` gives it another identity."""
    home = node(pod % nodes)
    assert home.pods4 is not None
    address = home.pods4.network_address + 2 + pod // nodes
    identity = FIRST_IDENTITY + (pod * 7 + generation) % IDENTITY_COUNT
    owner = f"{records.owner(home.cluster, home.name)}:{2 + pod // nodes}"
    return PREFIX + str(address), records.encode(address, home.ipv4, identity, owner)


class Load:
    """The commands."""

    def __init__(self, address: str) -> None:
        self._store = EtcdStore(settings_of(Options(address=address, qps=0, timeout=60.0)))

    async def run(self) -> None:
        """Answer commands until there are no more."""
        await self._store.start()
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command: dict[str, Any] = json.loads(line)
            answer = await getattr(self, command.pop("op"))(**command)
            print(json.dumps(answer), flush=True)
        await self._store.stop()

    async def nodes(self, count: int) -> dict[str, float]:
        """Make nodes and identities known."""
        items = [(NODES + node(number).id, model.encode(node(number))) for number in range(count)]
        labels = ((FIRST_IDENTITY + number, f"k8s:app=a{number};") for number in range(IDENTITY_COUNT))
        items += [(f"{IDENTITIES}{number}", text.encode()) for number, text in labels]
        return await self._write([Put(key, value) for key, value in items], 0)

    async def pods(self, count: int, nodes: int, rate: float = 0) -> dict[str, float]:
        """Make pods known, at most ``rate`` a second (0: as fast as the store takes them)."""
        return await self._write([Put(*record(pod, nodes)) for pod in range(count)], rate)

    async def _write(self, operations: Sequence[Op], rate: float) -> dict[str, float]:
        began = time.monotonic()
        parts = [operations[start : start + MAX_OPS] for start in range(0, len(operations), MAX_OPS)]
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def put(number: int, chunk: Sequence[Op]) -> None:
            await asyncio.sleep(began + number * MAX_OPS / rate - time.monotonic() if rate else 0)
            async with slots:
                await self._store.transaction([], chunk)

        await asyncio.gather(*(put(number, chunk) for number, chunk in enumerate(parts)))
        return {"took": time.monotonic() - began, "ended": time.monotonic()}

    async def delete_pods(self) -> dict[str, float]:
        """Take every pod away at once."""
        began = time.monotonic()
        await self._store.delete_prefix(PREFIX)
        return {"took": time.monotonic() - began, "ended": time.monotonic()}

    async def churn(self, rate: float, seconds: float, pods: int, nodes: int, map: str) -> dict[str, Any]:
        """Replace ``rate`` pods a second: a deletion, and a write with another identity elsewhere in the cluster.

        Of some new pods the time is taken from the write's begin until the kernel's map of the agent has them.
        """
        began, replaced, delays = time.monotonic(), 0, []
        table = Map.open(Path(map))
        watching: set[asyncio.Task[None]] = set()
        free: list[int] = []
        while (now := time.monotonic()) < began + seconds:
            due = int((now - began) * rate)
            for _ in range(due - replaced):
                gone = random.randrange(pods)
                come = free.pop() if len(free) > 100 else gone
                free.append(gone)
                replaced += 1
                sampled = replaced % 20 == 0
                task = asyncio.create_task(
                    self._replace(gone, come, nodes, replaced, table if sampled else None, delays)
                )
                watching.add(task)
                task.add_done_callback(watching.discard)
            await asyncio.sleep(0.002)
            while len(watching) >= AT_ONCE:
                # the machine does not keep up; the figures say how many there were
                await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        while watching:
            await asyncio.gather(*watching)
        table.close()
        shares = quantiles(delays, n=100)
        return {"replaced": replaced, "seconds": time.monotonic() - began, "p50": shares[49], "p99": shares[98]}

    async def _replace(
        self, gone: int, come: int, nodes: int, generation: int, table: Map | None, delays: list[float]
    ) -> None:
        await self._store.transaction([], [Delete(record(gone, nodes)[0])])
        key, value = record(come, nodes, generation)
        wanted = records.Decoder("none")(key.removeprefix(PREFIX), value).entry
        began = time.monotonic()
        await self._store.transaction([], [Put(key, value)])
        if table is None:
            return
        place = layout.ipcache_host_key(key.removeprefix(PREFIX))
        while table.lookup(place) != wanted and time.monotonic() < began + 5:  # noqa: ASYNC110
            await asyncio.sleep(POLL)
        delays.append(time.monotonic() - began)

    async def count(self) -> dict[str, int]:
        """How many keys of pods the store has."""
        return {"pods": len((await self._store.get_prefix(PREFIX)).items)}


if __name__ == "__main__":
    asyncio.run(Load(sys.argv[1]).run())
