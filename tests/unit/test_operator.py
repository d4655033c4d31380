"""The operator: one leads, unused identities go, used ones stay, and another takes over. Tier unit."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec
import pytest

from ciliate.config import load_config
from ciliate.labels import LabelSet
from ciliate.operator import server
from ciliate.operator.leftovers import NODES, USERS
from ciliate.operator.main import Operator
from ciliate.plugin import PluginManager
from ciliate_kvstore.identity_backend import KvstoreIdentities
from ciliate_kvstore.sqlite import SqliteStore


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def operator(directory: Path, name: str) -> Operator:
    flags = {
        "state-dir": str(directory),
        "run-dir": str(directory),
        "node-name": name,
        "identity-gc-interval": "1s",
        "nodes-gc-interval": "1s",
        "kvstore-lease-ttl": "1s",
        "operator-api-serve-addr": "127.0.0.1:0",
    }
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


async def ask(instance: Operator, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession(trust_env=False) as session,
        session.get(f"http://127.0.0.1:{instance.server.port}{path}") as answer,
    ):
        return answer.status, await answer.text()


async def test_leftovers_of_dead_nodes_go_after_their_grace_and_nothing_else(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "kvstore.db")
    await store.start()
    lease = await store.lease(60)
    await store.put(f"{USERS}k8s:app=a;/dead", b"300")
    await store.put(f"{USERS}k8s:app=a;/alive", b"300", lease.id)
    first = operator(tmp_path, "first")
    try:
        await first.start()
        await until(first.leads.is_set)
        await until(lambda: first.controllers.statuses["node-gc"].success_count >= 3)
        assert await store.get(f"{USERS}k8s:app=a;/dead") is not None, "no node is registered: nobody can be told dead"
        await store.put(f"{NODES}default/alive", b"{}", lease.id)
        await until(lambda: first.leftovers.removed == 1)
        left = [item.key for item in (await store.get_prefix(USERS)).items]
        assert left == [f"{USERS}k8s:app=a;/alive"]
        assert first.cluster.nodes == 1
        status, text = await ask(first, "/healthz")
        assert status == 200
        assert text.startswith("leading; file ")
        status, text = await ask(first, "/metrics")
        assert "ciliate_operator_leader 1.0" in text
        assert "ciliate_operator_leftovers_removed_total 1.0" in text
        assert "ciliate_operator_nodes 1.0" in text
        assert 'ciliate_controllers_runs_duration_seconds_count{status="success"}' in text
        document = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
        rows = re.findall(r"^\| `(ciliate_\w+)` \| .*? \| (.*?) \|", document, re.MULTILINE)
        served = set(re.findall(r"^# TYPE (ciliate_\w+)", text, re.MULTILINE))
        assert {name for name in served if not name.endswith("_created")} == {
            name for name, by in rows if "operator" in by
        }
    finally:
        await first.stop()
        await store.stop()


async def test_a_port_that_somebody_took_is_had_as_soon_as_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "AGAIN", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        made = operator(tmp_path, "first")
        made.config = msgspec.structs.replace(made.config, operator_api_serve_addr=f"127.0.0.1:{port}")
        await made.start()
        assert f"operator-api-serve-addr 127.0.0.1:{port}: cannot listen there" in caplog.text
    try:
        await until(lambda: made.server.port == port)
    finally:
        await made.stop()


async def test_an_address_that_is_not_ours_is_named(tmp_path: Path) -> None:
    made = operator(tmp_path, "first")
    made.config = msgspec.structs.replace(made.config, operator_api_serve_addr="192.0.2.77:9234")
    with pytest.raises(OSError, match=r"operator-api-serve-addr 192\.0\.2\.77:9234: cannot listen there"):
        await made.start()
