"""The kits: shipped providers pass them; broken ones fail with a message that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ciliate.plugin import IpamProvider, KvstoreProvider, PluginManager, hookimpl
from ciliate.plugin.conformance import Outcome, check_target, kvstore, run_kit


@pytest.mark.parametrize(
    ("target", "cases"), [("kvstore-embedded", 17), ("identity-kvstore", 9), ("ipam-host-scope", 8)]
)
async def test_shipped_providers_pass(target: str, cases: int) -> None:
    report = await check_target(target)
    assert [item for item in report if item["state"] != "passed"] == []
    assert len(report) == cases


async def outcomes(record: Any, hook: str) -> list[Outcome]:
    import types

    module = types.ModuleType("broken")

    def register() -> Any:
        return record

    register.__name__ = hook
    setattr(module, hook, hookimpl(register))
    manager = PluginManager.load()
    manager.register(module, "broken")
    return await run_kit(manager.select(record.kind, record.name), manager)


async def test_a_store_that_forgets_events_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore, "SOON", 1.0)
    from ciliate_kvstore.sqlite import SqliteStore

    class Forgetful(SqliteStore):
        """Loses every third change on its way to a watcher, and its conditions always hold."""

        async def watch_prefix(self, prefix: str, start_revision: int = 0) -> Any:
            async for batch in super().watch_prefix(prefix, start_revision):
                yield [event for event in batch if event.mod_revision % 3]

        async def transaction(self, compare: Any, success: Any, failure: Any = ()) -> Any:
            return await super().transaction([], success, failure)

    def make(context: Any) -> Any:
        return Forgetful(Path(context.state_dir) / "kv.db")

    record = KvstoreProvider(name="forgetful", summary="", factory=make)
    failed = {
        item.case: item.message for item in await outcomes(record, "ciliate_register_kvstore") if item.state == "failed"
    }
    assert "a watch sees every change in order" in failed
    assert "one of many creators wins" in failed
    assert "expected 1" in failed["one of many creators wins"]
    assert "put then get" not in failed


async def test_addresses_given_twice_fail() -> None:
    from ciliate_ipam.allocator import HostScope

    class Generous(HostScope):
        """Gives what it was asked for last time again."""

        async def release(self, owner: str) -> bool:
            for family in self._ranges.values():
                family.next = family.first
            return await super().release(owner)

        async def claim(self, owner: str, addresses: Any) -> None:
            self._owners.update(dict.fromkeys(addresses, owner))

    def make(context: Any) -> Any:
        config = context.config
        return Generous([config.ipv4_range, config.ipv6_range], Path(context.state_dir) / "ipam.json")

    record = IpamProvider(name="generous", summary="", factory=make)
    failed = {
        item.case: item.message for item in await outcomes(record, "ciliate_register_ipam") if item.state == "failed"
    }
    assert "expected IpamConflict" in failed["owners are exclusive"]
    assert "given again at once" in failed["released addresses rest"]


async def test_a_factory_that_raises_is_a_failure_of_each_case() -> None:
    record = KvstoreProvider(name="unmakeable", summary="", factory=lambda context: 1 / 0)
    results = await outcomes(record, "ciliate_register_kvstore")
    assert {item.state for item in results} == {"failed"}
    assert "ZeroDivisionError" in results[0].message
