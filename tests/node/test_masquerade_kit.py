"""The conformance kit of masquerading: shipped engines pass, one that does nothing fails. Tier node."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from faults_harness import wait_for
from nft_engine import DeafNftMasquerade, NftMasquerade, provider

from ciliate.masquerade import Masquerade
from ciliate.plugin import MasqueradeProvider, PluginManager
from ciliate.plugin.conformance import Outcome, cases_of, check_target, run_kit
from ciliate.plugin.conformance.masquerade import Site
from ciliate.plugin.loading import FoundPlugin
from ciliate.plugin.manager import LoadedProvider


@pytest.mark.parametrize("target", ["masquerade-bpf", "masquerade-iptables"])
async def test_shipped_engines_pass(target: str) -> None:
    report = await check_target(target)
    assert {item["case"]: item["message"] for item in report if item["state"] != "passed"} == {}
    assert len(report) == len(cases_of("masquerade"))


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


async def outcomes_of(engine: Callable[[], NftMasquerade]) -> dict[str, Outcome]:
    loaded = LoadedProvider("masquerade", provider(engine), FoundPlugin("nft", "nft", "stranger", "0"))
    return {item.case: item for item in await run_kit(loaded, PluginManager.load())}


async def test_a_strangers_engine_that_heeds_the_protocol_passes() -> None:
    found = await outcomes_of(NftMasquerade)
    assert {case: item.message for case, item in found.items() if item.state != "passed"} == {}
    assert found["flows of another engine go on"].state == "passed"


async def test_an_engine_that_does_not_spare_the_flows_of_others_fails() -> None:
    found = await outcomes_of(DeafNftMasquerade)
    assert {case for case, item in found.items() if item.state != "passed"} == {"flows of another engine go on"}
    assert "from port 40000 ended when the engine came beside" in found["flows of another engine go on"].message


async def test_none_is_skipped() -> None:
    (item,) = await check_target("masquerade-none")
    assert item["state"] == "skipped"


def test_the_kits_node_can_ask_for_its_neighbours_at_once() -> None:
    """While a device looks for a duplicate of its link-local address, the kernel asks nobody where a pod is."""

    def of_node(command: str) -> str:
        return subprocess.run(["sh", "-ec", command], check=True, capture_output=True, text=True).stdout

    site = Site()
    try:
        with site.inside():
            # two devices, each with an address of its own link
            settled = "ip -6 -o address show scope link -tentative"
            wait_for(lambda: of_node(settled).count("fe80:") == 2, "the link-local addresses of the kit's node")
            asked = of_node("cat /proc/thread-self/net/snmp6").split("Icmp6OutNeighborSolicits")[1].split()[0]
        assert asked == "0"
    finally:
        site.close()
