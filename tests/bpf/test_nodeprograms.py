"""Programs on the node's own devices, in a namespace of its own, under any endpoint loader. Tier bpf."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from live_harness import InNode, Net

from ciliate.datapath import nodefilters, nodeprograms
from ciliate.datapath.bpf import Map
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.nodeprograms import PROGRAMS, NodeFeature, NodePrograms
from ciliate.datapath.pins import PinDirectory

FEATURE = NodeFeature("trial", "netdev", ("up0",))
SOURCES = Path(nodeprograms.__file__).parents[3] / "bpf" / "ciliate_bpf"


@pytest.fixture
def uplinks(net: Net) -> Net:
    for name in ("up0", "up1"):
        ip(net, "link", "add", name, "type", "veth", "peer", "name", f"{name}peer")
    return net


def ip(net: Net, *arguments: str) -> None:
    subprocess.run(["ip", "-n", f"{net.tag}node", *arguments], check=True)


def tc(net: Net, *arguments: str) -> str:
    command = ["nsenter", f"--net=/run/netns/{net.tag}node", "tc", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


async def filters(node: InNode, device: str) -> list[str]:
    """Names of our filters on a device, ingress first, without the number of the program."""
    index = (await node.run(nodefilters.device_indexes))[device]
    found = await node.run(lambda: nodefilters.attached(index))
    return [found[side].partition(":")[0] for side in sorted(found)]


async def slots(node: InNode) -> set[int]:
    """The slots of ``ciliate_entry`` that are not those of endpoints and have a program."""
    entry = Map.open(node.datapath.pins / "ciliate_entry")
    try:
        return {slot for slot in range(2, entry.max_entries) if entry.lookup(slot.to_bytes(4, "little")) is not None}
    finally:
        entry.close()


BOTH = ["ciliate_entry_from_netdev", "ciliate_entry_to_netdev"]


def programs_of(node: InNode) -> NodePrograms:
    return node.datapath.programs


async def test_a_node_without_features_attaches_and_pins_nothing(node: InNode, uplinks: Net) -> None:
    await programs_of(node).start()
    assert await filters(node, "up0") == []
    assert not [pin.name for pin in node.datapath.pins.iterdir() if "netdev" in pin.name]


async def test_enabled_on_chosen_devices_alone_and_gone_with_its_last_feature(node: InNode, uplinks: Net) -> None:
    programs = programs_of(node)
    await programs.start()
    await programs.enable(FEATURE)
    assert (await filters(node, "up0"), await filters(node, "up1")) == (BOTH, [])
    assert await slots(node) == {2, 3}
    await programs.enable(NodeFeature("other", "netdev", ("up1",)))
    assert (await filters(node, "up0"), await filters(node, "up1")) == (BOTH, BOTH)
    await programs.disable("trial")
    assert (await filters(node, "up0"), await filters(node, "up1")) == ([], BOTH)
    await programs.disable("other")
    assert (await filters(node, "up1"), await slots(node), programs.devices) == ([], set(), set())
    assert not [pin.name for pin in node.datapath.pins.iterdir() if "netdev" in pin.name]


async def test_features_gather_until_start(node: InNode, uplinks: Net) -> None:
    programs = programs_of(node)
    await programs.enable(FEATURE)
    assert await filters(node, "up0") == []
    await programs.start()
    assert await filters(node, "up0") == BOTH


async def test_a_restart_keeps_the_filters_and_removes_what_nobody_wants(node: InNode, uplinks: Net) -> None:
    await programs_of(node).start()
    await programs_of(node).enable(FEATURE)
    before = node.programs("up0")
    await node.restart()
    assert node.programs("up0") == before, "the dispatchers that are attached stay until the new agent is ready"
    await programs_of(node).enable(FEATURE)
    await programs_of(node).start()
    assert node.programs("up0") == before
    await node.restart()
    await programs_of(node).start()
    assert await filters(node, "up0") == []
    assert await slots(node) == set()


async def test_uplinks_are_ready_for_programs_before_there_are_any_and_until_all_goes(
    node: InNode, uplinks: Net
) -> None:
    def ready(device: str) -> bool:
        return "clsact" in tc(uplinks, "qdisc", "show", "dev", device)

    programs = programs_of(node)
    programs.uplinks = lambda: ("up0", "absent")
    await programs.start()
    assert (ready("up0"), ready("up1")) == (True, False)
    await programs.enable(FEATURE)
    await programs.disable("trial")
    assert ready("up0")
    await node.run(programs.remove)
    assert not ready("up0")


async def test_filters_of_others_stay(node: InNode, uplinks: Net) -> None:
    tc(uplinks, "qdisc", "add", "dev", "up0", "clsact")
    theirs = ("prio", "5", "protocol", "ip", "u32", "match", "u32", "0", "0", "flowid", "1:1")
    tc(uplinks, "filter", "add", "dev", "up0", "ingress", *theirs)
    await programs_of(node).start()
    await programs_of(node).enable(FEATURE)
    assert await filters(node, "up0") == BOTH
    await programs_of(node).disable("trial")
    left = tc(uplinks, "filter", "show", "dev", "up0", "ingress")
    assert "u32" in left
    assert "bpf" not in left


async def test_mending_puts_back_filters_slots_and_takes_new_devices(node: InNode, uplinks: Net) -> None:
    await programs_of(node).start()
    await programs_of(node).enable(NodeFeature("trial", "netdev", ("up0", "late")))
    assert (await node.datapath.mend()).mended == []
    tc(uplinks, "qdisc", "del", "dev", "up0", "clsact")
    assert (await node.datapath.mend()).mended == ["from_netdev of up0", "to_netdev of up0"]
    entry = Map.open(node.datapath.pins / "ciliate_entry")
    entry.delete((2).to_bytes(4, "little"))
    entry.close()
    assert (await node.datapath.mend()).mended == ["program netdev was not in its place"]
    assert await slots(node) == {2, 3}
    ip(uplinks, "link", "add", "late", "type", "veth", "peer", "name", "latepeer")
    assert (await node.datapath.mend()).mended == ["from_netdev of late", "to_netdev of late"]


async def test_maps_are_filled_before_the_program_serves(node: InNode, uplinks: Net) -> None:
    seen: list[bool] = []

    def loaded(pins: PinDirectory) -> None:
        entry = Map.open(pins.of("ciliate_entry"))
        seen.append(entry.lookup((2).to_bytes(4, "little")) is None)
        entry.close()

    await programs_of(node).start()
    await programs_of(node).enable(NodeFeature("trial", "netdev", ("up0",), loaded=loaded))
    assert seen == [True]


async def test_what_does_not_compile_leaves_the_old_program(node: InNode, uplinks: Net) -> None:
    programs = programs_of(node)
    await programs.start()
    await programs.enable(FEATURE)
    with pytest.raises(DatapathError, match=r"netdev\.c does not compile"):
        await programs.enable(NodeFeature("broken", "netdev", ("up0",), defines=("from_netdev=0",)))
    assert list(programs.features()) == ["trial"]
    assert await filters(node, "up0") == BOTH
    assert await slots(node) == {2, 3}


async def test_native_devices_are_those_of_default_routes_else_those_with_addresses(node: InNode, uplinks: Net) -> None:
    assert await node.run(lambda: nodefilters.native_devices(" a, b ")) == ["a", "b"]
    ip(uplinks, "address", "add", "192.0.2.1/24", "dev", "up1")
    ip(uplinks, "link", "set", "up1", "up")
    assert await node.run(lambda: nodefilters.native_devices("")) == ["up1"]
    ip(uplinks, "address", "add", "192.0.3.1/24", "dev", "up0")
    ip(uplinks, "link", "set", "up0", "up")
    ip(uplinks, "route", "add", "default", "via", "192.0.3.2")
    assert await node.run(lambda: nodefilters.native_devices("")) == ["up0"]


def test_slots_are_those_of_the_header() -> None:
    header = (SOURCES / "lib" / "maps.h").read_text()
    for attachments in PROGRAMS.values():
        for item in attachments:
            assert f"#define SLOT_{item.function.upper()} {item.slot}" in header
