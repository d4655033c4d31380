"""The rest of a cluster, as its store sees it: nodes and pods that come and go. Run by `scale.py` beside the etcd.

Reads one command a line (JSON) and answers each with one line. Keys and documents are those of real agents. It keeps
to one processor, and gives way there to whoever is measured; every answer says what processor time it took itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from statistics import median, quantiles
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
POLL = 0.001
"""Seconds between two looks for a pod in the kernel's map."""
PATIENCE = 5.0
SAMPLED = 5
"""Of so many pods one is looked for."""
NEW_LABELS = 100
"""Of so many pods one has labels that the cluster did not know: an identity comes with it."""
SINGLE_IN_FLIGHT = 64
SPARE = 1000
"""Addresses that nobody has while pods come and go: one that was given up is taken again by the thousandth after."""
NICE = 5


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


def host_key(pod: int, nodes: int) -> bytes:
    """The key of a pod's address in the kernel's map."""
    return layout.ipcache_host_key(record(pod, nodes)[0].removeprefix(PREFIX))


def _wanted(key: str, value: bytes) -> tuple[bytes, bytes]:
    """Key and value that the kernel's map of another node has for a record."""
    name = key.removeprefix(PREFIX)
    return layout.ipcache_host_key(name), records.Decoder("none")(name, value).entry


class Load:
    """The commands."""

    def __init__(self, address: str) -> None:
        self._store = EtcdStore(settings_of(Options(address=address, qps=0, timeout=60.0)))
        self._acks: list[float] = []
        self._afters: list[float] = []
        self._live: list[int] = []
        self._spare: deque[int] = deque()

    async def run(self) -> None:
        """Answer commands until there are no more."""
        await self._store.start()
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command: dict[str, Any] = json.loads(line)
            began = time.process_time()
            answer = await getattr(self, command.pop("op"))(**command)
            print(json.dumps(answer | {"cpu": time.process_time() - began}), flush=True)
        await self._store.stop()

    async def nodes(self, count: int) -> dict[str, float]:
        """Make nodes and identities known."""
        items = [(NODES + node(number).id, model.encode(node(number))) for number in range(count)]
        labels = ((FIRST_IDENTITY + number, f"k8s:app=a{number};") for number in range(IDENTITY_COUNT))
        items += [(f"{IDENTITIES}{number}", text.encode()) for number, text in labels]
        return await self._write([Put(key, value) for key, value in items], 0)

    async def pods(self, count: int, nodes: int, rate: float = 0, first: int = 0) -> dict[str, float]:
        """Make pods known, at most ``rate`` a second (0: as fast as the store takes them), many in a transaction."""
        self._live = []
        return await self._write([Put(*record(pod, nodes)) for pod in range(first, count)], rate)

    async def rewrite(self, count: int, nodes: int, map: str) -> dict[str, float]:
        """Give the first pods another identity, each in a revision of its own, as fast as the store takes them.

        ``lag`` is the time from the last write until the agent's map in the kernel has the last ones.
        """
        operations = [Put(*record(pod, nodes, 1)) for pod in range(count)]
        answer = await self._write(operations, 0, 1, SINGLE_IN_FLIGHT)
        table = Map.open(Path(map))
        for put in operations[-2 * SINGLE_IN_FLIGHT :]:
            await self._arrived(table, *_wanted(put.key, put.value))
        table.close()
        return answer | {"lag": time.monotonic() - answer["ended"]}

    async def _arrived(self, table: Map, place: bytes, wanted: bytes) -> None:
        """Wait until the map has an entry, or, so that the figures show it, PATIENCE seconds."""
        until = time.monotonic() + PATIENCE
        while table.lookup(place) != wanted and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(POLL)

    async def _write(
        self, operations: Sequence[Op], rate: float, size: int = MAX_OPS, in_flight: int = IN_FLIGHT
    ) -> dict[str, float]:
        began = time.monotonic()
        parts = [operations[start : start + size] for start in range(0, len(operations), size)]
        slots = asyncio.Semaphore(in_flight)

        async def put(number: int, chunk: Sequence[Op]) -> None:
            await asyncio.sleep(began + number * size / rate - time.monotonic() if rate else 0)
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
        """Replace ``rate`` pods a second. One replaced pod is two revisions: its address is deleted, and then one that
        nobody has is written, with another identity; one of `NEW_LABELS` makes a third, the key of a new identity.

        Of one of `SAMPLED` new pods the time is taken, from the write's begin until the agent's map in the kernel has
        it; ``acked`` is the median of the part that the store took until it answered, ``after…`` are of the rest.
        """
        began, replaced, delays, self._acks, self._afters = time.monotonic(), 0, [], [], []
        table = Map.open(Path(map))
        watching: set[asyncio.Task[None]] = set()
        if not self._live:
            self._live, self._spare = list(range(pods)), deque(range(pods, pods + SPARE))
        while (now := time.monotonic()) < began + seconds:
            due = int((now - began) * rate)
            for _ in range(due - replaced):
                place = random.randrange(len(self._live))
                self._live[place], self._live[-1] = self._live[-1], self._live[place]
                gone, come = self._live.pop(), self._spare.popleft()
                replaced += 1
                sampled = replaced % SAMPLED == 0
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
        shares, after, took = quantiles(delays, n=100), quantiles(self._afters, n=100), time.monotonic() - began
        found = {"p50": shares[49], "p99": shares[98], "acked": median(self._acks)}
        found |= {"after50": after[49], "after99": after[98]}
        return {"replaced": replaced, "seconds": took, **found}

    async def _replace(
        self, gone: int, come: int, nodes: int, generation: int, table: Map | None, delays: list[float]
    ) -> None:
        await self._store.transaction([], [Delete(record(gone, nodes)[0])])
        key, value = record(come, nodes, generation)
        if not generation % NEW_LABELS:
            number = FIRST_IDENTITY + IDENTITY_COUNT + (generation // NEW_LABELS) % IDENTITY_COUNT
            await self._store.transaction([], [Put(f"{IDENTITIES}{number}", f"k8s:new=a{gone}.{generation};".encode())])
        began = time.monotonic()
        await self._store.transaction([], [Put(key, value)])
        self._live.append(come)
        self._spare.append(gone)
        if table is None:
            return
        acked = time.monotonic()
        self._acks.append(acked - began)
        await self._arrived(table, *_wanted(key, value))
        delays.append(time.monotonic() - began)
        self._afters.append(time.monotonic() - acked)

    async def count(self) -> dict[str, int]:
        """How many keys of pods the store has."""
        return {"pods": len((await self._store.get_prefix(PREFIX)).items)}


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.nice(NICE)
    asyncio.run(Load(sys.argv[1]).run())
