"""Two nodes joined by the datapath alone: every routing mode, both families, allowed and denied. Tier bpf."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import socket
import subprocess
import threading
from pathlib import Path

import nodes_harness as harness
import pytest
from live_harness import Net, family_of, ping, tcp
from nodes_harness import (
    CLIENT,
    IDENTITY,
    SERVER,
    STRANGER,
    Mode,
    PodNode,
    address,
    router,
    underlay,
)
from scapy.contrib.geneve import GENEVE
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet

ALL = [Mode("vxlan", 4), Mode("vxlan", 6), Mode("geneve", 4), Mode("geneve", 6), Mode("direct")]
TUNNELS = ALL[:4]
Pair = tuple[PodNode, PodNode]
WAIT = 0.25


def every(modes: list[Mode]) -> pytest.MarkDecorator:
    """Run a test in each of these routing modes."""
    return pytest.mark.parametrize("mode", modes, ids=lambda mode: f"{mode.name}-over-{mode.underlay}")


def listen(net: Net, pod: int, kind: socket.SocketKind, port: int) -> socket.socket:
    """A socket of a pod for both families."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            sock.listen(8)
        sock.settimeout(5)
        return sock

    made: socket.socket = net.run(f"pod{pod}", make)
    return made


def echo(net: Net, server: socket.socket, pod: int, target: str, port: int, data: bytes, wait: float) -> bool:
    """Whether a datagram comes back from the server, unchanged."""

    def send() -> bool:
        with socket.socket(family_of(target), socket.SOCK_DGRAM) as sock:
            sock.settimeout(wait)
            server.settimeout(wait)
            sock.sendto(data, (target, port))
            with contextlib.suppress(TimeoutError):
                server.sendto(*server.recvfrom(1 << 16))
                return sock.recv(1 << 16) == data
            return False

    return bool(net.run(f"pod{pod}", send))


def no_echo(net: Net, pod: int, target: str) -> bool:
    """Whether an echo request stays without an answer."""
    command = ["nsenter", f"--net=/run/netns/{net.tag}pod{pod}", "ping", "-c1", f"-W{WAIT}", "-n", target]
    return subprocess.run(command, capture_output=True, check=False).returncode == 1


@every(ALL)
async def test_policy_decides_packets_of_other_nodes(between: Net, pair: Pair) -> None:
    net = between
    with contextlib.ExitStack() as stack:
        for port in (80, 81, 82, 83):
            stack.enter_context(listen(net, SERVER, socket.SOCK_STREAM, port))
        server = stack.enter_context(listen(net, SERVER, socket.SOCK_DGRAM, 53))
        for family in (4, 6):
            target = address(SERVER, family)
            assert tcp(net, f"pod{CLIENT}", target, 80, 3)
            assert not tcp(net, f"pod{CLIENT}", target, 81, WAIT)
            assert not tcp(net, f"pod{STRANGER}", target, 80, WAIT)
            assert echo(net, server, CLIENT, target, 53, b"ping", 3)
            assert not echo(net, server, STRANGER, target, 53, b"ping", WAIT)
            assert ping(net, f"pod{CLIENT}", target)
            assert no_echo(net, STRANGER, target)
            assert tcp(net, "n1", target, 82, 3), "the other node is who the ipcache says"
            assert not tcp(net, "n1", target, 83, WAIT)
            assert tcp(net, "n2", target, 83, 3), "the pod's own node is the host"
            assert not tcp(net, "n2", target, 82, WAIT)
            assert ping(net, f"pod{CLIENT}", router(2, family)), "a pod reaches another node's address for pods"
            assert ping(net, "n1", address(CLIENT, family))


def parsed(frame: bytes, mode: Mode) -> Packet:
    """A frame with what is in the tunnel as its layers."""
    packet = Ether(frame)
    if mode.name == "vxlan":
        packet[UDP].payload = VXLAN(bytes(packet[UDP].payload))
    return packet


