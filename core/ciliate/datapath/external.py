"""Devices that another CNI plugin made: looking at them, filtering on them, and leaving them as they were.

Nothing here changes a device, an address or a route. Blocking: call from threads.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection
from ipaddress import ip_address
from typing import Any, NamedTuple

from ciliate.datapath.devices import DIRECTIONS, PRIORITY, Device, doing, ensure_clsact, find_link, link_mac
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.layout import Address
from ciliate.datapath.netlink import NetlinkError, in_netns, route

_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_MAIN_TABLE = 254
_RTN_UNICAST = 1
_ANY_CLASS = 0x00010001
# value/mask+offset into the network header. Neighbour discovery and multicast listener reports, by the hop limits that
# no router lets through: next header and hop limit, then the type (behind an 8-byte hop-by-hop header for the reports)
_LINK_SCOPE: dict[int, tuple[tuple[str, ...], ...]] = {
    _ETH_P_ARP: (("0x0/0x0+0",),),
    _ETH_P_IPV6: (
        ("0x00003aff/0x0000ffff+4", "0x84000000/0xfc000000+40"),
        ("0x00003aff/0x0000ffff+4", "0x88000000/0xfe000000+40"),
        ("0x00000001/0x0000ffff+4", "0x3a000000/0xffff0000+40", "0x82000000/0xfe000000+48"),
        ("0x00000001/0x0000ffff+4", "0x3a000000/0xffff0000+40", "0x84000000/0xff000000+48"),
        ("0x00000001/0x0000ffff+4", "0x3a000000/0xffff0000+40", "0x8f000000/0xff000000+48"),
    ),
}
_PRIORITIES = {_ETH_P_ARP: 1, _ETH_P_IPV6: 2}
"""Both come before the endpoint's own filters (`devices.PRIORITY`)."""


class ContainerDevice(NamedTuple):
    """What is inside a container under one interface name. ``peer`` is the other end's index, 0 where there is none.

    ``routes`` are those of the main table in the whole namespace: destination prefix and gateway ("" on the link).
    """

    ifname: str
    ifindex: int
    kind: str
    mac: bytes
    up: bool
    peer: int
    addresses: frozenset[Address]
    routes: frozenset[tuple[str, str]]


def container_device(netns_fd: int, ifname: str) -> ContainerDevice | None:
    """Look into a container; None where it has no interface of that name."""

    def look() -> ContainerDevice | None:
        link = find_link(ifname)
        if link is None:
            return None
        index = link["index"]
        mac = link_mac(link) if link.get("IFLA_ADDRESS") else b""
        peer = int(link.get("IFLA_LINK") or 0)
        return ContainerDevice(
            ifname, index, _kind(link), mac, bool(link["flags"] & 1), peer, _addresses(index), _routes()
        )

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
    return frozenset(address for text in texts if text and not (address := ip_address(text)).is_link_local)


def _routes() -> frozenset[tuple[str, str]]:
    found = set()
    for family, default in ((socket.AF_INET, "0.0.0.0/0"), (socket.AF_INET6, "::/0")):
        for message in route().get_routes(family=family, table=_MAIN_TABLE, type=_RTN_UNICAST):
            destination = message.get("RTA_DST")
            prefix = f"{destination}/{message['dst_len']}" if destination else default
            found.add((prefix, str(message.get("RTA_GATEWAY") or "")))
    return frozenset(found)


def host_side(netns_fd: int, container: ContainerDevice) -> Device:
    """The node's end of a container's veth pair.

    DatapathError: EINVAL where the interface is none of a veth pair, ENODEV where its other end is not on this node.
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


def pass_link_scope(index: int) -> None:
    """Let ARP, neighbour discovery and multicast listener reports by, ahead of the endpoint's own filters.

    On a device that we did not make, others answer them: the bridge's other ports, or the node itself.
    """
    with doing(f"link filters of device {index}"):
        ensure_clsact(index)
        for parent in DIRECTIONS.values():
            present = _link_filters(index, parent)
            for protocol, rules in _LINK_SCOPE.items():
                if present.get(protocol) != len(rules):
                    _replace_rules(index, parent, protocol, rules)


def _link_filters(index: int, parent: int) -> dict[int, int]:
    """Protocol -> number of our rules; a protocol without rules but with a filter of ours counts 0."""
    protocols = {priority: protocol for protocol, priority in _PRIORITIES.items()}
    found: dict[int, int] = {}
    for message in route().get_filters(index=index, parent=parent):
        protocol = protocols.get(message["info"] >> 16)
        if protocol is not None and message.get("TCA_KIND") == "u32":
            options = message.get("TCA_OPTIONS")
            selects = options is not None and options.get("TCA_U32_SEL") is not None
            found[protocol] = found.get(protocol, 0) + selects
    return found


def _replace_rules(index: int, parent: int, protocol: int, rules: tuple[tuple[str, ...], ...]) -> None:
    _delete_filters(index, parent, (_PRIORITIES[protocol],))
    for keys in rules:
        route().tc(
            "add-filter",
            "u32",
            index=index,
            parent=parent,
            prio=_PRIORITIES[protocol],
            protocol=protocol,
            target=_ANY_CLASS,
            keys=list(keys),
        )


def _delete_filters(index: int, parent: int, priorities: Collection[int]) -> None:
    found = {message["info"] for message in route().get_filters(index=index, parent=parent)}
    for info in found:
        if info >> 16 in priorities:
            # by the kernel's own word: without priority and protocol it would delete everybody's
            route().tc("del-filter", index=index, parent=parent, info=info, handle=0)


def is_link_scope(kind: str, priority: int, protocol: int) -> bool:
    """Whether a filter is one that `pass_link_scope` puts before the endpoint's own."""
    return kind == "u32" and _PRIORITIES.get(protocol) == priority


OURS = (*_PRIORITIES.values(), PRIORITY)


def release(
    index: int, priorities: Collection[int] = OURS, parents: Collection[int] = tuple(DIRECTIONS.values())
) -> bool:
    """Take our filters off a device, and the queueing discipline where nobody else has filters on it.

    False where the device or our filters are gone. What somebody else attached stays.
    """
    with doing(f"filters of device {index}"):
        if not _filtered(index):
            return False
        for parent in parents:
            _delete_filters(index, parent, priorities)
        if not _filtered(index):
            _delete_clsact(index)
    return True


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
