"""Security identities: numbers that stand for label sets."""

from ciliate.identity.numeric import (
    CLUSTER_MAX,
    CLUSTER_MIN,
    HEALTH,
    HOST,
    INIT,
    LOCAL_BASE,
    RESERVED,
    UNKNOWN,
    UNMANAGED,
    WORLD,
    Identity,
    is_local,
    is_reserved,
    reserved_identity,
)

__all__ = [
    "CLUSTER_MAX",
    "CLUSTER_MIN",
    "HEALTH",
    "HOST",
    "INIT",
    "LOCAL_BASE",
    "RESERVED",
    "UNKNOWN",
    "UNMANAGED",
    "WORLD",
    "Identity",
    "is_local",
    "is_reserved",
    "reserved_identity",
]
