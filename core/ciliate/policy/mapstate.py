"""Map state: what policy resolution yields and what the datapath writes, entry by entry.

The look-up order is that of inventory DP-Y01 and PO §8 item 1, extended by port prefixes (ranges), by a
protocol without port, by a wildcard identity, and by places (``places``): every look-up goes through the peer's own
identity at its place, then its identity anywhere, then anyone at that place, then anyone; within each, the longest port
prefix first, then the protocol alone, then "all traffic". The first entry found decides. ICMP uses its message type as
the port.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

INGRESS = 0
EGRESS = 1
ANY_IDENTITY = 0
MAX_ENTRIES = 16384
"""Entries that one endpoint may have (inventory DP-M05)."""


class Verdict(enum.IntEnum):
    """What an entry says."""

    ALLOW = 0
    DENY = 1
    REDIRECT = 2


class PolicyKey(NamedTuple):
    """Key of one entry of an endpoint's map state.

    ``port`` is in host byte order with the bits below ``prefix`` cleared; ``prefix`` counts its significant
    bits: 16 for one port, 0 for every port, between for an aligned piece of a range. ``proto`` 0 is every
    protocol and then has ``prefix`` 0. ``place`` 0: wherever the peer's address is.
    """

    direction: int
    identity: int
    proto: int = 0
    port: int = 0
    prefix: int = 0
    place: int = 0


class PolicyEntry(NamedTuple):
    """Value of one entry: ``rule`` numbers the deciding rule (0: none), ``proxy_port`` goes with REDIRECT."""

    verdict: Verdict
    proxy_port: int = 0
    rule: int = 0


MapState = Mapping[PolicyKey, PolicyEntry]


def lookup(state: MapState, direction: int, identity: int, proto: int, port: int, place: int = 0) -> PolicyEntry | None:
    """The entry that decides a packet, or None where no entry matches (default deny).

    This is the specification that the BPF program follows; a property test holds both together.
    """
    for peer, where in ((identity, place), (identity, 0), (ANY_IDENTITY, place), (ANY_IDENTITY, 0)):
        for prefix in range(16, -1, -1):
            masked = port & (0xFFFF << (16 - prefix)) & 0xFFFF
            entry = state.get(PolicyKey(direction, peer, proto, masked, prefix, where))
            if entry is not None:
                return entry
        entry = state.get(PolicyKey(direction, peer, place=where))
        if entry is not None:
            return entry
    return None
