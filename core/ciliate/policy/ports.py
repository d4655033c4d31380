"""Ports: reading them in both dialects, and cutting ranges into aligned prefixes for the map state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from ciliate.policy.l7rules import L7Rules
from ciliate.policy.model import ICMP, ICMPV6, PROTOCOLS, TCP, UDP, PortItem
from ciliate.policy.reader import ABSENT, Reader

_SERVICE_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?")
MAX_PORTS = 40


@lru_cache(maxsize=65536)
def prefixes(first: int, last: int) -> tuple[tuple[int, int], ...]:
    """Cut ``first`` to ``last`` (both included) into the fewest aligned (port, prefix length) blocks."""
    blocks = []
    while first <= last:
        size = (first & -first) or 65536
        while size > last - first + 1:
            size //= 2
        blocks.append((first, 17 - size.bit_length()))
        first += size
    return tuple(blocks)


def valid_port_name(name: str) -> bool:
    """True for an IANA service name: at most 15 lower-case letters, digits and single '-', one letter at least."""
    return len(name) <= 15 and "--" not in name and _SERVICE_NAME.fullmatch(name) is not None


def cilium_port(reader: Reader, value: Any, path: str, l7: L7Rules | None) -> Iterator[PortItem]:
    """One item of ``toPorts[].ports`` (inventory PO-S05, PO-V05); ANY stands for TCP and UDP."""
    fields = reader.mapping(value, path, ("port", "protocol", "endPort"))
    if fields is None:
        return
    before = len(reader.problems)
    protocols = _protocols(reader, fields.get("protocol"), f"{path}.protocol")
    port = fields.get("port", ABSENT)
    numbers = _text_port(reader, port, f"{path}.port", any(item in (ICMP, ICMPV6) for item in protocols))
    last = _end_port(reader, fields.get("endPort"), f"{path}.endPort", numbers)
    if len(reader.problems) > before or numbers is None:
        return
    any_protocol = len(protocols) > 1
    for protocol in protocols:
        if isinstance(numbers, str):
            yield PortItem(protocol, 0, 0, numbers, any_protocol, l7)
        else:
            yield PortItem(protocol, numbers, numbers if last is None else last, "", any_protocol, l7)


def _protocols(reader: Reader, value: Any, path: str) -> tuple[int, ...]:
    if value is None or value == "" or (isinstance(value, str) and value.upper() == "ANY"):
        return (TCP, UDP)
    number = _PROTOCOLS.get(value.upper()) if isinstance(value, str) else None
    if number is None:
        reader.problem(path, value, f"expected one of {', '.join(PROTOCOLS)}, ANY")
        return ()
    return (number,)


_PROTOCOLS = {name.upper(): number for name, number in PROTOCOLS.items()}


def _text_port(reader: Reader, value: Any, path: str, icmp: bool) -> int | str | None:
    if not isinstance(value, str):
        expected = 'expected a port number in quotes ("80") or a port name'
        reader.problem(path, value, expected)
        return None
    if icmp:
        if value.isascii() and value.isdigit() and int(value) <= 255:
            return int(value)
        reader.problem(path, value, "expected an ICMP message type, 0 to 255")
        return None
    if value.isascii() and value.isdigit():
        # a leading zero makes it octal to the seed system
        if len(value) <= 5 and 0 < int(value) < 65536 and value[0] != "0":
            return int(value)
        reader.problem(path, value, "expected a port, 1 to 65535 without leading zeros, or a port name")
        return None
    if valid_port_name(value):
        return value
    reader.problem(path, value, "expected a port, 1 to 65535, or a port name")
    return None


def _end_port(reader: Reader, value: Any, path: str, first: int | str | None) -> int | None:
    if value is None or first is None:
        return None
    if isinstance(first, str):
        reader.problem(path, value, "expected only beside a port number, not a port name")
    elif not isinstance(value, int) or isinstance(value, bool) or not first <= value < 65536:
        reader.problem(path, value, f"expected a number from port ({first}) to 65535")
    else:
        return value
    return None


def kubernetes_port(reader: Reader, value: Any, path: str) -> PortItem | None:
    """One item of ``ports`` of a Kubernetes NetworkPolicy: no port means every port of the protocol."""
    fields = reader.mapping(value, path, ("port", "protocol", "endPort"))
    if fields is None:
        return None
    before = len(reader.problems)
    protocol = fields.get("protocol")
    if protocol is None:
        protocol = "TCP"
    if protocol not in ("TCP", "UDP", "SCTP"):
        reader.problem(f"{path}.protocol", protocol, "expected one of TCP, UDP, SCTP")
    port = fields.get("port")
    if port is not None:
        _int_or_name(reader, port, f"{path}.port")
    elif fields.get("endPort") is not None:
        reader.problem(f"{path}.endPort", fields["endPort"], "expected only beside a port number")
    if len(reader.problems) > before:
        return None
    if port is None:
        return PortItem(PROTOCOLS[protocol])
    last = _end_port(reader, fields.get("endPort"), f"{path}.endPort", port)
    if len(reader.problems) > before:
        return None
    if isinstance(port, str):
        return PortItem(PROTOCOLS[protocol], 0, 0, port)
    return PortItem(PROTOCOLS[protocol], port, port if last is None else last)


def _int_or_name(reader: Reader, port: Any, path: str) -> None:
    if isinstance(port, str):
        if not valid_port_name(port):
            expected = "expected a port name (lower case, at most 15 characters) or a number without quotes"
            reader.problem(path, port, expected)
    elif not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        reader.problem(path, port, "expected a port, 1 to 65535, or a port name")
