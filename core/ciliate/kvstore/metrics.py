"""What operations on a store cost: the histogram ``ciliate_kvstore_operations_duration_seconds`` (inventory 4.4)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from prometheus_client import Histogram

OPERATIONS = Histogram(
    "ciliate_kvstore_operations_duration_seconds",
    "Time of an operation on the key-value store, without waiting for the rate limit",
    ["scope", "kind", "action", "outcome"],
    registry=None,
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
"""Registered by whoever serves metrics. ``outcome`` is success or fail."""
KINDS = {"get": "read", "list": "read", "status": "read", "watch": "read", "grant": "lease", "keepalive": "lease"}
KINDS |= {"revoke": "lease", "lease": "lease"}


def scope(key: str) -> str:
    """What a key is about: ``identities`` for ``cilium/state/identities/v1/…``, ``lock`` for a lock."""
    parts = key.split("/", 3)
    if len(parts) > 2 and parts[:2] == ["cilium", "state"]:
        return parts[2]
    return "lock" if "/.locks/" in key else "other"


@contextlib.contextmanager
def measured(action: str, key: str = "") -> Iterator[None]:
    """Count one operation with its duration."""
    began, outcome = time.monotonic(), "fail"
    try:
        yield
        outcome = "success"
    finally:
        labels = (scope(key), KINDS.get(action, "write"), action, outcome)
        OPERATIONS.labels(*labels).observe(time.monotonic() - began)
