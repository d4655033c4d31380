"""A prefix that all nodes share: each writes its own keys there and follows everybody's.

For a registry over the store (nodes, ip to identity, services)::

    store = SharedStore(kvstore, local_keys, "cilium/state/nodes/v1/", decode, on_change)
    await store.start()
    store.set("default/node1", data)          # returns at once; written in the background, and again after a loss
    await store.synced.wait()                 # a first list was complete
    store.items["default/node2"]              # typed records, also this node's own

See `watcher` for what is withdrawn when, and `local_keys` for how keys come back.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from ciliate.kvstore import Kvstore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.kvstore.watcher import Decode, OnChange, Watcher

T = TypeVar("T")


class SharedStore(Watcher[T]):
    """A `Watcher` that also writes. Names are keys without the prefix."""

    def __init__(
        self, store: Kvstore, local: LocalKeys, prefix: str, decode: Decode[T], on_change: OnChange[T], **options: Any
    ) -> None:
        """``options`` are those of `Watcher`, except ``on_missing``."""
        super().__init__(store, prefix, decode, on_change, on_missing=self._lost, **options)
        self._local = local

    def set(self, name: str, value: bytes) -> None:
        """Have a key of this node in the store, from soon on until it is removed."""
        self._local.set(self.prefix + name, value)

    def remove(self, name: str) -> None:
        """Have a key of this node no longer in the store."""
        self._local.remove(self.prefix + name)

    async def settle(self) -> None:
        """Remove keys that an earlier run of this node set and nobody has set again."""
        await self._local.settle(self.prefix)

    def _lost(self, names: Collection[str]) -> None:
        self._local.touch([self.prefix + name for name in names])
