"""The result of the plugin before us in a chain: read, checked, and handed on in the form of one version."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Interface, IPv6Interface, ip_interface, ip_network
from typing import Any

from ciliate.cni.spec import CniError, ErrorCode, Request

_SINCE_1_1_0 = {
    "interfaces": ("mtu", "socketPath", "pciID"),
    "routes": ("mtu", "advmss", "priority", "table", "scope"),
}
FIELD = "prevResult"


def required(request: Request) -> dict[str, Any]:
    """The request's prevResult; CniError where there is none."""
    previous = request.config.prev_result
    if previous is None:
        mode = request.config.mode
        text = f"prevResult: missing, expected one: chaining-mode {mode!r} comes after the plugin that makes the device"
        raise CniError(ErrorCode.INVALID_CONFIGURATION, text)
    return previous


def container_addresses(previous: Mapping[str, Any], ifname: str) -> list[IPv4Interface | IPv6Interface]:
    """The addresses that a result gives the container's interface ``ifname``.

    An address that names no interface counts as the container's. CniError names what is malformed.
    """
    interfaces = _objects(previous, "interfaces")
    found = []
    for position, item in enumerate(_objects(previous, "ips")):
        field = f"{FIELD}.ips[{position}]"
        if _belongs(item, interfaces, ifname, field):
            found.append(_interface_address(item.get("address"), f"{field}.address"))
    return found


def _belongs(item: Mapping[str, Any], interfaces: list[dict[str, Any]], ifname: str, field: str) -> bool:
    number = item.get("interface")
    if number is None:
        return True
    if type(number) is not int or not 0 <= number < len(interfaces):
        raise _wrong(f"{field}.interface", number, "an index into prevResult.interfaces")
    owner = interfaces[number]
    return owner.get("name") == ifname and bool(owner.get("sandbox"))


def _interface_address(text: Any, field: str) -> IPv4Interface | IPv6Interface:
    try:
        return ip_interface(_text(text))
    except ValueError:
        raise _wrong(field, text, "an address with prefix length") from None


def _text(value: Any) -> str:
    """ValueError where a value is no text: ipaddress would take a number for an address."""
    if not isinstance(value, str):
        raise ValueError("expected text")
    return value


def container_mac(previous: Mapping[str, Any], ifname: str) -> str:
    """The MAC address that a result names for the container's interface, or an empty string."""
    for item in _objects(previous, "interfaces"):
        if item.get("name") == ifname and item.get("sandbox"):
            return str(item.get("mac", "")).lower()
    return ""


def routes(previous: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Destination and gateway ("" where none is named) of a result's routes in the main table."""
    found = []
    for position, item in enumerate(_objects(previous, "routes")):
        if item.get("table") in (None, 0, 254):
            field = f"{FIELD}.routes[{position}].dst"
            try:
                destination = str(ip_network(_text(item.get("dst")), strict=False))
            except ValueError:
                raise _wrong(field, item.get("dst"), "a prefix") from None
            found.append((destination, str(item.get("gw") or "")))
    return found


def hand_on(previous: Mapping[str, Any], version: str) -> dict[str, Any]:
    """A result as the answer of a plugin that adds nothing to it, in the form of ``version``."""
    document = {**previous, "cniVersion": version}
    if "ips" in previous:
        document["ips"] = [_address(item, version) for item in _objects(previous, "ips")]
    for field, newer in _SINCE_1_1_0.items():
        if version != "1.1.0" and field in previous:
            items = _objects(previous, field)
            document[field] = [{key: value for key, value in item.items() if key not in newer} for item in items]
    return document


def _address(item: Mapping[str, Any], version: str) -> dict[str, Any]:
    document = dict(item)
    document.pop("version", None)
    if version in ("0.3.1", "0.4.0"):
        # up to 0.4.0 each address says its family
        document["version"] = "6" if ":" in str(item.get("address")) else "4"
    return document


def _objects(previous: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = previous.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _wrong(f"{FIELD}.{name}", value, "a list of objects")
    return value


def _wrong(field: str, value: Any, expected: str) -> CniError:
    given = "missing" if value is None else f"{value!r} given"
    return CniError(ErrorCode.INVALID_CONFIGURATION, f"{field}: {given}, expected {expected}")
