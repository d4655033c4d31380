"""What dead nodes left in the store. Nearly all of it goes with its node's lease; this is for the rest.

The rest are slave keys of identities without a lease, as versions before leases wrote them: they would keep their
identities for ever. Where no node is registered nothing is touched: then nobody can be told from the dead.
"""

from __future__ import annotations

import logging
import time

from ciliate.backoff import ClusterSize
from ciliate.kvstore import Compare, Delete, KeyValue, Kvstore

log = logging.getLogger(__name__)
NODES = "cilium/state/nodes/v1/"
USERS = "cilium/state/identities/v1/value/"


class Leftovers:
    """Keeps between its runs since when a key is a leftover."""

    def __init__(self, store: Kvstore, grace: float, cluster: ClusterSize) -> None:
        """``grace``: seconds for which a key has to be a leftover, unchanged, before it is removed."""
        self.nodes = 0
        self.removed = 0
        self._store = store
        self._grace = grace
        self._cluster = cluster
        self._since: dict[tuple[str, int], float] = {}

    async def collect(self) -> None:
        """Count the nodes, and remove what has been a leftover for long enough."""
        self.nodes = await self._count_nodes()
        self._cluster.nodes = self.nodes
        if not self.nodes:
            self._since.clear()
            return
        now, since = time.monotonic(), {}
        async for page in self._store.pages(USERS):
            for item in page.items:
                if item.lease:
                    continue
                began = self._since.get((item.key, item.mod_revision), now)
                since[item.key, item.mod_revision] = began
                if now - began >= self._grace:
                    await self._remove(item)
        self._since = since

    async def _count_nodes(self) -> int:
        count = 0
        async for page in self._store.pages(NODES):
            count += len(page.items)
        return count

    async def _remove(self, item: KeyValue) -> None:
        unchanged = [Compare(item.key, "mod_revision", item.mod_revision)]
        if (await self._store.transaction(unchanged, [Delete(item.key)])).succeeded:
            self.removed += 1
            log.info("%s was left behind and is removed", item.key)
