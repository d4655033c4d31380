"""Loads the endpoint program over maps of its own, without a pin, and runs packets through it (BPF_PROG_TEST_RUN)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path

from scapy.layers.l2 import Ether

from ciliate.datapath import bpf, kernel, layout
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.conntrack import entries, forget_share
from ciliate.datapath.layout import ConntrackEntry
from ciliate.datapath.libbpf import BpfObject, constants, read
from ciliate.datapath.node import read_metrics
from ciliate.datapath.policymap import PolicyMap
from ciliate.policy.mapstate import PolicyEntry, PolicyKey
from ciliate_loader.template_loader import DEFINES

OK, SHOT, REDIRECT = 0, 2, 7
POD_MAC, NODE_MAC, PEER_MAC, PEER_NODE_MAC = (
    "02:00:00:00:00:0a",
    "02:00:00:00:00:01",
    "02:00:00:00:00:0b",
    "02:00:00:00:00:02",
)
POD4, POD6 = "10.5.0.10", "fd05::a"
PEER4, PEER6 = "10.5.0.11", "fd05::b"
WORLD4, WORLD6 = "192.0.2.9", "2001:db8::9"
CIDR4, CIDR6 = "198.51.100.7", "2001:db8:1::7"
NODE4, NODE6 = "10.5.0.200", "fd05::c8"
ROUTER4, ROUTER6 = "10.5.0.1", "fd05::1"
POD, PEER = 10, 11
POD_ID, PEER_ID, CIDR_ID, HOST_ID, WORLD_ID = 400, 401, 1 << 24 | 1, 1, 2
PODS_PLACE, PEER_PLACE, NODE_PLACE, OTHER_PLACE = (1 << 24 | number for number in range(50, 54))
PLACES = {
    **{"10.5.0.8/29": PODS_PLACE, "fd05::8/125": PODS_PLACE, PEER4: PEER_PLACE, PEER6: PEER_PLACE},
    **{NODE4: NODE_PLACE, NODE6: NODE_PLACE},
    **{"192.0.2.0/24": OTHER_PLACE, "2001:db8::/32": OTHER_PLACE, "198.51.100.0/24": OTHER_PLACE},
}
"""Prefixes that ipBlocks name: of the pods, of one of them, of the node, and of addresses that are no pod's."""
FIXED = {POD: (POD4, POD6, POD_MAC, NODE_MAC), PEER: (PEER4, PEER6, PEER_MAC, PEER_NODE_MAC)}


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ep_config(
    number: int,
    identity: int = 0,
    flags: int = 0,
    shapes: tuple[int, int] = (0, 0),
    ifindex: int = 1,
    epoch: int = 0,
) -> bytes:
    """An endpoint's entry in ``ciliate_ep``, or what the loader makes a constant of where only ``number`` is given."""
    four, six, pod_mac, node_mac = FIXED[number]
    packed = ip_address(four).packed, ip_address(six).packed
    return layout.EP_CONFIG.pack(ifindex, identity, *packed, mac(pod_mac), mac(node_mac), number, flags, *shapes, epoch)


