"""What a container runtime asks for, in the tests of endpoints."""

from __future__ import annotations

from typing import Any

from ciliate.endpoint.model import EndpointRequest


def request(**more: Any) -> EndpointRequest:
    """A pod's device; ``more``: what else the test wants it to have."""
    fixed = {"container_id": "c1", "container_ifname": "eth0", "host_ifname": "lxc1", "host_ifindex": 7}
    return EndpointRequest(**{**fixed, "host_mac": b"\2" * 6, "mac": b"\4" * 6, **more})
