"""A node of the cluster, and its form in the store (inventory 4.11 K1, `…/nodes/v1/CLUSTER/NODE`)."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec

from ciliate import wire

INTERNAL, ROUTER = "InternalIP", "RouterIP"
"""Types of addresses: where the node is reached from outside, and its own address within its pod ranges."""
SOURCE = "kvstore"


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One node. ``ipv4`` and ``ipv6`` are its addresses in the network that joins the nodes (the underlay).

    ``router4`` and ``router6`` are what its own processes use towards pods; ``key`` is the encryption key that it
    sends and receives with, 0 where it has none.
    """

    name: str
    cluster: str = "default"
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    router4: IPv4Address | None = None
    router6: IPv6Address | None = None
    pods4: IPv4Network | None = None
    pods6: IPv6Network | None = None
    health4: IPv4Address | None = None
    health6: IPv6Address | None = None
    key: int = 0

    @property
    def id(self) -> str:
        """``CLUSTER/NAME``: unique among all clusters."""
        return f"{self.cluster}/{self.name}"


class _Address(msgspec.Struct, rename="pascal"):
    type: str
    ip: str = msgspec.field(name="IP")


class _Stored(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The document in the store."""

    name: str = msgspec.field(name="Name")
    cluster: str = msgspec.field(name="Cluster")
    addresses: list[_Address] = msgspec.field(name="IPAddresses", default_factory=list)
    pods4: str | None = msgspec.field(name="IPv4AllocCIDR", default=None)
    pods6: str | None = msgspec.field(name="IPv6AllocCIDR", default=None)
    health4: str | None = msgspec.field(name="IPv4HealthIP", default=None)
    health6: str | None = msgspec.field(name="IPv6HealthIP", default=None)
    cluster_id: int = msgspec.field(name="ClusterID", default=0)
    source: str = msgspec.field(name="Source", default="")
    key: int = msgspec.field(name="EncryptionKey", default=0)


_decoder = msgspec.json.Decoder(_Stored)


def encode(node: Node) -> bytes:
    """The node's document."""
    kinds = ((INTERNAL, node.ipv4), (INTERNAL, node.ipv6), (ROUTER, node.router4), (ROUTER, node.router6))
    document = _Stored(
        name=node.name,
        cluster=node.cluster,
        addresses=[_Address(kind, str(address)) for kind, address in kinds if address is not None],
        pods4=_text(node.pods4),
        pods6=_text(node.pods6),
        health4=_text(node.health4),
        health6=_text(node.health6),
        source=SOURCE,
        key=node.key,
    )
    return msgspec.json.encode(document)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def decode(value: bytes) -> Node:
    """The node of a document; msgspec.ValidationError or ValueError where it is malformed.

    Of several addresses of one type and family the first counts.
    """
    stored = _decoder.decode(value)
    addresses: dict[str, str] = {}
    for item in stored.addresses:
        family = "6" if ":" in item.ip else "4"
        name = {INTERNAL: "ipv", ROUTER: "router"}.get(item.type)
        if name is not None:
            addresses.setdefault(name + family, item.ip)
    data = {
        "name": stored.name,
        "cluster": stored.cluster,
        "pods4": stored.pods4,
        "pods6": stored.pods6,
        "health4": stored.health4,
        "health6": stored.health6,
        "key": stored.key,
        **addresses,
    }
    return wire.convert(data, Node)
