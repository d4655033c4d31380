"""Filters on the node's own devices, which are not ours: what others attached stays, and nothing else is touched.

Blocking: call from threads.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ciliate.datapath import devices, external, rtnl
from ciliate.datapath.layout import Address
from ciliate.datapath.netlink import NetlinkError, route

PRIORITY = 20
"""Of our filters on the node's own devices; endpoints' devices have others."""
_OURS = ("ciliate_",)
_ROUTE, _HOP = struct.Struct("=BB2xBxxBI"), struct.Struct("=H6x")
_MAIN, _UNICAST, _OIF, _MULTIPATH = 254, 1, 4, 9
_NOT_FIRST = 0x01 | 0x08 | 0x20 | 0x40
"""Flags of an address: secondary or temporary, failed, deprecated, tentative."""


def device_indexes() -> dict[str, int]:
    """Name -> interface index of every device of this namespace that is not an endpoint's."""
    with devices.doing("list of devices"):
        return {name: index for name, index in devices.list_devices().items() if not name.startswith(devices.PREFIX)}


def attach(index: int, egress: bool, program: int, name: str) -> None:
    """Attach a program, or replace in one step the one of ours that is there. ``name`` is what ``attached`` tells."""
    rtnl.ensure_clsact(index)
    batch, action = rtnl.Batch(), f"filter on device {index}"
    message = rtnl.bpf_filter(index, devices.DIRECTIONS[egress], PRIORITY, program, 0, name)
    batch.add(rtnl.NEWTFILTER, rtnl.CREATE | rtnl.REPLACE, message, action)
    batch.run()


def attached(index: int) -> dict[bool, str]:
    """Whether egress -> name of our filter there; a direction without one is left out."""
    found = {}
    for egress, parent in devices.DIRECTIONS.items():
        for message in _filters(index, parent):
            options = message.get("TCA_OPTIONS")
            if message["info"] >> 16 == PRIORITY and options is not None and options.get("TCA_BPF_NAME"):
                found[egress] = str(options.get("TCA_BPF_NAME"))
    return found


def _filters(index: int, parent: int) -> list[Any]:
    try:
        return list(route().get_filters(index=index, parent=parent))
    except NetlinkError as error:
        if error.code in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            return []  # no queueing discipline, or no device
        raise


def prepare(index: int) -> None:
    """Give a device the queueing discipline that filters hang on, where it has none yet.

    That stops a device that is up for a moment and drops what it holds: so not when traffic depends on it.
    """
    rtnl.ensure_clsact(index)


def detach(index: int, egress: bool) -> None:
    """Remove our filter of one direction; the queueing discipline stays, as its removal would lose packets."""
    external.detach(index, PRIORITY, devices.DIRECTIONS[egress])


def restore(index: int) -> None:
    """Remove the queueing discipline where nobody has filters on it."""
    external.drop_empty_clsact(index)


def refuse_own_source(names: Iterable[str]) -> list[str]:
    """Let the stack refuse again what arrives with one of the node's own addresses as source; returns where it did not.

    Earlier versions turned that off, as their programs wrote such sources themselves.
    """
    changed = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            setting = Path(f"/proc/sys/net/ipv4/conf/{name}/accept_local")
            if setting.read_text().strip() != "0":
                setting.write_text("0\n")
                changed.append(name)
    return changed


def native_devices(chosen: str) -> list[str]:
    """The devices that lead out of the node: those named (comma-separated), else those of default routes.

    Where there is no default route either: those with an address, except the loopback and our own devices.
    """
    if chosen.strip():
        return [name.strip() for name in chosen.split(",") if name.strip()]
    with devices.doing("devices of default routes"):
        return sorted(set(_default_devices()) or set(_addressed_devices()))


def _default_devices() -> Iterator[str]:
    # among thousands of routes to other nodes: read as bytes, by a socket of its own
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in rtnl.dump(rtnl.GETROUTE, _ROUTE.pack(family, 0, 0, 0, 0), "devices of default routes"):
            _, length, table, kind, _ = _ROUTE.unpack_from(message)
            if length or table != _MAIN or kind != _UNICAST:
                continue
            found = rtnl.attributes(message, _ROUTE.size)
            for index in [found[_OIF]] if _OIF in found else _hops(found.get(_MULTIPATH, b"")):
                with contextlib.suppress(OSError):
                    yield socket.if_indextoname(int.from_bytes(index, sys.byteorder))


def _hops(data: bytes) -> Iterator[bytes]:
    """The interface index of each way that a route has."""
    place = 0
    while place + _HOP.size <= len(data):
        (length,) = _HOP.unpack_from(data, place)
        yield data[place + 4 : place + 8]
        place += max(length, _HOP.size) + (-length % 4)


def _addressed_devices() -> Iterator[str]:
    names = {index: name for name, index in devices.list_devices().items()}
    for message in route().get_addr():
        name = names.get(message["index"], "")
        # scope 0 is global
        if message["scope"] == 0 and name and name != "lo" and not name.startswith((devices.PREFIX, *_OURS)):
            yield name


def addresses_of(name: str) -> dict[int, Address]:
    """IP version -> a device's first global address that is no temporary or old one; nothing where it is not there."""
    found: dict[int, Address] = {}
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return found
    with devices.doing(f"addresses of {name}"):
        for message in route().get_addr(index=index):
            flags = message.get("IFA_FLAGS") or message["flags"]
            text = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
            if text and message["index"] == index and not message["scope"] and not flags & _NOT_FIRST:
                address = ip_address(text)
                found.setdefault(address.version, address)
    return found
