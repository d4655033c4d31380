"""Python twins of the structs in ``bpf/ciliate_bpf/lib/types.h``. A test compares both through BTF.

Those of the load balancer are in ``lblayout``.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from ciliate.policy.mapstate import PolicyEntry, PolicyKey, Verdict

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

IPV4, IPV6 = 1, 2
EP_VALID, EP_ENFORCE_INGRESS, EP_ENFORCE_EGRESS, EP_STACK = 1, 2, 4, 8
EP_MONITOR_SHIFT = 8
ENDPOINT_HOST = 1
MAX_ENDPOINTS = 65535
SHAPE_ALL_TRAFFIC, SHAPE_PLACES, SHAPE_PAIRS = 1 << 17, 1 << 18, 1 << 19
STATIC_BITS = 32
CT_FIRST_OUT, CT_FIRST_IN = 1, 2
MONITOR_TRACE_ALL, MONITOR_TRACE_NEW, MONITOR_VERDICT, MONITOR_TRACE_FROM = 1, 2, 4, 8
MONITOR_NO_DROPS, MONITOR_OWN = 0x40, 0x80

EP_CONFIG = struct.Struct("=II4s16s6s6sHHIII")
LINK_ENTRY = struct.Struct("=Q8s")
ENDPOINT_KEY = struct.Struct("=16sB3x")
ENDPOINT_INFO = struct.Struct("=IIHBx6s6s")
IPCACHE_KEY = struct.Struct("=IB3x16s")
IPCACHE_ENTRY = struct.Struct("=IBB2x16s")
TUNNEL_ENTRY = struct.Struct("=16sBB2x")
NODE_KEY = struct.Struct("=16s")
NODE_ENTRY = struct.Struct("=B3x")
PLACE_ENTRY = struct.Struct("=I")
POLICY_KEY = struct.Struct("=II2sHBBBx")
POLICY_ENTRY = struct.Struct("=QQI2sBx")
CT_KEY = struct.Struct("=16s16s2s2sBB2x")
CT_END = struct.Struct("=IIIIIHBx")
CT_ENTRY = struct.Struct("=III2sBxIIIIIHBxIIIIIHBxQQQQ")
CT_SHARE = struct.Struct("=IIII")
TUPLE = struct.Struct("=16s16s2s2sBB2x")
FRAG_KEY = struct.Struct("=16s16sIBB2x")
FRAG_ENTRY = struct.Struct("=2s2sH2x")
METRICS_VALUE = struct.Struct("=QQ")
NODE_CONFIG = struct.Struct("=I4x")
EVENT = struct.Struct("=BBHIIIHHBBBBIIIHBB16s16s2s2s4x128s")

STRUCTS = {
    "ep_config": EP_CONFIG,
    "link_entry": LINK_ENTRY,
    "endpoint_key": ENDPOINT_KEY,
    "endpoint_info": ENDPOINT_INFO,
    "ipcache_key": IPCACHE_KEY,
    "ipcache_entry": IPCACHE_ENTRY,
    "tunnel_entry": TUNNEL_ENTRY,
    "node_key": NODE_KEY,
    "node_entry": NODE_ENTRY,
    "place_entry": PLACE_ENTRY,
    "policy_key": POLICY_KEY,
    "policy_entry": POLICY_ENTRY,
    "ct_key": CT_KEY,
    "ct_end": CT_END,
    "ct_entry": CT_ENTRY,
    "ct_share": CT_SHARE,
    "tuple": TUPLE,
    "frag_key": FRAG_KEY,
    "frag_entry": FRAG_ENTRY,
    "metrics_value": METRICS_VALUE,
    "node_config": NODE_CONFIG,
    "event": EVENT,
}


MAP_STRUCTS = {
    "ciliate_ep": (None, EP_CONFIG),
    "ciliate_link": (None, LINK_ENTRY),
    "ciliate_lxc": (ENDPOINT_KEY, ENDPOINT_INFO),
    "ciliate_ipcache": (IPCACHE_KEY, IPCACHE_ENTRY),
    "ciliate_tunnel": (IPCACHE_KEY, TUNNEL_ENTRY),
    "ciliate_nodes": (NODE_KEY, NODE_ENTRY),
    "ciliate_place": (IPCACHE_KEY, PLACE_ENTRY),
    "ciliate_policy": (POLICY_KEY, POLICY_ENTRY),
    "ciliate_ct_tcp": (CT_KEY, CT_ENTRY),
    "ciliate_ct_any": (CT_KEY, CT_ENTRY),
    "ciliate_ct_share": (None, CT_SHARE),
    "ciliate_ct_ring": (None, CT_KEY),
    "ciliate_metrics": (None, METRICS_VALUE),
    "ciliate_config": (None, NODE_CONFIG),
}
"""Key and value of each map; None is a 4-byte index."""


def family_of(address: Address | Network) -> int:
    """1 for IPv4, 2 for IPv6."""
    return IPV4 if address.version == 4 else IPV6


def port_bytes(port: int) -> bytes:
    """A port in network byte order."""
    return port.to_bytes(2, "big")


def mapped(data: bytes) -> Address:
    """An address of a conntrack key or event, where IPv4 is mapped into IPv6."""
    address = IPv6Address(data)
    return address.ipv4_mapped or address


def to_mapped(address: Address) -> bytes:
    """The inverse of ``mapped``."""
    if isinstance(address, IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def endpoint_key(address: Address) -> bytes:
    """Key of the map of local addresses."""
    return ENDPOINT_KEY.pack(address.packed.ljust(16, b"\0"), family_of(address))


def endpoint_address(key: bytes) -> Address:
    """The address of such a key."""
    data, family = ENDPOINT_KEY.unpack(key)
    return ip_address(data[:4] if family == IPV4 else data)


def ipcache_key(prefix: Network) -> bytes:
    """Key of the ipcache."""
    packed = prefix.network_address.packed.ljust(16, b"\0")
    return IPCACHE_KEY.pack(STATIC_BITS + prefix.prefixlen, family_of(prefix), packed)


_HOST4 = IPCACHE_KEY.pack(STATIC_BITS + 32, IPV4, b"")[:8]
_HOST6 = IPCACHE_KEY.pack(STATIC_BITS + 128, IPV6, b"")[:8]


def ipcache_host_key(text: str) -> bytes:
    """Key of the ipcache of one address as text, ten times as fast as by way of a prefix; OSError for other text."""
    if ":" in text:
        return _HOST6 + socket.inet_pton(socket.AF_INET6, text)
    return _HOST4 + socket.inet_pton(socket.AF_INET, text) + b"\0" * 12


def ipcache_prefix(key: bytes) -> Network:
    """The prefix of such a key."""
    length, family, data = IPCACHE_KEY.unpack(key)
    packed = data[:4] if family == IPV4 else data
    return ip_network((packed, length - STATIC_BITS))


def ipcache_entry(identity: int, node: Address | None = None, key: int = 0) -> bytes:
    """Value of the ipcache. ``node``: where packets to the address are tunnelled to; ``key``: with which encryption."""
    return IPCACHE_ENTRY.pack(identity, key, *_node(node))


def _node(node: Address | None) -> tuple[int, bytes]:
    return (family_of(node), to_mapped(node)) if node else (0, bytes(16))


def ipcache_identity(value: bytes) -> int:
    """The identity in such a value."""
    identity: int = IPCACHE_ENTRY.unpack(value)[0]
    return identity


def differences(
    kernel: Iterable[tuple[bytes, bytes]], wanted: Mapping[bytes, bytes]
) -> tuple[dict[bytes, bytes], set[bytes]]:
    """What would make a map with the entries ``kernel`` equal to ``wanted``: upserts and deletes."""
    upserts: dict[bytes, bytes] = {}
    deletes: set[bytes] = set()
    right: list[bytes] = []
    for key, value in kernel:
        desired = wanted.get(key)
        if desired == value:
            right.append(key)
        elif desired is None:
            deletes.add(key)
        else:
            upserts[key] = desired
    if len(right) + len(upserts) < len(wanted):
        present = set(right)
        upserts.update((key, value) for key, value in wanted.items() if key not in present)
    return upserts, deletes


class IpcacheEntry(NamedTuple):
    """A value of the ipcache."""

    identity: int
    node: Address | None
    key: int


def ipcache_entry_of(value: bytes) -> IpcacheEntry:
    """The parts of such a value."""
    identity, key, family, node = IPCACHE_ENTRY.unpack(value)
    return IpcacheEntry(identity, mapped(node) if family else None, key)


def tunnel_entry(node: Address, key: int = 0) -> bytes:
    """Value of the map of tunnels."""
    family, packed = _node(node)
    return TUNNEL_ENTRY.pack(packed, key, family)


def tunnel_entry_of(value: bytes) -> tuple[Address, int]:
    """Node and key of such a value."""
    node, key, _ = TUNNEL_ENTRY.unpack(value)
    return mapped(node), key


def node_key(node: Address) -> bytes:
    """Key of the map of the other nodes."""
    return NODE_KEY.pack(to_mapped(node))


def node_entry(key: int = 0) -> bytes:
    """Value of the map of the other nodes."""
    return NODE_ENTRY.pack(key)


def place_entry(number: int) -> bytes:
    """Value of the map of places."""
    return PLACE_ENTRY.pack(number)


def place_entry_of(value: bytes) -> int:
    """The place in such a value."""
    number: int = PLACE_ENTRY.unpack(value)[0]
    return number


def policy_key(endpoint: int, key: PolicyKey) -> bytes:
    """Key of the policy map."""
    direction, identity, proto, port, prefix, place = key
    return POLICY_KEY.pack(identity, place, port_bytes(port), endpoint, proto, direction, prefix)


def policy_key_of(data: bytes) -> tuple[int, PolicyKey]:
    """Endpoint and key of such a key."""
    identity, place, port, endpoint, proto, direction, prefix = POLICY_KEY.unpack(data)
    return endpoint, PolicyKey(direction, identity, proto, int.from_bytes(port, "big"), prefix, place)


def policy_entry(entry: PolicyEntry) -> bytes:
    """Value of the policy map, with counters at zero."""
    return POLICY_ENTRY.pack(0, 0, entry.rule, port_bytes(entry.proxy_port), entry.verdict)


class PolicyCounters(NamedTuple):
    """A policy entry as the kernel has it."""

    entry: PolicyEntry
    packets: int
    bytes: int


def policy_entry_of(data: bytes) -> PolicyCounters:
    """Entry and counters of such a value."""
    packets, size, rule, proxy, verdict = POLICY_ENTRY.unpack(data)
    return PolicyCounters(PolicyEntry(Verdict(verdict), int.from_bytes(proxy, "big"), rule), packets, size)


def shape_bits(key: PolicyKey) -> int:
    """The bits of an endpoint's shape that let the program look for ``key``."""
    port = SHAPE_ALL_TRAFFIC if key.proto == 0 else 1 << key.prefix
    if not key.place:
        return port
    return port | (SHAPE_PAIRS if key.identity else SHAPE_PLACES)


