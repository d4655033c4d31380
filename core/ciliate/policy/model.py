"""The rule model: both dialects (CiliumNetworkPolicy, Kubernetes NetworkPolicy) in one plain form.

A policy object becomes rules; a rule selects endpoints and holds sections, one per item of ``ingress`` or
``egress``; a section allows its peers on its ports. Everything is immutable and hashable.
"""

from __future__ import annotations

import enum
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

import msgspec

from ciliate.labels import LabelSet
from ciliate.policy.l7rules import L7Rules
from ciliate.policy.selector import Selector

Network = IPv4Network | IPv6Network
TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58
PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP, "ICMP": ICMP, "ICMPv6": ICMPV6}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}


class CidrPeer(NamedTuple):
    """Addresses of ``cidr`` outside every ``exclude``; ``pods`` says whether addresses of pods count (Kubernetes)."""

    cidr: Network
    exclude: tuple[Network, ...] = ()
    pods: bool = False

    def __str__(self) -> str:
        excluded = ", ".join(map(str, self.exclude))
        return f"{self.cidr} except {excluded}" if excluded else str(self.cidr)


class FqdnPeer(NamedTuple):
    """Whatever a DNS name stands for; ``pattern`` may hold ``*`` within one label."""

    pattern: str
    exact: bool

    def __str__(self) -> str:
        return f"fqdn {self.pattern}"


class ServicePeer(NamedTuple):
    """Endpoints of services without selector: one by ``name``, or those whose labels match ``labels``.

    An empty namespace is any.
    """

    namespace: str
    name: str = ""
    labels: Selector | None = None

    def __str__(self) -> str:
        return f"service {self.namespace or '*'}/{self.name or self.labels}"


class Special(enum.Enum):
    """Peers that need no look-up."""

    ANYTHING = "anything"
    NOTHING = "nothing"

    def __str__(self) -> str:
        return self.value


Peer = Selector | CidrPeer | FqdnPeer | ServicePeer | Special


class PortItem(NamedTuple):
    """Ports ``first`` to ``last`` of one protocol, or the ports a pod calls ``name``. 0 to 65535 is every port.

    For ICMP the numbers are message types. ``any_protocol`` remembers that the item was written with protocol ANY.
    """

    protocol: int
    first: int = 0
    last: int = 65535
    name: str = ""
    any_protocol: bool = False
    l7: L7Rules | None = None

    def __str__(self) -> str:
        protocol = PROTOCOL_NAMES[self.protocol]
        if self.name:
            return f"{self.name}/{protocol}"
        if (self.first, self.last) == (0, 65535):
            return f"*/{protocol}"
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"{ports}/{protocol}"


class Section(msgspec.Struct, frozen=True, eq=False):
    """One item of ``ingress`` or ``egress``. ``peers`` None is any layer-3 peer; ``ports`` None is all traffic.

    ``number`` is what a map-state entry carries to name this item. ``from_prefixes`` marks sections whose peers are
    CIDRs, which do not lift L7 restrictions (inventory PO-R05).
    """

    path: str
    peers: tuple[Peer, ...] | None
    ports: tuple[PortItem, ...] | None = None
    requires: tuple[Selector, ...] = ()
    from_prefixes: bool = False
    number: int = 0

    @property
    def filters(self) -> bool:
        """True where a port item looks at layer 7."""
        return self.ports is not None and any(item.l7 is not None for item in self.ports)

    @property
    def named(self) -> bool:
        """True where a port is given by name."""
        return self.ports is not None and any(item.name for item in self.ports)

    @property
    def content(self) -> tuple[object, ...]:
        """What makes two sections mean the same."""
        return (self.path, self.peers, self.ports, self.requires, self.from_prefixes)


class Rule(msgspec.Struct, frozen=True, eq=False):
    """One rule: whom it selects, and per direction its sections; None where it does not speak of a direction."""

    subject: Selector
    ingress: tuple[Section, ...] | None
    egress: tuple[Section, ...] | None


class RuleOrigin(NamedTuple):
    """Where a section comes from."""

    kind: str
    namespace: str
    name: str
    path: str
    file: str = ""
    line: int = 0
    labels: LabelSet = LabelSet()

    def __str__(self) -> str:
        name = f"{self.namespace}/{self.name}" if self.namespace else self.name
        place = f" ({self.file}:{self.line})" if self.file else ""
        return f"{self.kind} {name} {self.path}{place}"
