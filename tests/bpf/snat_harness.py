"""Loads `netdev.c` with masquerading over its own maps and runs packets through it, in a namespace without sockets."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from bpf_harness import SHOT, context
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from ciliate.datapath import bpf, kernel, layout, snat
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.libbpf import BpfObject, constants, read
from ciliate.datapath.node import read_metrics

CLONE_NEWNET = 0x40000000
PASS = 0xFFFFFFFF
NODE = {4: "192.0.2.1", 6: "2001:db8::1"}
GATEWAY = {4: "10.200.0.1", 6: "fd00:c11:a7e::1"}
"""The node's address towards pods."""
POD = {4: "10.200.0.10", 6: "fd00:c11:a7e::a"}
OTHER = {4: "10.200.0.11", 6: "fd00:c11:a7e::b"}
REMOTE = {4: "198.51.100.7", 6: "2001:db8:1::7"}
SECOND = {4: "198.51.100.8", 6: "2001:db8:1::8"}
ROUTER = {4: "203.0.113.9", 6: "2001:db8:9::9"}
POD_RANGES = [ip_network("10.200.0.0/16"), ip_network("fd00:c11:a7e::/112")]
MACS = {"src": "02:00:00:00:00:01", "dst": "02:00:00:00:00:02"}
ENDPOINT = 10
CLIENT_SHARE = 7000
"""Of the node's ports: how many one client outside may have."""


class Snat:
    """The programs and their maps; ``out`` is what leaves the node, ``back`` what arrives."""

    def __init__(
        self,
        cache: Path,
        functions: str = "auto",
        entries: int = 1 << 18,
        more: tuple[str, ...] = (),
        services: tuple[int, int] | None = None,
        most: int = 0,
    ) -> None:
        """``services``: ports that node ports get; ``most``: mappings that one pod may have, 0: any number."""
        defines = (*kernel.select(functions).defines, *snat.DEFINES, *more)
        elf = read(Compiler(cache).compile("netdev", defines))
        self.object = BpfObject(elf, "netdev")
        own = {f"router_ipv{family}": ip_address(text).packed for family, text in GATEWAY.items()}
        if "CILIATE_SERVICES" in more:
            own |= {f"lb_node_ipv{family}": ip_address(text).packed for family, text in NODE.items()}
            own["lb_client_share"] = CLIENT_SHARE.to_bytes(4, "little")
        own |= snat.constants(services, most)
        self.object.set_constants(constants(elf), own)
        for name, size in (("ciliate_ct_tcp", 4096), ("ciliate_ct_any", 4096), (snat.MAP, entries)):
            self.object.set_max_entries(name, size)
        self.object.load()
        self.maps = {
            name: bpf.Map(os.dup(self.object.map_fd(name)), name)
            for name in self.object.maps
            if name.startswith("ciliate_") and name not in ("ciliate_entry", "ciliate_events")
        }
        self.table = self.maps[snat.MAP]
        self._thread = ThreadPoolExecutor(1)
        assert self.inside(lambda: ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET)) == 0
        self.inside(lambda: os.system("ip link set lo up"))
        self.reset()

    def inside(self, function: Callable[[], Any]) -> Any:
        """Run something in the programs' namespace."""
        return self._thread.submit(function).result()

    def reset(self, active: bool = True) -> None:
        """No mappings; one device with the node's addresses; pods are masqueraded except to each other."""
        for name in (snat.PODS, snat.MAP, "ciliate_frag", "ciliate_ct_tcp", "ciliate_ct_any", "ciliate_lxc"):
            self.maps[name].delete_many([key for key, _ in self.maps[name].items()])
        self.device(active)
        snat.write_classes(self.maps[snat.CLASSES], POD_RANGES, POD_RANGES)
        info = layout.ENDPOINT_INFO.pack(1, 400, ENDPOINT, 0, bytes(6), bytes(6))
        for text in POD.values():
            self.maps["ciliate_lxc"].update(layout.endpoint_key(ip_address(text)), info)

    def device(self, active: bool = True, addresses: dict[int, str] = NODE) -> None:
        found = [ip_address(text) for text in addresses.values()]
        snat.write_devices(self.maps[snat.DEVICES], {1: found}, active)

    def close(self) -> None:
        self._thread.shutdown()
        for table in self.maps.values():
            table.close()
        self.object.close()

    def run(self, program: str, packet: Packet | bytes) -> tuple[int, Packet]:
        result, after = self.raw(program, bytes(packet))
        return result, Ether(after)

    def raw(self, program: str, data: bytes) -> tuple[int, bytes]:
        descriptor = self.object.program_fd(program)
        result, after, _ = self.inside(lambda: bpf.test_run(descriptor, data, context()))
        return result, after

    def out(self, packet: Packet) -> Packet:
        """What leaves the node for a packet that goes on."""
        result, after = self.run("to_netdev", Ether(**MACS) / packet)
        assert result == PASS, f"dropped: {self.reasons()}"
        return after.payload

    def back(self, packet: Packet) -> Packet:
        """What the node's stack gets for a packet that arrives."""
        result, after = self.run("from_netdev", Ether(**MACS) / packet)
        assert result == PASS
        return after.payload

    def why(self, packet: Packet) -> int:
        """The drop reason of a packet that leaves, or 0."""
        before = self.reasons()
        result, _ = self.run("to_netdev", Ether(**MACS) / packet)
        changed = [reason for (reason, _), count in self.reasons().items() if count != before.get((reason, _), 0)]
        assert len(changed) == (result == SHOT), f"a dropped packet counts one reason, not {changed}"
        return changed[0] if changed else 0

    def reasons(self) -> dict[tuple[int, int], int]:
        return {key: packets for key, (packets, _) in read_metrics(self.maps["ciliate_metrics"]).items()}

    def mappings(self) -> list[snat.SnatEntry]:
        return list(snat.entries(self.table))

    def listen(self, kind: socket.SocketKind, address: str, port: int) -> socket.socket:
        """A socket of the node."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
            made.bind((address, port))
            if kind == socket.SOCK_STREAM:
                made.listen()
            return made

        made: socket.socket = self.inside(make)
        return made


def ip(family: int, src: str, dst: str, **fields: Any) -> Packet:
    return (IP if family == 4 else IPv6)(src=src, dst=dst, **fields)


def right(packet: Packet) -> bool:
    """Whether every checksum, also of a packet inside an ICMP error, is what it has to be."""
    again = type(packet)(bytes(packet))
    layer: Any = again
    while layer:
        for field in ("chksum", "cksum"):
            if field in layer.fields:
                del layer.fields[field]
        layer = layer.payload
    return bytes(again) == bytes(packet)
