"""The endpoint record, the request that makes one, and its form on disk and in the API."""

from __future__ import annotations

import logging
import time
from collections import deque
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import msgspec

from ciliate import wire
from ciliate.endpoint.state import State, allowed
from ciliate.labels import LabelSet
from ciliate.workload import NamedPorts

log = logging.getLogger(__name__)
LOG_ENTRIES = 256
"""Status log entries that an endpoint keeps, the oldest go first (inventory section 4.5)."""


class EndpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a CNI mode knows of a new endpoint. MAC addresses are 6 bytes; the host device exists and is down.

    ``external``: the device is another plugin's; it is up already and nothing but our filters is put on it.
    ``through_stack``: other pods of the node reach it through the node's stack, not by the short way.
    """

    container_id: str
    container_ifname: str
    host_ifname: str
    host_ifindex: int
    host_mac: bytes
    mac: bytes
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    pod_namespace: str = ""
    pod_name: str = ""
    labels: dict[str, str] = {}
    netns: int = 0
    mode: str = "none"
    external: bool = False
    through_stack: bool = False


class LogEntry(msgspec.Struct, frozen=True):
    """One line of an endpoint's status log; ``time`` in seconds since the epoch."""

    time: float
    state: str
    message: str


class Endpoint:
    """One endpoint. Belongs to the agent's loop; only the endpoint manager changes it."""

    def __init__(self, endpoint_id: int, request: EndpointRequest, labels: LabelSet) -> None:
        self.id = endpoint_id
        self.request = request
        self.labels = labels
        self.identity = 0
        self.state = State.NEW
        self.policy_revision = 0
        self.enforce_ingress = False
        self.enforce_egress = False
        self.named_ports: NamedPorts = {}
        self.log: deque[LogEntry] = deque(maxlen=LOG_ENTRIES)

    @property
    def pod(self) -> str:
        """``namespace/name``, or an empty string where the runtime named no pod."""
        name = self.request.pod_name
        return f"{self.request.pod_namespace}/{name}" if name else ""

    @property
    def addresses(self) -> list[IPv4Address | IPv6Address]:
        """The endpoint's addresses, IPv4 first."""
        return [address for address in (self.request.ipv4, self.request.ipv6) if address is not None]

    def move(self, new: State, message: str) -> bool:
        """Go to state ``new``; a transition that the state machine refuses is logged and gives False."""
        if not allowed(self.state, new):
            log.warning("endpoint %d: transition %r to %r refused (%s)", self.id, self.state, new, message)
            return False
        self.state = new
        self.note(message)
        return True

    def note(self, message: str) -> None:
        """Add a line to the status log."""
        self.log.append(LogEntry(time.time(), str(self.state), message))

    def stored(self) -> dict[str, Any]:
        """The record for the state file."""
        return {
            "id": self.id,
            "request": wire.plain(self.request),
            "labels": self.labels.strings(),
            "identity": self.identity,
        }

    @classmethod
    def from_stored(cls, data: Any) -> Endpoint:
        """Read what ``stored`` gave; raises ValueError or msgspec.ValidationError where it is malformed."""
        if not isinstance(data, dict):
            raise ValueError(f"endpoint record: {type(data).__name__} found, expected an object")
        record = wire.convert(data, _Stored)
        endpoint = cls(record.id, record.request, LabelSet.parse(record.labels))
        endpoint.identity = record.identity
        return endpoint

    def document(self) -> dict[str, Any]:
        """The endpoint as the API shows it (inventory section 4.2, Endpoint)."""
        request = self.request
        return {
            "id": self.id,
            "spec": {},
            "status": {
                "state": str(self.state),
                "external-identifiers": {
                    "container-id": request.container_id,
                    "interface": request.container_ifname,
                    "pod-name": self.pod,
                },
                "identity": {"id": self.identity, "labels": self.labels.strings()},
                "labels": self.labels.strings(),
                "networking": {
                    "addressing": [
                        {
                            "ipv4": str(request.ipv4) if request.ipv4 else None,
                            "ipv6": str(request.ipv6) if request.ipv6 else None,
                        }
                    ],
                    "mac": request.mac.hex(":"),
                    "host-mac": request.host_mac.hex(":"),
                    "interface-name": request.host_ifname,
                    "interface-index": request.host_ifindex,
                },
                "policy": {
                    "policy-enabled": enforcement_text(self.enforce_ingress, self.enforce_egress),
                    "policy-revision": self.policy_revision,
                },
                "log": [msgspec.to_builtins(entry) for entry in list(self.log)[-5:]],
            },
        }


class _Stored(msgspec.Struct):
    id: int
    request: EndpointRequest
    labels: list[str]
    identity: int = 0


def enforcement_text(ingress: bool, egress: bool) -> str:
    """``none``, ``ingress``, ``egress`` or ``both``."""
    return {(False, False): "none", (True, False): "ingress", (False, True): "egress"}.get((ingress, egress), "both")