class ConntrackEntry(NamedTuple):
    """A flow as one of its ends tracks it: ``source`` began it; ``direction`` is how its first packet passed there.

    ``lifetime`` and ``ended`` are seconds of the monotonic clock. ``ended``: until when answers are held back, because
    policy ended the flow at this endpoint; else 0. ``peer_identity`` is the other end's, ``epoch`` the endpoint's, both
    as they were when policy was asked last.
    """

    source: Address
    destination: Address
    source_port: int
    destination_port: int
    proto: int
    direction: int
    endpoint: int
    tx_packets: int
    tx_bytes: int
    rx_packets: int
    rx_bytes: int
    lifetime: int
    ended: int
    flags: int
    tx_flags: int
    rx_flags: int
    peer_identity: int
    epoch: int
    rule: int
    service: int


def conntrack_key(proto: int, source: tuple[Address, int], target: tuple[Address, int]) -> bytes:
    """The key of a flow by its two ends (address and port), of which the first began it; the twin of ``ct_key_of``."""
    ends = [(to_mapped(address), port_bytes(port)) for address, port in (source, target)]
    # the order is that of the kernel's native words, the last one first
    order = [(*reversed(struct.unpack("=4I", data)), *struct.unpack("=H", port)) for data, port in ends]
    first = int(order[0] > order[1])
    (one, port0), (two, port1) = ends[first], ends[1 - first]
    return CT_KEY.pack(one, two, port0, port1, proto, first if proto in (1, 58) else 0)


