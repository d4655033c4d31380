"""Two namespaces joined by the datapath alone: real packets, both families, allowed and denied, under every loader.

Tier bpf: needs root, clang and a kernel with BPF.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
import pytest
from live_harness import (
    CLIENT,
    IDENTITY,
    ROUTER4,
    ROUTER6,
    SERVER,
    STRANGER,
    InNode,
    Net,
    address,
    connect_all,
    family_of,
    listen,
    ping,
    ping_once,
    read_drops,
    server_policy,
    started,
    tcp,
    udp,
    wait_linked,
)

from ciliate.datapath import layout, rtnl
from ciliate.datapath.bpf import Map
from ciliate.datapath.events import EventReader, decode
from ciliate.datapath.model import MONITOR_LEVELS
from ciliate.policy.mapstate import INGRESS, PolicyKey


@pytest.mark.parametrize("family", [4, 6])
async def test_policy_decides_real_packets(net: Net, node: InNode, family: int) -> None:
    await connect_all(node)
    target = address(SERVER, family)
    reader = EventReader(node.datapath.events_path)
    with listen(net, socket.SOCK_STREAM, target, 80), listen(net, socket.SOCK_STREAM, target, 81):
        assert tcp(net, f"pod{CLIENT}", target, 80, 3)
        assert not tcp(net, f"pod{CLIENT}", target, 81)
        assert not tcp(net, f"pod{STRANGER}", target, 80)
        assert tcp(net, "node", target, 81, 3)
    drops = read_drops(reader)
    assert {(drop.src_identity, drop.destination_port, drop.reason) for drop in drops} == {
        (302, 81, 133),
        (303, 80, 133),
    }
    assert all((drop.dst_identity, drop.direction, drop.dst_endpoint) == (301, "ingress", SERVER) for drop in drops)
    assert all(drop.reason_text == "Policy denied" and "SYN" in drop.summary for drop in drops)
    with listen(net, socket.SOCK_DGRAM, target, 53) as server:
        assert udp(net, server, f"pod{CLIENT}", target, 53)
        assert not udp(net, server, f"pod{STRANGER}", target, 53)
    assert ping(net, f"pod{CLIENT}", target)
    assert not ping(net, f"pod{STRANGER}", target)
    assert ping(net, f"pod{STRANGER}", address(CLIENT, family))
    assert ping(net, f"pod{STRANGER}", str(ROUTER4 if family == 4 else ROUTER6))
    assert ping(net, "node", target)
    reader.close()


GETLINK, LINK = 18, struct.Struct("=BxHiII")
GSO_MAX, GRO_MAX, GSO4_MAX, GRO4_MAX = 41, 58, 63, 64
"""Attributes of a link (IFLA_GSO_MAX_SIZE and its like); those of IPv4 are there since Linux 6.3."""


def allow_big_tcp(ifname: str) -> dict[int, int]:
    """Segments of 190,000 bytes together, out and in; family -> how long the kernel says that they may be now."""
    index = socket.if_nametoindex(ifname)
    sizes = b"".join(rtnl.number(kind, 190_000) for kind in (GSO_MAX, GRO_MAX, GSO4_MAX, GRO4_MAX))
    batch = rtnl.Batch()
    batch.add(rtnl.NEWLINK, 0, LINK.pack(0, 0, index, 0, 0) + sizes, "sizes")
    batch.run()
    (message,) = (
        item for item in rtnl.dump(GETLINK, LINK.pack(0, 0, 0, 0, 0), "links") if LINK.unpack_from(item)[2] == index
    )
    told = rtnl.attributes(message, LINK.size)
    return {
        family: int.from_bytes(told.get(kind, b""), sys.byteorder) for family, kind in ((4, GSO4_MAX), (6, GSO_MAX))
    }


def lengths(sniffer: socket.socket) -> Iterator[int]:
    with contextlib.suppress(BlockingIOError):
        while True:
            yield len(sniffer.recv(1 << 19))


@pytest.mark.parametrize("family", [4, 6])
async def test_packets_that_are_longer_than_their_header_can_say(net: Net, node: InNode, family: int) -> None:
    """BIG TCP: the length field is 0, in IPv6 behind a jumbo payload option. Where the kernel has it for the family."""
    await connect_all(node)
    target, data = address(SERVER, family), bytes(1 << 20)
    told = []
    for number in (SERVER, CLIENT):
        told.append(net.run(f"pod{number}", lambda: allow_big_tcp("eth0")))
        told.append(net.run("node", lambda number=number: allow_big_tcp(f"lxc{net.tag}{number}")))  # type: ignore[misc]
    (longest,) = {item[family] for item in told}
    assert longest == 190_000 or (family, longest) == (4, 0)
    reader = EventReader(node.datapath.events_path)
    sniffer = net.run(f"pod{SERVER}", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
    with contextlib.closing(sniffer), listen(net, socket.SOCK_STREAM, target, 80) as server:
        sniffer.setblocking(False)
        sniffer.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
        client = net.run(f"pod{CLIENT}", lambda: socket.create_connection((target, 80), 3))
        taking, _ = server.accept()
        with client, taking, ThreadPoolExecutor(1) as thread:
            sending = thread.submit(lambda: [client.sendall(data) for _ in range(16)])
            left = 16 * len(data)
            while left:
                left -= len(taking.recv(left))
            sending.result()
        assert (max(lengths(sniffer)) > 65_600) == (longest == 190_000)
    assert not read_drops(reader)
    reader.close()


@pytest.mark.parametrize("family", [4, 6])
async def test_an_established_connection_lives_through_a_restart_and_ends_with_its_rule(
    net: Net, node: InNode, family: int
) -> None:
    configs = await connect_all(node)
    target = address(SERVER, family)
    with listen(net, socket.SOCK_STREAM, target, 80) as server:
        client = net.run(f"pod{CLIENT}", lambda: socket.create_connection((target, 80), 3))
        accepted, _ = server.accept()
        accepted.settimeout(1)
        with client, accepted:
            client.sendall(b"before")
            assert accepted.recv(100) == b"before"
            await node.restart()
            client.sendall(b"during")
            assert accepted.recv(100) == b"during"
            for number, config in configs.items():
                await node.datapath.add_endpoint(config, server_policy() if number == SERVER else {})
            client.sendall(b"after")
            assert accepted.recv(100) == b"after"
            gone = PolicyKey(INGRESS, IDENTITY[CLIENT], 6, 80, 16)
            await node.datapath.apply_policy(SERVER, {}, [gone], True, False)
            client.sendall(b"never")
            with pytest.raises(TimeoutError):
                accepted.recv(100)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("how", ["policy", "policy while no agent runs", "identity of the peer"])
async def test_answers_end_with_what_allowed_the_question(net: Net, node: InNode, family: int, how: str) -> None:
    """One datagram was allowed, and the client never sends another."""
    configs, target = await connect_all(node), address(SERVER, family)
    with listen(net, socket.SOCK_DGRAM, target, 53) as server:
        client = net.run(f"pod{CLIENT}", lambda: socket.socket(family_of(target), socket.SOCK_DGRAM))
        with client:
            server.settimeout(3)
            client.settimeout(3)
            client.sendto(b"question", (target, 53))
            _, asker = server.recvfrom(100)
            server.sendto(b"answer", asker)
            assert client.recv(100) == b"answer"
            if how == "policy":
                await node.datapath.sync_policy(SERVER, {}, True, False)
            elif how == "identity of the peer":
                changed = msgspec.structs.replace(configs[CLIENT], identity=999)
                await node.datapath.update_endpoint(changed)
                names = {layout.ipcache_key(ip_network(str(item))) for item in changed.addresses}
                await node.datapath.change_ipcache(dict.fromkeys(names, layout.ipcache_entry(999)))
            else:
                await node.restart()
                for config in configs.values():
                    await node.datapath.add_endpoint(config, {})
            client.settimeout(0.3)
            for _ in range(2):
                server.sendto(b"late", asker)
                with pytest.raises(TimeoutError):
                    client.recv(100)


async def test_a_removed_endpoint_is_cut_off_and_its_flows_go(net: Net, node: InNode) -> None:
    await connect_all(node)
    target = address(SERVER, 4)
    with listen(net, socket.SOCK_STREAM, target, 80):
        assert tcp(net, f"pod{CLIENT}", target, 80, 3)
        assert {flow.endpoint for flow in await node.datapath.flows.entries()} >= {SERVER, CLIENT}
        await node.datapath.remove_endpoint(CLIENT)
        assert not tcp(net, f"pod{CLIENT}", target, 80)
    assert all(flow.endpoint != CLIENT for flow in await node.datapath.flows.entries())
    assert not await node.datapath.policy_entries(CLIENT)
    metrics = await node.datapath.metrics()
    assert metrics[165, 1][0] >= 1


@pytest.mark.parametrize("family", [4, 6])
async def test_nothing_that_names_a_removed_endpoint_is_kept(net: Net, node: InNode, family: int) -> None:
    """Neither flows, nor the ports of a datagram of which parts are missing."""
    await connect_all(node)
    gone, server, other = (ip_address(address(number, family)) for number in (CLIENT, SERVER, STRANGER))
    table = Map.open(node.datapath.pins / "ciliate_frag")
    for pair in [(gone, server), (server, gone), (server, other)]:
        table.update(layout.FRAG_KEY.pack(*map(layout.to_mapped, pair), 7, 17, 1), layout.FRAG_ENTRY.pack(b"", b"", 0))
    with net.run(f"pod{STRANGER}", lambda: socket.socket(family_of(str(gone)), socket.SOCK_DGRAM)) as sender:
        sender.sendto(b"early", (str(gone), 9))
    assert gone in {flow.destination for flow in await node.datapath.flows.entries()}
    await node.datapath.remove_endpoint(CLIENT)
    assert gone not in {flow.destination for flow in await node.datapath.flows.entries()}
    kept = [layout.FRAG_KEY.unpack(key)[:2] for key, _ in table.items()]
    assert kept == [tuple(map(layout.to_mapped, (server, other)))]
    table.close()


async def test_a_pod_cannot_use_another_address(net: Net, node: InNode) -> None:
    await connect_all(node)
    reader = EventReader(node.datapath.events_path)

    def spoof() -> None:
        subprocess.run(["ip", "addr", "add", f"{address(CLIENT, 4)}/32", "dev", "eth0"], check=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((address(CLIENT, 4), 0))
            sock.sendto(b"x", (address(SERVER, 4), 53))

    net.run(f"pod{STRANGER}", spoof)
    assert [drop.reason_text for drop in read_drops(reader)] == ["Invalid source ip"]
    reader.close()


@pytest.mark.parametrize("family", [4, 6])
async def test_an_icmp_error_comes_back_for_udp_and_expired_packets_are_answered(
    net: Net, node: InNode, family: int
) -> None:
    await connect_all(node)
    target = address(SERVER, family)

    def refused() -> bool:
        with socket.socket(family_of(target), socket.SOCK_DGRAM) as sock:
            sock.settimeout(2)
            sock.connect((target, 53))
            sock.send(b"x")
            with contextlib.suppress(ConnectionRefusedError):
                sock.recv(10)
                return False
            return True

    assert net.run(f"pod{CLIENT}", refused)
    answer = ping_once(net, f"pod{CLIENT}", target, ["-t", "1"])
    assert str(ROUTER4 if family == 4 else ROUTER6) in answer
    assert "exceeded" in answer.lower()


LEVELS = {
    "none": {"from-endpoint", "from-stack", "to-endpoint", "to-host", "policy-verdict"},
    "low": {"to-endpoint", "to-host", "policy-verdict"},
    "medium": {"to-endpoint", "to-host", "policy-verdict"},
    "maximum": {"policy-verdict"},
}


def seen(reader: EventReader) -> list[str]:
    """Observation points of traces and names of other events, in order."""
    return [event.observation or event.type for event in map(decode, reader.read())]


async def test_levels_of_aggregation(net: Net, node: InNode) -> None:
    """What each level shows of a ping between pods and one from the node, and of more packets of the same flow."""
    await connect_all(node)
    wait_linked(net, f"pod{STRANGER}", address(CLIENT, 4))
    reader = EventReader(node.datapath.events_path)
    for level, expected in LEVELS.items():
        await node.datapath.set_monitor_level(level)
        reader.read()
        assert ping(net, f"pod{STRANGER}", address(CLIENT, 4))
        assert ping(net, "node", address(CLIENT, 4))
        assert set(seen(reader)) == expected, level
    counts = {}
    for level in LEVELS:
        await node.datapath.set_monitor_level(level)
        reader.read()
        assert " 0% packet loss" in ping_once(net, f"pod{STRANGER}", address(CLIENT, 4), ["-c9", "-i0.01"])
        counts[level] = seen(reader).count("to-endpoint")
    assert counts["none"] == counts["low"] == 18
    assert 2 <= counts["medium"] < 18, "new flows, and one in five seconds"
    assert counts["maximum"] == 0
    reader.close()


async def test_an_endpoint_has_its_own_level(net: Net, node: InNode) -> None:
    """One endpoint tells all or nothing of its packets, whatever the node does; the others do not notice."""
    configs, own = await connect_all(node), layout.MONITOR_OWN
    wait_linked(net, f"pod{STRANGER}", address(CLIENT, 4))
    reader = EventReader(node.datapath.events_path)

    async def change(number: int, monitor: int, **changes: bool) -> None:
        await node.datapath.update_endpoint(msgspec.structs.replace(configs[number], monitor=monitor, **changes))

    def told() -> set[tuple[str, int]]:
        reader.read()
        assert ping(net, f"pod{STRANGER}", address(CLIENT, 4))
        assert ping(net, f"pod{STRANGER}", address(CLIENT, 6))
        assert not tcp(net, f"pod{STRANGER}", address(SERVER, 4), 81, 0.2)
        return {(event.observation or event.type, event.endpoint) for event in map(decode, reader.read())}

    traces = {(where, who) for where in ("from-endpoint", "to-endpoint") for who in (STRANGER, CLIENT)}
    await node.datapath.set_monitor_level("maximum")
    found = told()
    assert not found & traces and ("drop", SERVER) in found
    await change(CLIENT, own | MONITOR_LEVELS["none"])
    assert told() & traces == {("from-endpoint", CLIENT), ("to-endpoint", CLIENT)}
    await node.datapath.set_monitor_level("none")
    await change(CLIENT, own)
    await change(SERVER, own | layout.MONITOR_NO_DROPS)
    found = told()
    assert found & traces == {("from-endpoint", STRANGER), ("to-endpoint", STRANGER)}
    assert ("drop", SERVER) not in found
    reader.close()


async def test_debug_events_tell_each_step(net: Net, tmp_path: Path, templates: Path, build: str) -> None:
    async with started(InNode(net, tmp_path, build, templates, debug=True)) as node:
        await connect_all(node)
        await node.datapath.set_monitor_level("maximum")
        reader = EventReader(node.datapath.events_path)
        target = address(SERVER, 4)
        with listen(net, socket.SOCK_STREAM, target, 80):
            assert tcp(net, f"pod{CLIENT}", target, 80, 3)
        events = [event for event in map(decode, reader.read()) if event.type == "debug"]
        first = [(event.observation, event.direction, event.ct_state) for event in events[:5]]
        assert first == [
            ("flow looked up", "egress", "new"),
            ("policy asked", "egress", "new"),
            ("flow looked up", "ingress", "new"),
            ("policy asked", "ingress", "new"),
            ("flow recorded", "ingress", "new"),
        ]
        assert events[3].rule == 7
        assert ("flow looked up", "reply") in {(event.observation, event.ct_state) for event in events}
        await node.datapath.sync_policy(SERVER, {}, True, False)
        reader.close()
