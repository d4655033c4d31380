"""What an instance of each kind must have, read from its protocol: told at the start, not at the first use."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

PROTOCOLS = {
    "kvstore": "ciliate.kvstore:Kvstore",
    "identity": "ciliate.identity.backend:IdentityBackend",
    "ipam": "ciliate.ipam:Ipam",
    "chaining": "ciliate.cni.modes:ChainingMode",
    "masquerade": "ciliate.masquerade:Masquerade",
    "loader": "ciliate.datapath.loader:Loader",
    "status": "ciliate.agent.status:StatusSource",
}
OPTIONAL = ("start", "stop")


def contract(kind: str) -> list[str]:
    """Names of the methods and properties that an instance of a kind must have; none where no protocol says."""
    module, _, name = PROTOCOLS.get(kind, "").partition(":")
    if not module:
        return []
    protocol = getattr(importlib.import_module(module), name)
    return [item for item in vars(protocol) if not item.startswith("_") and item not in OPTIONAL]


def missing(kind: str, instance: Any) -> list[str]:
    """What an instance lacks of its kind's contract. Properties are not asked: it may not have started yet."""
    if hasattr(type(instance), "__getattr__"):
        return []  # it makes its attributes when it is asked for them
    absent = object()
    return [name for name in contract(kind) if inspect.getattr_static(instance, name, absent) is absent]
