"""The endpoint record, the request that makes one, and its form on disk and in the API."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any

import msgspec

from ciliate import wire
from ciliate.datapath.shaping import Limits
from ciliate.endpoint.state import State, allowed
from ciliate.labels import SOURCE_RESERVED, LabelSet
from ciliate.workload import NamedPorts

log = logging.getLogger(__name__)
LOG_ENTRIES = 256
"""Status log entries that an endpoint keeps, the oldest go first (inventory section 4.5)."""
HEALTH = ("Disabled", "OK", "Bootstrap", "Pending", "Warning", "Failure")
"""From best to worst."""


class EndpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a CNI mode knows of a new endpoint. MAC addresses are 6 bytes; the host device exists and is down.

    ``external``: the device is another plugin's; it is up already and nothing but our filters is put on it.
    ``link_local``: its IPv6 link-local address on such a device, where that had one.
    ``through_stack``: other pods of the node reach it through the node's stack, not by the short way.
    ``limits``: what it may receive and send.
    ``reserved``: the reserved identity that it has whatever its labels; 0 for pods.
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
    link_local: IPv6Address | None = None
    through_stack: bool = False
    limits: Limits = Limits()
    reserved: int = 0


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
        self.orchestration = LabelSet()
        """What the orchestrator last said, unfiltered; ``labels`` are those that make the identity."""
        self.user_labels = LabelSet()
        self.disabled_labels = LabelSet()
        self.options: dict[str, str] = {}
        """Options that are not as the node's (`ciliate.endpoint.options`)."""
        self.identity = 0
        self.unresolved_since = 0.0
        """Monotonic time at which labels changed that have no identity yet; 0 where all have."""
        self.failures = 0
        """Attempts to follow an event that failed in a row."""
        self.last_error = ""
        self.state = State.NEW
        self.policy_revision = 0
        self.device_problem = ""
        """Why its device does not work as it is, or nothing."""
        self.policy_problem = ""
        """Why the endpoint still has an older policy, or nothing."""
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

    @cached_property
    def prefixes(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The endpoint's addresses as host prefixes."""
        return tuple(ip_network(address) for address in self.addresses)

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
            "orchestration": self.orchestration.strings(),
            "user-labels": self.user_labels.strings(),
            "disabled-labels": self.disabled_labels.strings(),
            "options": self.options,
        }

    @classmethod
    def from_stored(cls, data: Any) -> Endpoint:
        """Read what ``stored`` gave; raises ValueError or msgspec.ValidationError where it is malformed."""
        if not isinstance(data, dict):
            raise ValueError(f"endpoint record: {type(data).__name__} found, expected an object")
        record = wire.convert(data, _Stored)
        endpoint = cls(record.id, record.request, LabelSet.parse(record.labels))
        endpoint.identity = record.identity
        # a record of before there were user labels has no word of the orchestrator's: all labels were
        told = record.labels if record.orchestration is None else record.orchestration
        endpoint.orchestration = LabelSet(label for label in LabelSet.parse(told) if label.source != SOURCE_RESERVED)
        endpoint.user_labels = LabelSet.parse(record.user_labels)
        endpoint.disabled_labels = LabelSet.parse(record.disabled_labels)
        endpoint.options = record.options
        return endpoint

    def connected(self) -> bool:
        """Whether the host side of the endpoint's device is there, the same as at first."""
        try:
            return socket.if_nametoindex(self.request.host_ifname) == self.request.host_ifindex
        except OSError:
            return False

    def health(self, revision: int) -> dict[str, Any]:
        """What can be said of the endpoint's health where policy is at ``revision`` (inventory 4.2, EndpointHealth)."""
        connected = self.connected()
        bpf, policy = self._datapath_health(), self._policy_health(revision)
        parts = [bpf, policy, "OK" if connected else "Failure"]
        return {
            "overallHealth": max(parts, key=HEALTH.index),
            "bpf": bpf,
            "policy": policy,
            "connected": connected,
            "message": self._complaint(connected),
        }

    def _complaint(self, connected: bool) -> str:
        gone = "" if connected else f"device {self.request.host_ifname} is gone"
        return self.last_error or gone or self.device_problem or self.policy_problem

    def _datapath_health(self) -> str:
        if self.state in (State.DISCONNECTING, State.DISCONNECTED):
            return "Disabled"
        if self.device_problem:
            return "Failure"
        if self.failures:
            return "Warning" if self.state is State.READY else "Failure"
        if self.state is State.READY:
            return "OK"
        return "Pending" if self.policy_revision else "Bootstrap"

    def _policy_health(self, revision: int) -> str:
        if self.state in (State.DISCONNECTING, State.DISCONNECTED):
            return "Disabled"
        if self.policy_problem:
            return "Warning"
        if not self.policy_revision:
            return "Bootstrap"
        return "OK" if self.policy_revision >= revision else "Pending"

    def document(self) -> dict[str, Any]:
        """The endpoint as the API shows it (inventory section 4.2, Endpoint)."""
        request = self.request
        return {
            "id": self.id,
            "spec": {"label-configuration": {"user": self.user_labels.strings()}, "options": self.options},
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
                    "problem": self.policy_problem,
                },
                "log": [msgspec.to_builtins(entry) for entry in list(self.log)[-5:]],
            },
        }


class _Stored(msgspec.Struct, rename="kebab"):
    id: int
    request: EndpointRequest
    labels: list[str]
    identity: int = 0
    orchestration: list[str] | None = None
    user_labels: list[str] = []
    disabled_labels: list[str] = []
    options: dict[str, str] = {}


def enforcement_text(ingress: bool, egress: bool) -> str:
    """``none``, ``ingress``, ``egress`` or ``both``."""
    return {(False, False): "none", (True, False): "ingress", (False, True): "egress"}.get((ingress, egress), "both")
