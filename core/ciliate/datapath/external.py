"""Devices that another CNI plugin made: looking at them, filtering on them, and leaving them as they were.

Nothing here changes a device, an address or a route. Blocking: call from threads.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection
from ipaddress import IPv6Address, ip_address
from typing import Any, NamedTuple

from ciliate.datapath import shaping
from ciliate.datapath.devices import DIRECTIONS, PRIORITY, Device, doing, find_link, link_mac
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.layout import Address
from ciliate.datapath.netlink import NetlinkError, in_netns, route

_RTN_UNICAST = 1
_ANY_CLASS = 0x00010001
_LINK_RULES = frozenset({(1, 0x0806), (2, 0x86DD)})
"""Priority and protocol of rules by which earlier versions passed ARP and neighbour discovery."""


class ContainerDevice(NamedTuple):
    """What is inside a container under one interface name. ``peer`` is the other end's index, 0 where there is none.

    ``routes`` are those of every table in the whole namespace (`sbr` moves them): destination prefix and gateway
    ("" on the link).
    """

    ifname: str
    ifindex: int
    kind: str
    mac: bytes
    up: bool
    peer: int
    addresses: frozenset[Address]
    routes: frozenset[tuple[str, str]]
    link_local: IPv6Address | None


def container_device(netns_fd: int, ifname: str) -> ContainerDevice | None:
    """Look into a container; None where it has no interface of that name."""

    def look() -> ContainerDevice | None:
        link = find_link(ifname)
        if link is None:
            return None
        index = link["index"]
        mac = link_mac(link) if link.get("IFLA_ADDRESS") else b""
        peer = int(link.get("IFLA_LINK") or 0)
        addresses = _addresses(index)
        local = (item for item in sorted(addresses, key=str) if isinstance(item, IPv6Address) and item.is_link_local)
        lasting = frozenset(item for item in addresses if not item.is_link_local)
        up = bool(link["flags"] & 1)
        return ContainerDevice(ifname, index, _kind(link), mac, up, peer, lasting, _routes(), next(local, None))

    with doing(f"container interface {ifname}"):
        found: ContainerDevice | None = in_netns(netns_fd, look)
    return found


def _kind(link: Any) -> str:
    info = link.get("IFLA_LINKINFO")
    return str(info.get("IFLA_INFO_KIND") or "") if info else ""


def _addresses(index: int) -> frozenset[Address]:
    texts = (
        message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
        for message in route().get_addr(index=index)
        if message["index"] == index
    )
    return frozenset(ip_address(text) for text in texts if text)


def _routes() -> frozenset[tuple[str, str]]:
    found = set()
    for family, default in ((socket.AF_INET, "0.0.0.0/0"), (socket.AF_INET6, "::/0")):
        for message in route().get_routes(family=family, type=_RTN_UNICAST):
            destination = message.get("RTA_DST")
            prefix = f"{destination}/{message['dst_len']}" if destination else default
            found.add((prefix, str(message.get("RTA_GATEWAY") or "")))
    return frozenset(found)


def host_side(netns_fd: int, container: ContainerDevice) -> Device:
    """The node's end of a container's veth pair.

    DatapathError: EINVAL where the interface is none of a veth pair, or policy cannot be put on it, ENODEV where its
    other end is not on this node.
    """
    if container.kind != "veth" or not container.peer:
        kind = f"a {container.kind} device" if container.kind else "of no known kind"
        text = f"container interface {container.ifname}: is {kind}, expected one end of a veth pair"
        raise DatapathError(errno.EINVAL, text)
    with doing(f"other end of container interface {container.ifname}"):
        link = _link_by_index(container.peer)
        if link is None or link.get("IFLA_LINK") != container.ifindex or not _leads_to(link, netns_fd):
            text = f"container interface {container.ifname}: its other end (index {container.peer}) is not on this node"
            raise DatapathError(errno.ENODEV, text)
        shaping.refuse_ingress(container.peer, link.get("IFLA_IFNAME"))
        return Device(link.get("IFLA_IFNAME"), container.peer, link_mac(link), container.mac)


def _link_by_index(index: int) -> Any | None:
    try:
        return route().link("get", index=index)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


def _leads_to(link: Any, netns_fd: int) -> bool:
    """Whether a device's other end is in this namespace; the same index may be in use in many."""
    namespace = route().get_netnsid(fd=netns_fd)["nsid"]
    return link.get("IFLA_LINK_NETNSID") is not None and link.get("IFLA_LINK_NETNSID") == namespace


def remove_link_rules(index: int) -> None:
    """Remove what earlier versions put before the endpoint's own filters: rules that let link messages pass unread."""
    with doing(f"link rules of device {index}"):
        for parent in DIRECTIONS.values():
            for info in _link_rules(index, parent):
                route().tc("del-filter", index=index, parent=parent, info=info, handle=0)


def _link_rules(index: int, parent: int) -> set[int]:
    """Priorities and protocols (as the kernel has them) of which every filter is such a rule."""
    found: dict[int, bool] = {}
    for message in route().get_filters(index=index, parent=parent):
        info, options = message["info"], message.get("TCA_OPTIONS")
        if message.get("TCA_KIND") != "u32" or options is None or options.get("TCA_U32_SEL") is None:
            continue
        ours = (info >> 16, socket.ntohs(info & 0xFFFF)) in _LINK_RULES
        found[info] = found.get(info, True) and ours and options.get("TCA_U32_CLASSID") == _ANY_CLASS
    return {info for info, ours in found.items() if ours}


def _delete_filters(index: int, parent: int, priorities: Collection[int]) -> None:
    found = {message["info"] for message in route().get_filters(index=index, parent=parent)}
    for info in found:
        if info >> 16 in priorities:
            # by the kernel's own word: without priority and protocol it would delete everybody's
            route().tc("del-filter", index=index, parent=parent, info=info, handle=0)


OURS = (PRIORITY,)


def release(index: int, priorities: Collection[int] = OURS) -> bool:
    """Take our filters off a device, and the queueing discipline where nobody else has filters on it.

    False where the device or our filters are gone. What somebody else attached stays.
    """
    with doing(f"filters of device {index}"):
        if not _filtered(index):
            return False
        for parent in DIRECTIONS.values():
            _delete_filters(index, parent, priorities)
        if not _filtered(index):
            _delete_clsact(index)
    return True


def detach(index: int, priority: int, parent: int) -> None:
    """Take our filter of one direction off a device, and leave the queueing discipline: a device in use loses packets
    where one comes or goes."""
    with doing(f"filter of device {index}"):
        if _filtered(index):
            _delete_filters(index, parent, (priority,))


def drop_empty_clsact(index: int) -> None:
    """Remove the queueing discipline of a device where nobody has filters on it."""
    with doing(f"filters of device {index}"):
        if not _filtered(index):
            _delete_clsact(index)


def _filtered(index: int) -> bool:
    try:
        return any(list(route().get_filters(index=index, parent=parent)) for parent in DIRECTIONS.values())
    except NetlinkError as error:
        if error.code not in (errno.ENODEV, errno.EINVAL):
            raise
        return False


def _delete_clsact(index: int) -> None:
    try:
        route().tc("del", "clsact", index=index)
    except NetlinkError as error:
        if error.code not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            raise
