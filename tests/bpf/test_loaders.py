"""The loaders against each other: what a build has as constants, upgrades, and switching under traffic. Tier bpf."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from bpf_harness import NODE_MAC, PEER, PEER4, POD, POD4, POD_MAC, Programs, ep_config
from live_harness import CLIENT, LOADERS, SERVER, STRANGER, InNode, Net, address, connect_all, family_of, listen
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from ciliate.datapath import devices, layout
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.libbpf import constants, read
from ciliate.policy.mapstate import INGRESS, PolicyEntry, PolicyKey, Verdict
from ciliate_loader.template_loader import DEFINES, TemplateLoader

FRAME = Ether(src=POD_MAC, dst=NODE_MAC) / IP(src=POD4, dst=PEER4) / UDP(dport=9)
PROGRAMS = {"shared": {"entry_from", "entry_to"}, "template": {"from_container", "to_container"}}
HOUSEKEEPING = 190
DENIED = 133
only_template = pytest.mark.parametrize("build", ["template"], indirect=True)
from_shared = pytest.mark.parametrize("build", ["shared"], indirect=True)


def test_defines_make_another_object(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path)
    assert len({compiler.digest("endpoint", defines) for defines in ((), DEFINES, ("X=1",), ("X=2",))}) == 4
    shared, template = (set(constants(read(compiler.compile("endpoint", defines)))) for defines in ((), DEFINES))
    assert shared - template == {"test_endpoint"}
    assert template - shared == {"own_endpoint"}


def test_identity_and_validity_are_read_for_every_packet(programs: Programs) -> None:
    programs.enforce(PEER, {PolicyKey(INGRESS, 777): PolicyEntry(Verdict.ALLOW)}, ingress=True)
    assert programs.why(FRAME) == DENIED
    programs.write(POD, ep_config(POD, 777, layout.EP_VALID))
    assert programs.why(FRAME) == 0
    programs.write(POD, ep_config(POD, 777))
    assert programs.why(FRAME) == 165


def test_a_template_has_addresses_and_device_as_constants(programs: Programs, build: str) -> None:
    """Another endpoint's fixed data under this id: a template goes by its own, or, for another device, not at all."""
    programs.write(POD, ep_config(PEER, flags=layout.EP_VALID))
    assert programs.why(FRAME) == (0 if build == "template" else 130)
    programs.write(POD, ep_config(POD, flags=layout.EP_VALID, ifindex=2))
    assert programs.why(FRAME) == (165 if build == "template" else 0)


@only_template
async def test_an_upgrade_renews_the_programs_of_those_that_are_still_there(net: Net, node: InNode) -> None:
    configs = await connect_all(node)
    server, client, stranger = (configs[number] for number in (SERVER, CLIENT, STRANGER))
    before = node.programs(server.ifname)
    assert set(before) == PROGRAMS["template"]
    net.run("node", lambda: devices.delete_device(client.ifname))
    await node.datapath.remove_endpoint(STRANGER)
    left = node.programs(stranger.ifname)
    await node.datapath.upgrade()
    after = node.programs(server.ifname)
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    assert node.programs(stranger.ifname) == left
    assert await node.run(lambda: gone(before))


@only_template
async def test_a_new_agent_replaces_the_programs_that_it_finds(node: InNode) -> None:
    configs = await connect_all(node)
    server = configs[SERVER]
    before = node.programs(server.ifname)
    await node.restart()
    assert node.programs(server.ifname) == before
    await node.datapath.add_endpoint(server, {})
    assert not set(node.programs(server.ifname).values()) & set(before.values())


@only_template
async def test_an_endpoint_without_entry_gets_no_programs_and_a_detached_one_leaves_none(node: InNode) -> None:
    configs = await connect_all(node)
    server, client = configs[SERVER], configs[CLIENT]
    loader = TemplateLoader()
    with pytest.raises(DatapathError, match="not prepared"):
        await node.run(lambda: loader.attach(server.ifindex, SERVER))
    await node.run(lambda: loader.prepare(node.datapath._plan()))
    before = node.programs(server.ifname)
    for ifindex, endpoint in ((server.ifindex, 99), (server.ifindex, CLIENT)):
        with pytest.raises(DatapathError, match="has no valid entry") as caught:
            await node.run(lambda ifindex=ifindex, endpoint=endpoint: loader.attach(ifindex, endpoint))
        assert caught.value.errno == errno.ENOENT
    assert node.programs(server.ifname) == before
    await node.run(lambda: loader.attach(client.ifindex, CLIENT))
    own = node.programs(client.ifname)
    await node.run(lambda: loader.detach(client.ifindex))
    assert node.programs(client.ifname) == {}
    assert await node.run(lambda: gone(own))
    await node.run(loader.close)


