"""Numeric identities: reserved numbers, ranges, and the identity record (inventory PO-L04, PO-L05)."""

from __future__ import annotations

import msgspec

from ciliate.labels import SOURCE_RESERVED, Label, LabelSet

UNKNOWN = 0
HOST = 1
WORLD = 2
UNMANAGED = 3
HEALTH = 4
INIT = 5
RESERVED = {HOST: "host", WORLD: "world", UNMANAGED: "unmanaged", HEALTH: "health", INIT: "init"}

WELL_KNOWN_MIN, WELL_KNOWN_MAX = 100, 115
"""Numbers that every node knows by label set (`ciliate.identity.wellknown`)."""
FIXED_MIN, FIXED_MAX = 128, 255
"""Numbers that an administrator gives (`ciliate.identity.fixed`)."""
CLUSTER_MIN = 256
CLUSTER_MAX = 65535
LOCAL_BASE = 1 << 24
"""Node-local (CIDR) identities start here and never leave the node."""


class Identity(msgspec.Struct, frozen=True, gc=False):
    """A numeric identity and the label set that it stands for."""

    id: int
    labels: LabelSet


def is_reserved(number: int) -> bool:
    """True for the fixed identities 1 to 5."""
    return number in RESERVED


def is_assigned(number: int) -> bool:
    """True for numbers that no backend gives or takes: reserved, well-known and fixed ones."""
    return 0 < number < CLUSTER_MIN


def is_local(number: int) -> bool:
    """True for node-local identities (CIDR), which no backend allocates."""
    return number >= LOCAL_BASE


def reserved_identity(number: int) -> Identity:
    """The identity record of a reserved number; KeyError for any other."""
    return Identity(number, LabelSet([Label(SOURCE_RESERVED, RESERVED[number])]))
