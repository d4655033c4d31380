"""The kernel's side of a benchmark: a node's maps, pinned in a BPF file system of their own that goes away again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ciliate.datapath import EndpointConfig, PolicyChange, layout
from ciliate.datapath.bpf import ARRAY, HASH, LPM_TRIE, Map, pin
from ciliate.datapath.pins import PinDirectory, unmount
from ciliate.datapath.policymap import Enforcement, PolicyMap
from ciliate.policy.mapstate import MapState, PolicyEntry, PolicyKey

T = TypeVar("T")
_NO_PREALLOC = 1
# kind, key size, value size, entries and flags as bpf/ciliate_bpf/lib/maps.h has them
_MAPS = {
    "ciliate_ep": (ARRAY, 4, layout.EP_CONFIG.size, 65536, 0),
    "ciliate_ipcache": (LPM_TRIE, layout.IPCACHE_KEY.size, layout.IPCACHE_ENTRY.size, 512000, _NO_PREALLOC),
    "ciliate_place": (LPM_TRIE, layout.IPCACHE_KEY.size, layout.PLACE_ENTRY.size, 65536, _NO_PREALLOC),
    "ciliate_policy": (HASH, layout.POLICY_KEY.size, layout.POLICY_ENTRY.size, 524288, _NO_PREALLOC),
}


@contextlib.contextmanager
def pinned_maps() -> Iterator[dict[str, Map]]:
    """The maps, pinned and opened from their pins. Pins, mount and directory go whatever happens. Needs root."""
    root = Path(tempfile.mkdtemp(prefix="ciliate-benchmark-"))
    pins = PinDirectory(root / "bpf", f"benchmark-{os.getpid()}")
    try:
        pins.open()
        with unpinned_maps() as made:
            for name, table in made.items():
                pin(table.descriptor, pins.of(name))
        with contextlib.ExitStack() as stack:
            yield {name: stack.enter_context(contextlib.closing(Map.open(pins.of(name)))) for name in _MAPS}
    finally:
        pins.remove()
        unmount(pins.root)
        shutil.rmtree(root)


@contextlib.contextmanager
def unpinned_maps() -> Iterator[dict[str, Map]]:
    """The maps without pins: they go with the process, however it ends. Needs root."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(contextlib.closing(Map.create(*_MAPS[name], name))) for name in _MAPS}


class KernelDatapath:
    """What the Realizer asks of a datapath, over ``maps``; without them everything is taken and nothing is done.

    As in the node's datapath, one thread does all of the work.
    """

    def __init__(self, maps: Mapping[str, Map] | None) -> None:
        self._maps = maps
        self._policy = PolicyMap(maps["ciliate_policy"]) if maps else None
        self._enforced: dict[int, tuple[bool, bool]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="datapath")

    def close(self) -> None:
        """End the thread and empty the maps."""
        self._worker.shutdown()
        if self._maps and self._policy:
            for endpoint in list(self._policy.endpoints()):
                self._policy.remove(endpoint)
            ipcache = self._maps["ciliate_ipcache"]
            for key in list(ipcache.keys()):
                ipcache.delete(key)

    def in_kernel(self) -> dict[int, MapState]:
        """Every endpoint's entries, read from the kernel anew."""
        if not self._maps:
            return {}
        found = PolicyMap(self._maps["ciliate_policy"])
        found.adopt()
        return {endpoint: found.entries(endpoint) for endpoint in found.endpoints()}

    async def add_endpoint(self, config: EndpointConfig, policy: MapState) -> None:
        """Write a new endpoint's entries; there is no device."""
        await self.apply_policy(config.id, policy, (), config.enforce_ingress, config.enforce_egress)

    async def apply_policy(
        self, endpoint: int, upserts: MapState, deletes: Collection[PolicyKey], ingress: bool, egress: bool
    ) -> None:
        """Change an endpoint's policy by a delta."""
        await self._run(self._apply, endpoint, upserts, deletes, (ingress, egress))

    async def apply_policies(self, changes: Iterable[PolicyChange]) -> dict[int, OSError]:
        """Change the policies of several endpoints by deltas."""
        for change in changes:
            await self._run(self._apply, *change)
        return {}

    def _apply(
        self,
        endpoint: int,
        upserts: Mapping[PolicyKey, PolicyEntry],
        deletes: Collection[PolicyKey],
        enforce: tuple[bool, bool],
    ) -> None:
        old = self._enforced.get(endpoint, enforce)
        self._enforced[endpoint] = enforce
        if self._policy is not None:
            self._policy.apply(endpoint, upserts, deletes, enforce, old, lambda state: self._write(endpoint, state))

    def _write(self, endpoint: int, state: Enforcement) -> None:
        flags = layout.EP_VALID
        flags |= layout.EP_ENFORCE_INGRESS if state.ingress else 0
        flags |= layout.EP_ENFORCE_EGRESS if state.egress else 0
        shapes = (state.ingress_shape, state.egress_shape)
        value = layout.EP_CONFIG.pack(1, 0, b"", b"", b"", b"", endpoint, flags, *shapes)
        self._table("ciliate_ep").update(endpoint.to_bytes(4, "little"), value)

    async def change_ipcache(self, upserts: Mapping[bytes, bytes], deletes: Iterable[bytes] = ()) -> None:
        """Write prefixes with their identities, forget others."""
        if self._maps:
            await self._run(self._table("ciliate_ipcache").update_many, list(upserts.items()))
            await self._run(self._table("ciliate_ipcache").delete_many, list(deletes))

    async def change_places(self, upserts: Mapping[bytes, bytes], deletes: Iterable[bytes] = ()) -> None:
        """Write places by prefix, forget others."""
        if self._maps and upserts:
            await self._run(self._table("ciliate_place").update_many, list(upserts.items()))
        if self._maps:
            await self._run(self._table("ciliate_place").delete_many, list(deletes))

    def _table(self, name: str) -> Map:
        assert self._maps is not None
        return self._maps[name]

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)
