"""What changes between two nodes under traffic: agents, programs, modes, nodes that go; forged packets. Tier bpf."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import threading
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import nodes_harness as harness
import pytest
from click.testing import CliRunner
from live_harness import LOADERS, Net, read_drops, tcp
from nodes_harness import (
    CLIENT,
    IDENTITY,
    SERVER,
    Mode,
    PodNode,
    address,
    node_record,
    router,
    two_nodes,
    underlay,
)
from scapy.contrib.geneve import GENEVE
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet
from test_live_nodes import ALL, TUNNELS, Pair, echo, every, listen

from ciliate.cli.bpf import command
from ciliate.datapath import devices, layout
from ciliate.datapath.bpf import Map
from ciliate.datapath.events import EventReader, MonitorEvent, decode
from ciliate.datapath.noderoutes import PROTOCOL
from ciliate.node import Node

VXLAN4, GENEVE6 = Mode("vxlan", 4), Mode("geneve", 6)


class Flow:
    """One datagram after the other to the server and back, by a client whose socket stays; each has to be answered."""

    def __init__(self, net: Net, family: int) -> None:
        self.answered, self.lost = 0, 0
        self._ends = threading.Event(), threading.Event()
        self._step = threading.Event()
        self._server = listen(net, SERVER, socket.SOCK_DGRAM, 53)
        self._target = (address(SERVER, family), 53)
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self._client = net.run(f"pod{CLIENT}", lambda: socket.socket(kind, socket.SOCK_DGRAM))
        self._threads = [threading.Thread(target=work) for work in (self._ask, self._serve)]

    def __enter__(self) -> Flow:
        for thread in self._threads:
            thread.start()
        return self

    def _serve(self) -> None:
        self._server.settimeout(0.2)
        while not self._ends[1].is_set():
            with contextlib.suppress(TimeoutError):
                self._server.sendto(*self._server.recvfrom(100))

    def _ask(self) -> None:
        self._client.settimeout(1)
        while not self._ends[0].is_set():
            self._client.sendto(b"%d" % self.answered, self._target)
            try:
                self._client.recv(100)
                self.answered += 1
                self._step.set()
            except TimeoutError:
                self.lost += 1

    async def goes_on(self, count: int = 50) -> None:
        """Wait until so many more were answered."""
        wanted = self.answered + count
        async with asyncio.timeout(10):
            while self.answered < wanted and not self.lost:
                await asyncio.to_thread(self._step.wait, 0.1)
                self._step.clear()

    def __exit__(self, *_: object) -> None:
        # first who asks, so that the last question still gets its answer
        for end, thread in zip(self._ends, self._threads, strict=True):
            end.set()
            thread.join()
        self._server.close()
        self._client.close()


@every(ALL)
async def test_a_new_agent_and_new_programs_lose_no_packet(between: Net, pair: Pair, mode: Mode) -> None:
    first, second = pair
    before = await tunnel_device(first, mode)
    with Flow(between, 4) as flow:
        await flow.goes_on()
        for node in (first, second):
            await node.restart()
            await flow.goes_on()
            await node.datapath.upgrade()
            await flow.goes_on()
        await first.datapath.switch_loader(LOADERS["template"]())
        await flow.goes_on()
    assert flow.lost == 0
    assert await tunnel_device(first, mode) == before, "the device was taken over as it was"


async def tunnel_device(node: PodNode, mode: Mode) -> dict[str, int]:
    """Name and index of every tunnel device."""
    found: dict[str, int] = await node.datapath._run(devices.list_devices)
    return {name: index for name, index in found.items() if name in ("ciliate_vxlan", "ciliate_geneve")}


@pytest.mark.parametrize("mode", [VXLAN4])
async def test_routing_modes_are_exchanged_and_nothing_of_the_old_one_stays(between: Net, pair: Pair) -> None:
    with listen(between, SERVER, socket.SOCK_STREAM, 80):
        for mode in (Mode("geneve", 6), Mode("direct"), Mode("geneve", 4), Mode("vxlan", 6)):
            for node in pair:
                await node.switch(mode)
            for family in (4, 6):
                assert tcp(between, f"pod{CLIENT}", address(SERVER, family), 80, 3), mode
            left = list(await tunnel_device(pair[0], mode))
            assert left == ([] if mode.name == "direct" else [f"ciliate_{mode.name}"])
            pins = {pin.name for pin in pair[0].datapath.pins.iterdir()}
            assert ("ciliate_nodes" in pins) == (mode.name != "direct")
            assert ("entry_from_overlay" in pins) == (mode.name != "direct")
            assert ("entry_from_netdev" in pins) == (mode.name == "geneve")


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def routes(net: Net, node: int) -> list[str]:
    """Our routes to other nodes."""
    found = []
    for family in ("-4", "-6"):
        found += run("ip", "-n", f"{net.tag}n{node}", family, "route", "show", "proto", str(PROTOCOL)).splitlines()
    return found


def listed(node: PodNode, what: str) -> list[dict[str, str]]:
    """What `ciliate bpf ... list` shows."""
    options = ["--bpf-root", str(node.root / "bpffs"), "--instance", "test", what, "list", "-o", "json"]
    rows: list[dict[str, str]] = json.loads(CliRunner().invoke(command, options).output)
    return rows


def entries(node: PodNode, name: str) -> dict[bytes, bytes]:
    path = node.datapath.pins / name
    if not path.exists():
        return {}
    with contextlib.closing(Map.open(path)) as table:
        return dict(table.items())


@every(ALL)
async def test_a_node_that_goes_takes_everything_of_it_along(between: Net, pair: Pair, mode: Mode) -> None:
    first, _ = pair
    record = node_record(2, mode)
    assert len(routes(between, 1)) == 2
    assert len(entries(first, "ciliate_tunnel")) == (0 if mode.name == "direct" else 2)
    assert len(entries(first, "ciliate_nodes")) == (0 if mode.name == "direct" else 1)
    shown = {row["prefix"]: row["node"] for row in listed(first, "tunnel")}
    tunnelled = {str(harness.pods(2, family)): underlay(2, mode.underlay) for family in (4, 6)}
    assert shown == ({} if mode.name == "direct" else tunnelled)
    nodes = {row["prefix"].partition("/")[0]: row["node"] for row in listed(first, "ipcache")}
    assert nodes[address(SERVER, 6)] == ("" if mode.name == "direct" else underlay(2, mode.underlay))
    assert not await first.datapath.nodes.update_nodes([], [record])
    assert routes(between, 1) == []
    assert not entries(first, "ciliate_tunnel")
    assert not entries(first, "ciliate_nodes")
    assert not await first.datapath.nodes.update_nodes([record], [])
    with listen(between, SERVER, socket.SOCK_STREAM, 82):
        assert tcp(between, "n1", address(SERVER, 4), 82, 3)
    # and what an earlier run left, by an agent that never heard of that node
    await first.datapath.stop()
    first.datapath = first._make()
    await first.datapath.start()
    await first.datapath.programs.start()
    assert len(routes(between, 1)) == 2
    assert not await first.datapath.nodes.sync_nodes([], prune=False)
    assert len(routes(between, 1)) == 2
    assert bool(entries(first, "ciliate_nodes")) == (mode.name != "direct")
    assert not await first.datapath.nodes.sync_nodes([])
    assert routes(between, 1) == []
    assert not entries(first, "ciliate_tunnel")
    assert not entries(first, "ciliate_nodes")


@pytest.mark.parametrize("mode", [VXLAN4, Mode("direct")], ids=["vxlan", "direct"])
async def test_a_node_moves_and_its_range_passes_to_another(between: Net, pair: Pair, mode: Mode) -> None:
    """Who came last has a range; who has it still gets it back. Nothing of an old address stays."""
    first, _ = pair
    old = node_record(2, mode)
    moved = msgspec.structs.replace(old, ipv4=IPv4Address("192.0.2.9"))
    heir = msgspec.structs.replace(old, name="heir", ipv4=IPv4Address("192.0.2.3"))
    steps: list[tuple[list[Node], list[Node], list[Node]]] = [
        # who comes, who goes, who has something then: the last one the range
        ([moved], [], [moved]),
        ([heir], [], [moved, heir]),
        ([], [heir], [moved]),
        ([heir], [], [moved, heir]),
        ([], [moved], [heir]),
        ([old], [heir], [old]),
        ([], [old], []),
    ]
    for upserts, deletes, having in steps:
        assert not await first.datapath.nodes.update_nodes(upserts, deletes)
        way = run("ip", "-n", f"{between.tag}n1", "-4", "route", "show", str(harness.pods(2, 4)))
        if mode.name == "direct":
            assert (f"via {having[-1].ipv4} " in way) if having else not way
            continue
        assert bool(way) == bool(having)
        shown = {row["prefix"]: row["node"] for row in listed(first, "tunnel")}
        assert set(shown.values()) == {str(node.ipv4) for node in having[-1:]}
        known = {layout.node_key(node.ipv4) for node in having if node.ipv4}
        assert entries(first, "ciliate_nodes").keys() == known


@pytest.mark.parametrize("mode", [VXLAN4, Mode("direct")], ids=["vxlan", "direct"])
async def test_the_administrators_route_stays_and_the_node_is_reported(between: Net, pair: Pair, mode: Mode) -> None:
    first, _ = pair
    await first.datapath.nodes.sync_nodes([])
    here = ("ip", "-n", f"{between.tag}n1", "route")
    run(*here, "add", str(harness.pods(2, 4)), "via", underlay(2, 4))
    failed = await first.datapath.nodes.update_nodes([node_record(2, mode)], [])
    assert {number: error.strerror for number, error in failed.items()} == {
        "default/n2": f"route to {harness.pods(2, 4)} via {underlay(2, 4)}: File exists"
        if mode.name == "direct"
        else f"route to {harness.pods(2, 4)} via device {first.datapath._router}: File exists"
    }
    await first.datapath.nodes.sync_nodes([])
    shown = run(*here, "show")
    assert str(harness.pods(2, 4)) in shown
    assert "proto 193" not in shown


async def test_a_tunnel_device_that_somebody_took_is_put_back(between: Net, tmp_path: Path, templates: Path) -> None:
    async with two_nodes(between, VXLAN4, tmp_path, templates) as (first, _):
        with listen(between, SERVER, socket.SOCK_STREAM, 80):
            assert tcp(between, f"pod{CLIENT}", address(SERVER, 4), 80, 3)
            run("ip", "-n", f"{between.tag}n1", "link", "del", "ciliate_vxlan")
            assert "the tunnel device" in (await first.datapath.mend()).mended
            assert tcp(between, f"pod{CLIENT}", address(SERVER, 4), 80, 3)


def forged(mode: Mode, source: str, vni: int, inside: Packet) -> Packet:
    """A tunnel packet to the second node, as anybody on its link could send it."""
    port = 8472 if mode.name == "vxlan" else 6081
    outer = IP(src=source, dst=underlay(2, 4)) if mode.underlay == 4 else IPv6(src=source, dst=underlay(2, 6))
    header = VXLAN(vni=vni, flags=8) if mode.name == "vxlan" else GENEVE(vni=vni, proto=0x6558)
    return outer / UDP(sport=40000, dport=port) / header / inside


@every(TUNNELS)
async def test_forged_tunnel_packets_do_not_reach_a_pod(between: Net, pair: Pair, mode: Mode) -> None:
    _, second = pair
    good = underlay(1, mode.underlay)
    bad = "192.0.2.66" if mode.underlay == 4 else "2001:db8:ff::66"
    inside = Ether(dst="02:00:00:00:00:01") / IP(src=address(CLIENT, 4), dst=address(SERVER, 4))
    own = Ether(dst="02:00:00:00:00:01") / IP(src=router(2, 4), dst=address(SERVER, 4))
    own_pod = Ether(dst="02:00:00:00:00:01") / IP(src=address(SERVER, 4), dst=address(SERVER, 4))
    reader = EventReader(second.datapath.events_path)
    read_drops(reader)
    cases = [
        (bad, IDENTITY[CLIENT], inside, 194),
        (good, 0, inside, 195),
        (
            good,
            1,
            inside,
            133,
        ),  # who has that address is no host: what the ipcache says of it, and port 83 is not for it
        (good, IDENTITY[CLIENT], own, 132),
        (good, 1, own, 132),
        (good, IDENTITY[SERVER], own_pod, 132),
        (good, 2, inside, 133),
    ]
    if mode.name == "geneve":
        cases = cases[1:]  # an unknown node's packet stays Geneve, and the kernel's device refuses it
    with harness.capture(between, 1) as wire, listen(between, SERVER, socket.SOCK_DGRAM, 83) as server:
        link = between.run("n1", lambda: hardware_addresses(between))
        for source, vni, packet, _ in cases:
            frame = Ether(src=link[0], dst=link[1]) / forged(mode, source, vni, packet / UDP(dport=83))
            wire.send(bytes(frame))
        if mode.name == "geneve":
            wire.send(
                bytes(Ether(src=link[0], dst=link[1]) / forged(mode, bad, IDENTITY[CLIENT], inside / UDP(dport=83)))
            )
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(100)
    assert [drop.reason for drop in read_drops(reader)] == [reason for *_, reason in cases]
    reader.close()


def hardware_addresses(net: Net) -> tuple[str, str]:
    """MAC addresses of both ends of the link between the nodes."""
    found = []
    for number in (1, 2):
        text = run("ip", "-n", f"{net.tag}n{number}", "-o", "link", "show", "eth0")
        found.append(text.partition("link/ether ")[2].split()[0])
    return found[0], found[1]


@pytest.mark.parametrize("mode", [Mode("direct")])
async def test_nobody_on_the_link_is_a_pod_of_this_node(between: Net, pair: Pair) -> None:
    """Direct routing: a pod of the node itself, or the node's own address, cannot come from the link."""
    _, second = pair
    reader = EventReader(second.datapath.events_path)
    read_drops(reader)
    with harness.capture(between, 1) as wire:
        link = hardware_addresses(between)
        for source in (router(2, 4), underlay(2, 4), address(SERVER, 4)):
            frame = Ether(src=link[0], dst=link[1]) / IP(src=source, dst=address(SERVER, 4)) / TCP(dport=83, flags="S")
            wire.send(bytes(frame))
    async with asyncio.timeout(5):
        drops = read_drops(reader)
        while len(drops) < 1:
            await asyncio.sleep(0.01)
            drops += read_drops(reader)
    assert {(drop.src_identity, drop.reason) for drop in drops} == {(2, 132)}
    reader.close()