@every(TUNNELS)
async def test_the_tunnel_key_on_the_wire_is_the_senders_identity(
    between: Net, pair: Pair, tmp_path: Path, mode: Mode
) -> None:
    """What tcpdump and scapy read on the link, and what the two protocols' documents say of it."""
    harness.plain_link(between)
    port = {"vxlan": 8472, "geneve": 6081}[mode.name]
    with listen(between, SERVER, socket.SOCK_DGRAM, 53) as server, harness.capture(between, 1) as wire:
        for family in (4, 6):
            assert echo(between, server, CLIENT, address(SERVER, family), 53, b"ping", 3)
        captured = [frame for frame in harness.frames(wire) if UDP in Ether(frame) and Ether(frame)[UDP].dport == port]
    assert len(captured) == 4
    layer = VXLAN if mode.name == "vxlan" else GENEVE
    network = IP if mode.underlay == 4 else IPv6
    seen = []
    for frame in captured:
        packet = parsed(frame, mode)
        outer, tunnel = packet[network], packet[layer]
        inner = tunnel.payload[Ether].payload
        seen.append((outer.src, tunnel.vni, inner.src, inner.dst, inner[UDP].dport == 53))
        check_header(packet, mode)
    first, second = underlay(1, mode.underlay), underlay(2, mode.underlay)
    expected = []
    for family in (4, 6):
        client, target = address(CLIENT, family), address(SERVER, family)
        expected += [(first, IDENTITY[CLIENT], client, target, True), (second, IDENTITY[SERVER], target, client, False)]
    assert seen == expected
    text = harness.tcpdump(captured, mode.name, tmp_path)
    if mode.name == "vxlan":
        found = re.findall(r"VXLAN, flags \[I\] \(0x08\), vni (\d+)", text)
    else:
        found = [str(int(vni, 16)) for vni in re.findall(r"Geneve, Flags \[none\], vni (0x[0-9a-f]+)", text)]
    assert found == [str(vni) for _, vni, *_ in expected], text
    assert "bad udp cksum" not in text
    assert "bad cksum" not in text


def check_header(packet: Packet, mode: Mode) -> None:
    """Fixed parts of the header, the outer checksum, and a source port that is a hash of the flow."""
    udp = packet[UDP]
    if mode.name == "geneve":
        header = packet[GENEVE]
        assert (header.version, header.optionlen, header.oam, header.critical) == (0, 0, 0, 0)
        assert (header.reserved, header.reserved2, header.proto) == (0, 0, 0x6558)
    else:
        assert bytes(packet[VXLAN])[:4] == b"\x08\0\0\0"
    assert udp.sport > 1024
    if mode.underlay == 4:
        assert udp.chksum == 0
        return
    again = Ether(bytes(packet))
    del again[UDP].chksum
    assert Ether(bytes(again))[UDP].chksum == udp.chksum != 0


@every(ALL)
@pytest.mark.parametrize("plain", [False, True], ids=["offloaded", "plain"])
async def test_large_streams_and_fragments_arrive_whole(between: Net, pair: Pair, mode: Mode, plain: bool) -> None:
    if plain:
        harness.plain_link(between)
    data = os.urandom(1 << 22)
    with (
        listen(between, SERVER, socket.SOCK_STREAM, 80) as server,
        listen(between, SERVER, socket.SOCK_DGRAM, 53) as datagrams,
        harness.capture(between, 2) as wire,
    ):
        for family in (4, 6):
            target = address(SERVER, family)
            assert await asyncio.to_thread(both_ways, between, server, target, data) == hashlib.sha256(data).hexdigest()
            for size in (100, 1400, 1500, 4000, 60000):
                assert echo(between, datagrams, CLIENT, target, 53, data[:size], 5), size
        if plain:
            assert max(map(len, harness.frames(wire))) <= harness.LINK_MTU + 14
    metrics = {key: await node.datapath.metrics() for key, node in enumerate(pair)}
    assert not [reason for found in metrics.values() for reason, _ in found if reason not in (0, 190)]


def both_ways(net: Net, server: socket.socket, target: str, data: bytes) -> str:
    """Send it to the server and back; the hash of what came back."""

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            while chunk := connection.recv(1 << 16):
                connection.sendall(chunk)

    def dial() -> str:
        content = hashlib.sha256()
        with socket.create_connection((target, 80), 5) as sock:
            sender = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
            sender.start()
            while chunk := sock.recv(1 << 16):
                content.update(chunk)
            sender.join()
        return content.hexdigest()

    server.settimeout(5)
    thread = threading.Thread(target=serve)
    thread.start()
    found = str(net.run(f"pod{CLIENT}", dial))
    thread.join()
    return found
