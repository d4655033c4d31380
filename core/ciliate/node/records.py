"""Who is behind an address, as nodes tell each other (inventory 4.11 K1, `…/ip/v1/default/ADDRESS`)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec
from pyroaring import BitMap

from ciliate.datapath import layout
from ciliate.identity import (
    CLUSTER_MAX,
    FIXED_MIN,
    HEALTH,
    INIT,
    UNMANAGED,
    WELL_KNOWN_MAX,
    WELL_KNOWN_MIN,
)
from ciliate.workload import NamedPorts

Address = IPv4Address | IPv6Address
Ports = tuple[tuple[str, str, int], ...]
"""(name, protocol, number) of each named port."""
SCOPE = "cilium-global"
ACCEPTED = BitMap(
    [
        *(UNMANAGED, HEALTH, INIT),
        *range(WELL_KNOWN_MIN, WELL_KNOWN_MAX + 1),
        # fixed ones, and those of the cluster right behind them
        *range(FIXED_MIN, CLUSTER_MAX + 1),
    ]
)
"""What another node may speak of: never ``host`` and ``world``, never prefixes, which are each node's own."""


class Record(msgspec.Struct, gc=False, omit_defaults=True):
    """One document. ``node`` is ``cilium-global:CLUSTER:NODE:ENDPOINT``; ``host`` is where to tunnel to."""

    ip: str = msgspec.field(name="IP")
    host: str = msgspec.field(name="HostIP", default="")
    identity: int = msgspec.field(name="ID", default=0)
    key: int = msgspec.field(name="Key", default=0)
    node: str = msgspec.field(name="Metadata", default="")
    ports: Ports = msgspec.field(name="NamedPorts", default=())


class Claim(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What a record says, without the address: one object for all addresses of which it is true.

    ``entry`` is the value of the kernel's ipcache; ``own`` says that this node wrote it, ``node`` (`Node.id`) who did,
    and ``host`` where it says that packets are to be tunnelled to.
    """

    identity: int
    entry: bytes
    ports: Ports = ()
    own: bool = False
    node: str = ""
    host: Address | None = None


_decode = msgspec.json.Decoder(Record).decode


def owner(cluster: str, node: str) -> str:
    """What ``Record.node`` begins with for every endpoint of a node."""
    return f"{SCOPE}:{cluster}:{node}"


def encode(
    address: Address,
    host: Address | None,
    identity: int,
    node: str,
    ports: NamedPorts | None = None,
    key: int = 0,
) -> bytes:
    """The document of one address; ``node`` is the owner with its endpoint's number."""
    named = ((name, protocol, number) for name, pairs in (ports or {}).items() for protocol, number in pairs)
    return msgspec.json.encode(Record(str(address), str(host or ""), identity, key, node, tuple(named)))


class Decoder:
    """From documents to claims; equal claims are one object, so that a hundred thousand addresses stay small."""

    def __init__(self, own: str) -> None:
        """``own`` is this node, as `owner` names it."""
        self._own = f"{own}:"
        self._claims: dict[tuple[int, str, int, Ports, bool, str], Claim] = {}

    def __call__(self, name: str, value: bytes) -> Claim:
        """The claim of a document; ValueError where it is malformed or not of an address as its key says."""
        record = _decode(value)
        if record.ip != name:
            raise ValueError(f"IP: {record.ip!r} given, expected {name!r} as in the key")
        own = record.node.startswith(self._own)
        node = record.node.rpartition(":")[0]
        parts = (record.identity, record.host, record.key, record.ports, own, node)
        return self._claims.get(parts) or self._make(parts)

    def _make(self, parts: tuple[int, str, int, Ports, bool, str]) -> Claim:
        identity, host, key, ports, own, node = parts
        scope, _, claimant = node.partition(":")
        if scope != SCOPE or claimant.count(":") != 1:
            raise ValueError(f"Metadata: {node!r} given, expected {SCOPE}:CLUSTER:NODE:ENDPOINT")
        if identity not in ACCEPTED:
            raise ValueError(f"ID: {identity} given, expected an identity that another node's pods may have")
        if not 0 <= key <= 255:
            raise ValueError(f"Key: {key} given, expected 0 to 255")
        home = ip_address(host) if host else None
        entry = layout.ipcache_entry(identity, home, key)
        claim = self._claims[parts] = Claim(identity, entry, ports, own, claimant.replace(":", "/"), home)
        return claim

    def __len__(self) -> int:
        return len(self._claims)

    def forget_all_but(self, used: set[Claim]) -> None:
        """Let go of claims that are true of no address any more."""
        self._claims = {parts: claim for parts, claim in self._claims.items() if claim in used}
