"""The operator: one leads, unused identities go, used ones stay, and another takes over. Tier unit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from ciliate.config import load_config
from ciliate.labels import LabelSet
from ciliate.operator.main import Operator
from ciliate.plugin import PluginManager
from ciliate_kvstore.identity_backend import KvstoreIdentities
from ciliate_kvstore.sqlite import SqliteStore


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def operator(directory: Path, name: str) -> Operator:
    flags = {"state-dir": str(directory), "run-dir": str(directory), "node-name": name, "identity-gc-interval": "1s"}
    return Operator(load_config(flags).config, PluginManager.load())


async def test_one_leads_and_collects_and_the_other_takes_over(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "kvstore.db")
    await store.start()
    identities = KvstoreIdentities(store, "node")
    await identities.start()
    used = await identities.allocate(LabelSet.parse(["k8s:app=used"]))
    free = await identities.allocate(LabelSet.parse(["k8s:app=free"]))
    await identities.release(free.id)
    first, second = operator(tmp_path, "first"), operator(tmp_path, "second")
    try:
        await first.start()
        await until(first.leads.is_set)
        await second.start()
        await until(lambda: first.collected == 1)
        assert not second.leads.is_set()
        await until(lambda: identities.get(free.id) is None)
        assert identities.get(used.id) == used
        await first.stop()
        await until(second.leads.is_set)
    finally:
        await first.stop()
        await second.stop()
        await identities.stop()
        await store.stop()