def step(event: MonitorEvent) -> tuple[str, int, int]:
    return event.observation, event.src_identity, event.dst_identity


@pytest.mark.parametrize("mode", [VXLAN4])
async def test_the_monitor_shows_each_step_between_nodes(between: Net, pair: Pair) -> None:
    readers = [EventReader(node.datapath.events_path) for node in pair]
    for reader in readers:
        list(reader.read())
    with listen(between, SERVER, socket.SOCK_DGRAM, 53) as server:
        assert echo(between, server, CLIENT, address(SERVER, 4), 53, b"x", 3)
        assert tcp(between, "n1", address(SERVER, 4), 81, 0.2) is False
    steps = [[step(event) for event in map(decode, reader.read()) if event.type == "trace"] for reader in readers]
    client, server_id = IDENTITY[CLIENT], IDENTITY[SERVER]
    assert steps[0][:4] == [
        ("from-endpoint", client, 0),
        ("to-overlay", client, server_id),
        ("from-overlay", server_id, 0),
        ("to-endpoint", server_id, client),
    ]
    assert ("from-host", 1, server_id) in steps[0]
    assert ("to-overlay", 1, server_id) in steps[0]
    assert steps[1][:4] == [
        ("from-overlay", client, 0),
        ("to-endpoint", client, server_id),
        ("from-endpoint", server_id, 0),
        ("to-overlay", server_id, client),
    ]
    for reader in readers:
        reader.close()


@pytest.mark.parametrize(("functions", "loader"), [("global", "template"), ("inline", "shared")])
async def test_every_build_and_loader_between_nodes(
    between: Net,
    tmp_path: Path,
    templates: Path,
    functions: str,
    loader: str,
) -> None:
    async with two_nodes(between, GENEVE6, tmp_path, templates, loader, functions):
        with listen(between, SERVER, socket.SOCK_STREAM, 80), listen(between, SERVER, socket.SOCK_STREAM, 81):
            for family in (4, 6):
                assert tcp(between, f"pod{CLIENT}", address(SERVER, family), 80, 3)
                assert not tcp(between, f"pod{CLIENT}", address(SERVER, family), 81, 0.2)
