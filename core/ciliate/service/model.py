"""Services as people and programs write them, and what has to be true of one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, Literal

import msgspec

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
MAX_BACKENDS = 65535
SHOWN = 100
"""Characters of a wrong value that a message shows."""
MAX_AFFINITY = 86400
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Kind = Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalIP"]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class FrontendSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What clients speak to. The protocol is part of it."""

    ip: str
    port: int
    protocol: str = "TCP"

    def __str__(self) -> str:
        return f"{endpoint_text(self.ip, self.port)}/{self.protocol}"


class BackendSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", gc=False):
    """One place that answers. ``local``: it is on this node. ``terminating``: it answers still, but new flows are for
    others where there are any.
    """

    ip: str
    port: int
    local: bool = False
    terminating: bool = False

    def __str__(self) -> str:
        return endpoint_text(self.ip, self.port)


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """One frontend with its backends. ``id`` 0: to be allocated. Affinity in seconds, 0: none.

    ``source_ranges``: who may come from outside, where there are any. Those of the other family let nobody in.
    """

    id: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)] = 0
    name: str = ""
    namespace: str = ""
    type: Kind = "ClusterIP"
    frontend_address: FrontendSpec
    backend_addresses: list[BackendSpec] = []
    session_affinity_timeout: Annotated[int, msgspec.Meta(ge=0, le=MAX_AFFINITY)] = 0
    external_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    source_ranges: list[str] = []


class Problem(msgspec.Struct, frozen=True):
    """One mistake: the field, what was given, what was expected."""

    field: str
    value: Any
    expected: str

    def __str__(self) -> str:
        given = repr(self.value)
        shown = given if len(given) <= SHOWN else f"{given[: SHOWN - 3]}..."
        return f"{self.field}: {shown} given, expected {self.expected}"


class ServiceError(ValueError):
    """Services that are refused; ``problems`` has every reason."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class FrontendTakenError(ServiceError):
    """A frontend that another service has."""


class ServiceMissingError(LookupError):
    """There is no such service."""


def endpoint_text(ip: str, port: int) -> str:
    """``10.0.0.1:80`` or ``[fd00::1]:80``."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def packed(text: str) -> bytes | None:
    """The 16 bytes of an address, IPv4 mapped into IPv6; None where the text is none."""
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return b"\0" * 10 + b"\xff\xff" + socket.inet_pton(socket.AF_INET, text)
    except (OSError, TypeError, ValueError):
        return None


class Rules(msgspec.Struct, frozen=True):
    """What a node refuses as frontend: its pods' ranges, and everything outside ``external`` for external addresses.

    An external address is where a service may take traffic away from whoever has it (CVE-2020-8554), so none is taken
    unless the administrator named its range.
    """

    pods: tuple[Network, ...] = ()
    external: tuple[Network, ...] = ()


def check(spec: ServiceSpec, rules: Rules, path: str = "") -> Iterator[Problem]:
    """What is wrong with a service; ``path`` stands before every field."""
    front = spec.frontend_address
    address = packed(front.ip)
    if address is None:
        yield Problem(f"{path}frontend-address.ip", front.ip, "an IPv4 or IPv6 address")
    else:
        yield from _check_address(ip_address(front.ip), spec.type, rules, f"{path}frontend-address.ip")
    if not 0 < front.port < 65536:
        yield Problem(f"{path}frontend-address.port", front.port, "a port, 1 to 65535")
    if front.protocol not in PROTOCOLS:
        yield Problem(f"{path}frontend-address.protocol", front.protocol, f"one of {', '.join(PROTOCOLS)}")
    yield from _check_backends(spec, f"{path}backend-addresses")
    yield from _check_ranges(spec, f"{path}source-ranges")


BROADCAST = IPv4Address("255.255.255.255")


def is_usable(address: Address) -> bool:
    """Whether packets of others can be sent to an address: it is one host's, and of no link alone."""
    if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local:
        return False
    return address != BROADCAST and (address.version == 4 or address.ipv4_mapped is None)


def _check_address(address: Address, kind: str, rules: Rules, field: str) -> Iterator[Problem]:
    if kind == "NodePort" and address.is_unspecified:
        return  # the node's own loopback addresses, at its sockets alone
    if not is_usable(address):
        yield Problem(field, str(address), "an address that packets of others can be sent to")
    elif any(address in network for network in rules.pods if network.version == address.version):
        yield Problem(field, str(address), "an address outside the pods' ranges")
    elif kind == "ExternalIP" and not any(address in item for item in rules.external):
        allowed = ", ".join(map(str, rules.external)) or "none"
        yield Problem(field, str(address), f"an address in service-external-ranges ({allowed})")


def _check_backends(spec: ServiceSpec, field: str) -> Iterator[Problem]:
    backends, family = spec.backend_addresses, ":" in spec.frontend_address.ip
    if len(backends) > MAX_BACKENDS:
        yield Problem(field, len(backends), f"at most {MAX_BACKENDS} backends")
    seen = set()
    for index, item in enumerate(backends):
        address = packed(item.ip)
        if address is None:
            yield Problem(f"{field}[{index}].ip", item.ip, "an IPv4 or IPv6 address")
        elif (":" in item.ip) != family:
            yield Problem(f"{field}[{index}].ip", item.ip, "an address of the frontend's family")
        elif not is_usable(ip_address(item.ip)):
            yield Problem(f"{field}[{index}].ip", item.ip, "an address that packets can be sent to")
        if not 0 < item.port < 65536:
            yield Problem(f"{field}[{index}].port", item.port, "a port, 1 to 65535")
        if (address, item.port) in seen:
            yield Problem(f"{field}[{index}]", str(item), "each backend once")
        seen.add((address, item.port))


def _check_ranges(spec: ServiceSpec, field: str) -> Iterator[Problem]:
    for index, text in enumerate(spec.source_ranges):
        try:
            ip_network(text)
        except ValueError:
            yield Problem(f"{field}[{index}]", text, "a network in CIDR notation")
