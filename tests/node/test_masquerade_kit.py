"""The conformance kit of masquerading: shipped engines pass, one that does nothing fails. Tier node."""

from __future__ import annotations

import pytest

from ciliate.masquerade import Masquerade
from ciliate.plugin import MasqueradeProvider, PluginManager
from ciliate.plugin.conformance import check_target, run_kit
from ciliate.plugin.loading import FoundPlugin
from ciliate.plugin.manager import LoadedProvider


@pytest.mark.parametrize("target", ["masquerade-bpf", "masquerade-iptables"])
async def test_shipped_engines_pass(target: str) -> None:
    report = await check_target(target)
    assert [item for item in report if item["state"] != "passed"] == []
    assert len(report) == 6


async def test_an_engine_that_does_nothing_fails() -> None:
    manager = PluginManager.load()
    nothing = manager.select("masquerade", "none").provider.factory

    def make(context: object) -> Masquerade:
        engine: Masquerade = nothing(context)  # type: ignore[arg-type]
        return engine

    record = MasqueradeProvider(name="idle", summary="", factory=make)
    loaded = LoadedProvider("masquerade", record, FoundPlugin("idle", "idle", "local", "0"))
    outcomes = {item.case: item for item in await run_kit(loaded, manager)}
    assert outcomes["every protocol gets the nodes address"].state == "failed"
    assert "expected 192.0.2.1" in outcomes["every protocol gets the nodes address"].message
    assert outcomes["other destinations see the pod"].state == "passed"
    assert outcomes["nothing is left"].state == "failed"


async def test_none_is_skipped() -> None:
    (item,) = await check_target("masquerade-none")
    assert item["state"] == "skipped"
