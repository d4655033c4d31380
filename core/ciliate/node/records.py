"""Who is behind an address, as nodes tell each other (inventory 4.11 K1, `…/ip/v1/default/ADDRESS`)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import msgspec

from ciliate.identity import CLUSTER_MAX, CLUSTER_MIN, HEALTH, INIT, UNMANAGED

Address = IPv4Address | IPv6Address
SCOPE = "cilium-global"
ACCEPTED = frozenset({UNMANAGED, HEALTH, INIT, *range(CLUSTER_MIN, CLUSTER_MAX + 1)})
"""What another node may speak of: never ``host`` and ``world``, never prefixes, which are each node's own."""


class Record(msgspec.Struct, gc=False, omit_defaults=True):
    """One document. ``node`` is ``cilium-global:CLUSTER:NODE:ENDPOINT``; ``host`` is where to tunnel to."""

    ip: str = msgspec.field(name="IP")
    host: str = msgspec.field(name="HostIP", default="")
    identity: int = msgspec.field(name="ID", default=0)
    key: int = msgspec.field(name="Key", default=0)
    node: str = msgspec.field(name="Metadata", default="")


decode = msgspec.json.Decoder(Record).decode
"""The record of a document; msgspec.ValidationError or msgspec.DecodeError where it is malformed."""


def owner(cluster: str, node: str) -> str:
    """What ``Record.node`` begins with for every endpoint of a node."""
    return f"{SCOPE}:{cluster}:{node}"


def encode(address: Address, host: IPv4Address | None, identity: int, owner: str, endpoint: int, key: int = 0) -> bytes:
    """The document of one address."""
    record = Record(str(address), str(host or ""), identity, key, f"{owner}:{endpoint}")
    return msgspec.json.encode(record)