def gone(programs: dict[str, int]) -> bool:
    """Whether the kernel has none of these programs any more; it frees them a moment after the last holder went."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(exists(number) for number in programs.values()):
            return True
        time.sleep(0.05)
    return False


def exists(number: int) -> bool:
    from ciliate.datapath import bpf

    try:
        os.close(bpf.call(13, bytearray(struct.pack("=III", number, 0, 0))))  # BPF_PROG_GET_FD_BY_ID
    except FileNotFoundError:
        return False
    return True


class Transfer:
    """One TCP connection from CLIENT to SERVER that carries data until it is told to stop."""

    def __init__(self, net: Net, family: int) -> None:
        target = address(SERVER, family)
        with listen(net, socket.SOCK_STREAM, target, 80) as server:
            self.out = net.run(f"pod{CLIENT}", lambda: socket.create_connection((target, 80), 3))
            self.into, _ = server.accept()
        for end in (self.out, self.into):
            end.settimeout(5)
        self.stop = threading.Event()
        self.tasks = [asyncio.create_task(asyncio.to_thread(work)) for work in (self._send, self._receive)]

    def _send(self) -> tuple[int, str]:
        digest, block, count = hashlib.sha256(), os.urandom(32768), 0
        while not self.stop.is_set():
            data = count.to_bytes(8, "big") + block
            digest.update(data)
            self.out.sendall(data)
            count += 1
        self.out.shutdown(socket.SHUT_WR)
        return count * (len(block) + 8), digest.hexdigest()

    def _receive(self) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        while data := self.into.recv(1 << 16):
            digest.update(data)
            size += len(data)
        return size, digest.hexdigest()

    async def finish(self) -> tuple[tuple[int, str], tuple[int, str], int]:
        """Size and digest of what was sent and of what came, and how many segments were lost on the way."""
        self.stop.set()
        try:
            sent, received = await asyncio.gather(*self.tasks)
            return sent, received, await self._lost()
        finally:
            self.out.close()
            self.into.close()

    async def _lost(self) -> int:
        """Data segments that went out, repeated ones too, less those that came. Repeats alone may be of late ones."""
        for _ in range(20):
            lost = segments(self.out)[1] - segments(self.into)[0]
            if not lost:
                break
            await asyncio.sleep(0.05)
        return lost


def segments(sock: socket.socket) -> tuple[int, int]:
    """Data segments that came in and that went out (``data_segs_in`` and ``data_segs_out`` of ``struct tcp_info``)."""
    came, went = struct.unpack_from("=II", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 152)
    return came, went


@from_shared
async def test_switching_loaders_under_tcp_loses_nothing(net: Net, node: InNode) -> None:
    configs = await connect_all(node)
    transfers = [Transfer(net, family) for family in (4, 6)]
    try:
        for _ in range(12):
            await asyncio.sleep(0.1)
            await node.switch()
            for config in configs.values():
                assert set(node.programs(config.ifname)) == PROGRAMS[node.loader]
        await node.datapath.upgrade()
    finally:
        outcomes = [await transfer.finish() for transfer in transfers]
    for sent, received, lost in outcomes:
        assert received == sent
        assert sent[0] > 10_000_000
        assert lost == 0
    dropped = {reason for reason, _ in await node.datapath.metrics() if reason}
    assert dropped <= {HOUSEKEEPING}


def flood(net: Net, source: str, target: str, stop: threading.Event) -> int:
    """Send datagrams that policy denies; how many."""

    def send() -> int:
        sent = 0
        with socket.socket(family_of(target), socket.SOCK_DGRAM) as sock:
            while not stop.is_set():
                sock.sendto(b"x", (target, 9))
                sent += 1
        return sent

    return int(net.run(source, send))


@from_shared
async def test_no_packet_finds_a_device_without_filter(net: Net, node: InNode) -> None:
    """Every one of a flood of denied packets is counted as dropped, whichever loader replaces the other's filters."""
    configs = await connect_all(node)
    await node.datapath.sync_policy(CLIENT, {}, False, True)
    await node.datapath.sync_policy(SERVER, {}, True, False)
    stop, target = threading.Event(), address(SERVER, 4)
    floods = [asyncio.create_task(asyncio.to_thread(flood, net, name, target, stop)) for name in ("node", "pod2")]
    plan = node.datapath._plan()

    def replace() -> None:
        loaders = [make() for make in LOADERS.values()]
        for loader in loaders:
            loader.prepare(plan)
        for _ in range(40):
            for loader in loaders:
                for number in (SERVER, CLIENT):
                    loader.attach(configs[number].ifindex, number)
        for loader in loaders:
            loader.close()

    try:
        await node.run(replace)
    finally:
        stop.set()
        to_server, from_client = await asyncio.gather(*floods)
    metrics = await node.datapath.metrics()
    assert (metrics[DENIED, 0][0], metrics[DENIED, 1][0]) == (to_server, from_client)
    assert min(to_server, from_client) > 1000