def conntrack_entries(key: bytes, value: bytes) -> list[ConntrackEntry]:
    """Decode one flow: an entry for each end at which a pod of this node stands."""
    *addresses, port0, port1, proto, _ = CT_KEY.unpack(key)
    lifetime, _, _, flags, closing, *ends, packets0, packets1, bytes0, bytes1 = CT_ENTRY.unpack(value)
    ports, packets, sizes = (port0, port1), (packets0, packets1), (bytes0, bytes1)
    found = []
    for number in (0, 1):
        peer, rule, ended, service, epoch, endpoint, first = ends[7 * number : 7 * number + 7]
        if not first:
            continue
        source = number if first == CT_FIRST_OUT else 1 - number
        target = 1 - source
        found.append(
            ConntrackEntry(
                source=mapped(addresses[source]),
                destination=mapped(addresses[target]),
                source_port=int.from_bytes(ports[source], "big"),
                destination_port=int.from_bytes(ports[target], "big"),
                proto=proto,
                direction=int(first == CT_FIRST_OUT),
                endpoint=endpoint,
                tx_packets=packets[source],
                tx_bytes=sizes[source],
                rx_packets=packets[target],
                rx_bytes=sizes[target],
                lifetime=lifetime,
                ended=ended,
                flags=closing,
                tx_flags=flags[source],
                rx_flags=flags[target],
                peer_identity=peer,
                epoch=epoch,
                rule=rule,
                service=service,
            )
        )
    return found
