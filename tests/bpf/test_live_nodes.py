"""Two nodes joined by the datapath alone: every routing mode, both families, allowed and denied. Tier bpf."""

from __future__ import annotations

import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import nodes_harness as harness
import pytest
from live_harness import Net, ping, tcp, udp
from nodes_harness import CLIENT, SERVER, STRANGER, Mode, PodNode, address, two_nodes

ALL = [Mode("vxlan", 4), Mode("vxlan", 6), Mode("geneve", 4), Mode("geneve", 6), Mode("direct")]
Pair = tuple[PodNode, PodNode]


@pytest.fixture
def between() -> Iterator[Net]:
    net = harness.make_net(f"cn{uuid.uuid4().hex[:6]}")
    yield net
    net.remove()


@pytest.fixture(params=ALL, ids=lambda mode: f"{mode.name}-over-{mode.underlay}")
def mode(request: pytest.FixtureRequest) -> Mode:
    found: Mode = request.param
    return found


@pytest.fixture
async def pair(between: Net, mode: Mode, tmp_path: Path, templates: Path) -> AsyncIterator[Pair]:
    async with two_nodes(between, mode, tmp_path, templates) as nodes:
        yield nodes


def listen(net: Net, pod: int, kind: socket.SocketKind, port: int) -> socket.socket:
    """A socket of a pod for both families."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            sock.listen(8)
        return sock

    made: socket.socket = net.run(f"pod{pod}", make)
    return made


async def test_policy_decides_packets_of_other_nodes(between: Net, pair: Pair) -> None:
    net = between
    with (
        listen(net, SERVER, socket.SOCK_STREAM, 80),
        listen(net, SERVER, socket.SOCK_STREAM, 81),
        listen(net, SERVER, socket.SOCK_STREAM, 82),
        listen(net, SERVER, socket.SOCK_STREAM, 83),
        listen(net, SERVER, socket.SOCK_DGRAM, 53) as server,
    ):
        for family in (4, 6):
            target = address(SERVER, family)
            assert tcp(net, f"pod{CLIENT}", target, 80, 3)
            assert not tcp(net, f"pod{CLIENT}", target, 81)
            assert not tcp(net, f"pod{STRANGER}", target, 80)
            assert udp(net, server, f"pod{CLIENT}", target, 53)
            assert not udp(net, server, f"pod{STRANGER}", target, 53)
            assert ping(net, f"pod{CLIENT}", target)
            assert not ping(net, f"pod{STRANGER}", target)
            assert tcp(net, "n1", target, 82, 3), "the other node is who the ipcache says"
            assert not tcp(net, "n1", target, 83)
            assert tcp(net, "n2", target, 83, 3), "the pod's own node is the host"
            assert not tcp(net, "n2", target, 82)
