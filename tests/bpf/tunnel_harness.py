"""The programs of tunnels through BPF_PROG_TEST_RUN: what a tunnel device would say comes from a map."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path

import pytest
from bpf_harness import Programs, context
from scapy.layers.l2 import Ether

import ciliate_bpf
from ciliate.datapath import bpf, kernel, layout

SOURCES = Path(ciliate_bpf.__file__).parent
REMOTE4, REMOTE6 = "10.6.0.10", "fd06::a"
REMOTE_ROUTER4, REMOTE_ROUTER6 = "10.6.0.1", "fd06::1"
UNKNOWN4, UNKNOWN6 = "10.6.0.99", "fd06::99"
REMOTE_ID, REMOTE_HOST_ID = 500, 6
NODE, NODE_V6 = "192.0.2.2", "2001:db8:ff::2"
THIRD = "192.0.2.3"
"""Another known node, with none of the pods."""
PORT = 8472
TUNNEL = {"tunnel_ifindex": (1).to_bytes(4, "little"), "tunnel_port": PORT.to_bytes(2, "big")}
MARK = slice(8, 12)

# what the device would find in the outer packet stands in a map
_WRAPPER = """
#include "{sources}/overlay.c"

struct given {{
	struct bpf_tunnel_key key;
	__u32 flags;
}};

MAP(test_given, BPF_MAP_TYPE_ARRAY, 1, __u32, struct given, 0);

SEC("tc")
int test_overlay(struct __sk_buff *skb)
{{
	__u32 zero = 0;
	struct given *given = bpf_map_lookup_elem(&test_given, &zero);

	if (!given)
		return TC_ACT_SHOT;
	if (given->key.tunnel_ttl && bpf_skb_set_tunnel_key(skb, &given->key, sizeof(given->key), given->flags) < 0)
		return 99;
	return unwrapped(skb);
}}
"""


def build_or_skip(functions: str) -> str:
    """A build of the programs, unless this kernel has no global functions."""
    if functions == "global" and kernel.select().name != "global":
        pytest.skip(f"build global: {kernel.select().reason}")
    return functions


def wrapped(directory: Path) -> Path:
    """A directory with the overlay program behind a tunnel key of the test's."""
    directory.mkdir()
    (directory / "test_overlay.c").write_text(_WRAPPER.format(sources=SOURCES))
    return directory


class TunnelPrograms(Programs):
    """Any of the programs of a node with tunnels: pods of this node, a pod of another one, and that node."""

    def __init__(self, cache: Path, name: str, functions: str = "auto", source: Path | None = None) -> None:
        super().__init__(cache, "shared", functions=functions, name=name, source=source, given=TUNNEL)

    def reset(self) -> None:
        super().reset()
        self.know(NODE)

    def know(self, node: str) -> None:
        """A pod, a router and pod ranges at the other node, and that node among the known ones."""
        to = ip_address(node)
        entries = {REMOTE4: (REMOTE_ID, to), REMOTE6: (REMOTE_ID, to)}
        entries |= {REMOTE_ROUTER4: (REMOTE_HOST_ID, to), REMOTE_ROUTER6: (REMOTE_HOST_ID, to)}
        self.maps["ciliate_ipcache"].update_many(
            (layout.ipcache_key(ip_network(text)), layout.ipcache_entry(*entry)) for text, entry in entries.items()
        )
        for text in ("10.6.0.0/24", "fd06::/64"):
            self.maps["ciliate_tunnel"].update(layout.ipcache_key(ip_network(text)), layout.tunnel_entry(to))
        if "ciliate_nodes" in self.maps:
            for known in (NODE, NODE_V6, THIRD):
                self.maps["ciliate_nodes"].update(layout.node_key(ip_address(known)), layout.node_entry())

    def run(
        self, program: str, packet: Ether | bytes, mark: int = 0, ingress_ifindex: int = 1
    ) -> tuple[int, bytes, int]:
        """Verdict, packet and mark afterwards."""
        self.runs += 1
        data = bytearray(context(ingress_ifindex))
        data[MARK] = struct.pack("=I", mark)
        result, after, _ = bpf.test_run(self.object.program_fd(program), bytes(packet), data)
        return result, after, int(struct.unpack("=I", data[MARK])[0])

    def unwrapped(self, packet: Ether, identity: int, node: str | None = NODE) -> tuple[int, bytes, int]:
        """A packet that the tunnel device unwrapped, with VNI and outer source; without a node it came otherwise."""
        self.maps["test_given"].update(bytes(4), tunnel_key(identity, node))
        return self.run("test_overlay", packet)

    def reason(self, before: Mapping[tuple[int, int], int]) -> int:
        """The one drop reason that was counted since; 0 where there is none."""
        changed = {key[0] for key, count in self.reasons().items() if count != before.get(key, 0)} - {0}
        assert len(changed) <= 1, changed
        return changed.pop() if changed else 0


def tunnel_key(identity: int, node: str | None) -> bytes:
    """``struct given``: a key that reads as received from ``node``."""
    if node is None:
        return bytes(struct.calcsize("=I16sBBHI16sI"))
    address = ip_address(node)
    # remote is not looked at when a key is read; IPv4 addresses are in host order
    local = int(address).to_bytes(4, "little").ljust(16, b"\0") if isinstance(address, IPv4Address) else address.packed
    flags = 0 if address.version == 4 else 1
    return struct.pack("=I16sBBHI16sI", identity, bytes(16), 0, 64, 0, 0, local, flags)