class Programs:
    """The programs of endpoint POD, with PEER as another pod of the node.

    ``build`` says which: ``shared`` finds POD by its id alone, ``template`` has what is fixed of it as constants.
    ``functions``: ``inline``, ``global``, or ``auto`` for what this kernel takes. ``name`` and ``source``: another
    source file than the endpoint programs', and its directory. ``given``: more constants.
    """

    def __init__(
        self,
        cache: Path,
        build: str,
        family4: bool = True,
        family6: bool = True,
        defines: tuple[str, ...] = (),
        functions: str = "auto",
        name: str = "endpoint",
        source: Path | None = None,
        given: Mapping[str, bytes] | None = None,
    ) -> None:
        template = build == "template"
        defines = kernel.select(functions).defines + defines
        elf = read(Compiler(cache, source).compile(name, (*defines, *DEFINES) if template else defines))
        self.object = BpfObject(elf, name)
        own = {"own_endpoint": ep_config(POD)} if template else {"test_endpoint": POD.to_bytes(4, "little")}
        values = {
            **own,
            "router_ipv4": ip_address(ROUTER4).packed,
            "router_ipv6": ip_address(ROUTER6).packed,
            "enable_ipv4": bytes([family4]),
            "enable_ipv6": bytes([family6]),
            **(given or {}),
        }
        sizes = {"ct_tcp_max": (4096).to_bytes(4, "little"), "ct_any_max": (4096).to_bytes(4, "little")}
        values |= {key: size for key, size in sizes.items() if key in constants(elf)}
        self.object.set_constants(constants(elf), values)
        for name in ("ciliate_ct_tcp", "ciliate_ct_any"):
            self.object.set_max_entries(name, 4096)
        self.object.load()
        self.maps = {
            name: bpf.Map(os.dup(self.object.map_fd(name)), name)
            for name in self.object.maps
            if name not in ("ciliate_entry",) and not name.endswith((".rodata", ".data", ".bss"))
        }
        self.policy = PolicyMap(self.maps["ciliate_policy"])
        self.runs = 0
        self.enforced: dict[int, tuple[bool, bool]] = {}
        self.reset()

    def reset(self) -> None:
        """Both endpoints valid and open, known addresses, no flows, no counters."""
        for endpoint in (POD, PEER):
            self.policy.remove(endpoint)
            self.enforced.pop(endpoint, None)
        self.endpoint(POD)
        self.endpoint(PEER)
        ipcache = {POD4: POD_ID, POD6: POD_ID, PEER4: PEER_ID, PEER6: PEER_ID, NODE4: HOST_ID, NODE6: HOST_ID}
        prefixes = {ip_network(text): number for text, number in ipcache.items()}
        prefixes |= {ip_network("198.51.100.0/24"): CIDR_ID, ip_network("2001:db8:1::/48"): CIDR_ID}
        self.maps["ciliate_ipcache"].update_many(
            (layout.ipcache_key(prefix), layout.ipcache_entry(number)) for prefix, number in prefixes.items()
        )
        self.maps["ciliate_place"].update_many(
            (layout.ipcache_key(ip_network(text)), layout.place_entry(number)) for text, number in PLACES.items()
        )
        self.flush()

    def flush(self) -> None:
        for name in ("ciliate_ct_tcp", "ciliate_ct_any", "ciliate_frag"):
            table = self.maps[name]
            table.delete_many([key for key, _ in table.items()])
        for number in (0, POD, PEER):
            forget_share(self.maps["ciliate_ct_share"], number)

    def close(self) -> None:
        for table in self.maps.values():
            table.close()
        self.object.close()

    def endpoint(self, number: int, ingress: bool = False, egress: bool = False, valid: bool = True) -> None:
        """Write an endpoint's entry with the shape of what its policy has."""
        flags = valid * layout.EP_VALID | ingress * layout.EP_ENFORCE_INGRESS | egress * layout.EP_ENFORCE_EGRESS
        identity = POD_ID if number == POD else PEER_ID
        epoch = self.policy.epoch(number)
        self.write(number, ep_config(number, identity, flags, self.policy.shape(number), epoch=epoch))
        four, six, *macs = FIXED[number]
        for text in (four, six):
            info = layout.ENDPOINT_INFO.pack(1, identity, number, 0, *map(mac, macs))
            self.maps["ciliate_lxc"].update(layout.endpoint_key(ip_address(text)), info)

    def write(self, number: int, value: bytes) -> None:
        """Write an endpoint's entry as it is given."""
        self.maps["ciliate_ep"].update(number.to_bytes(4, "little"), value)

    def enforce(
        self, number: int, state: Mapping[PolicyKey, PolicyEntry], ingress: bool = False, egress: bool = False
    ) -> None:
        """Give an endpoint exactly this policy."""
        upserts, deletes = self.policy.difference(number, state)
        old, self.enforced[number] = self.enforced.get(number, (False, False)), (ingress, egress)
        self.policy.apply(number, upserts, deletes, (ingress, egress), old, lambda _: None)
        self.endpoint(number, ingress, egress)

    def name(self, text: str, identity: int) -> None:
        """Say that an address is another identity's."""
        self.maps["ciliate_ipcache"].update(layout.ipcache_key(ip_network(text)), layout.ipcache_entry(identity))

    def send(self, packet: Ether | bytes) -> tuple[int, bytes]:
        """What POD sends: verdict and the packet afterwards."""
        return self._run("from_container", packet)

    def receive(self, packet: Ether | bytes, from_host: bool = False) -> tuple[int, bytes]:
        """What reaches POD through the host's stack, forwarded or made by the host itself."""
        return self._run("to_container", packet, 0 if from_host else 1)

    def track(self, endpoint: int, proto: int, port: int) -> bytes:
        """Enter a flow that a pod began, from this port to the world, idle from now on; its key."""
        four = FIXED[endpoint][0]
        key = layout.conntrack_key(proto, (ip_address(four), port), (ip_address(WORLD4), 443))
        own = (WORLD_ID, 0, 0, 0, 0, endpoint, layout.CT_FIRST_OUT)
        ends = [
            own if part == layout.to_mapped(ip_address(four)) else (0,) * 7 for part in layout.CT_KEY.unpack(key)[:2]
        ]
        value = (int(time.monotonic()) + 21600, 0, 0, b"\x10\x10", 4, *ends[0], *ends[1], 1, 1, 99, 99)
        self.maps["ciliate_ct_tcp" if proto == 6 else "ciliate_ct_any"].update(key, layout.CT_ENTRY.pack(*value))
        return key

    def _run(self, program: str, packet: Ether | bytes, ingress_ifindex: int = 1) -> tuple[int, bytes]:
        self.runs += 1
        result, data, _ = bpf.test_run(self.object.program_fd(program), bytes(packet), context(ingress_ifindex))
        return result, data

    def why(self, packet: Ether | bytes, receive: bool = False, from_host: bool = False) -> int:
        """The drop reason of a packet, or 0 where it goes on."""
        before = self.reasons()
        result, _ = self.receive(packet, from_host) if receive else self.send(packet)
        after = self.reasons()
        changed = {
            reason for reason, direction in after if after[reason, direction] != before.get((reason, direction), 0)
        }
        if result != SHOT:
            return 0
        dropped = changed - {0}
        assert len(dropped) == 1, f"a dropped packet counts one reason, not {dropped}"
        return dropped.pop()

    def reasons(self) -> dict[tuple[int, int], int]:
        """(reason, direction) -> packets so far."""
        return {key: packets for key, (packets, _) in read_metrics(self.maps["ciliate_metrics"]).items()}

    def flows(self) -> list[ConntrackEntry]:
        return list(entries([self.maps["ciliate_ct_tcp"], self.maps["ciliate_ct_any"]]))


def context(ingress_ifindex: int = 1) -> bytes:
    """A __sk_buff with an interface of this namespace (loopback) to have come from."""
    data = bytearray(192)
    data[36:40] = ingress_ifindex.to_bytes(4, "little")  # ingress_ifindex
    data[40:44] = (1).to_bytes(4, "little")  # ifindex
    return bytes(data)
