"""Direct routing: a route to the pods of every other node, via that node (`auto-direct-node-routes`). Blocking.

Ours are told from others' by their protocol number. Such a route exists only where the nodes share a link; anywhere
else the network between them has to know the pod ranges, and the kernel refuses ours.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

from ciliate.datapath import rtnl
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.netlink import NetlinkError, explain, route

if TYPE_CHECKING:
    from ciliate.node.model import Node

PROTOCOL = 193
"""What our routes to other nodes carry as their origin (rtnetlink's rtm_protocol; `ip route show proto 193`)."""
DELROUTE = 25
_MAIN, _UNIVERSE, _UNICAST = 254, 0, 1
_REPLACE = rtnl.CREATE | rtnl.REPLACE
_NO_WAY = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EACCES})
_GONE = frozenset({errno.ESRCH, errno.ENOENT})
Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address
Way = tuple[Network, Address]
"""A pod range and the node that has it."""


def ways(node: Node) -> list[Way]:
    """The routes that a node means: one for each family that it has."""
    pairs = ((node.pods4, node.ipv4), (node.pods6, node.ipv6))
    return [(range_, address) for range_, address in pairs if range_ is not None and address is not None]


class NodeRoutes:
    """The routes to other nodes. What they are is read from the kernel at ``sync``."""

    def __init__(self) -> None:
        self._of: dict[str, list[Way]] = {}

    def update(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> dict[str, OSError]:
        """Change by a delta; returns what failed, by `Node.id`."""
        failed: dict[str, OSError] = {}
        for node in deletes:
            self._change(node.id, [], failed)
        for node in upserts:
            self._change(node.id, ways(node), failed)
        return failed

    def _change(self, number: str, wanted: list[Way], failed: dict[str, OSError]) -> None:
        old = self._of.get(number, [])
        targets = {destination for destination, _ in wanted}
        try:
            _write(wanted, [way for way in old if way[0] not in targets and not self._shared(number, way)])
        except OSError as error:
            failed[number] = error
            # both are tried to be removed later
            self._of[number] = [*wanted, *(way for way in old if way not in wanted)]
            return
        if wanted:
            self._of[number] = wanted
        else:
            self._of.pop(number, None)

    def _shared(self, number: str, way: Way) -> bool:
        """Whether another node has taken over this range meanwhile; its route took the place of this one."""
        return any(way[0] == other[0] for name, ways_ in self._of.items() if name != number for other in ways_)

    def sync(self, nodes: Sequence[Node]) -> dict[str, OSError]:
        """Make our routes exactly those of ``nodes``; returns what failed, by `Node.id`."""
        present = set(_present())
        failed: dict[str, OSError] = {}
        wanted = {node.id: ways(node) for node in nodes}
        every = {destination for found in wanted.values() for destination, _ in found}
        try:
            _write([], [way for way in present if way[0] not in every])
        except OSError as error:
            failed[""] = error
        for number, found in wanted.items():
            try:
                _write([way for way in found if way not in present], [])
            except OSError as error:
                failed[number] = error
        self._of = wanted
        return failed


def _write(upserts: Sequence[Way], deletes: Sequence[Way]) -> None:
    if not upserts and not deletes:
        return
    batch = rtnl.Batch()
    for way in deletes:
        batch.add(DELROUTE, 0, _message(way), f"route to {way[0]} via {way[1]}: removal", _GONE)
    for way in upserts:
        batch.add(rtnl.NEWROUTE, _REPLACE, _message(way), f"route to {way[0]} via {way[1]}")
    batch.run()


def _message(way: Way) -> bytes:
    destination, gateway = way
    head = struct.pack(
        "=BBBBBBBBI",
        rtnl.family(gateway),
        destination.prefixlen,
        0,
        0,
        _MAIN,
        PROTOCOL,
        _UNIVERSE,
        _UNICAST,
        0,
    )
    return head + rtnl.attribute(1, destination.network_address.packed) + rtnl.attribute(5, gateway.packed)


def _present() -> Iterator[Way]:
    try:
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in route().get_routes(family=family, table=_MAIN):
                destination, gateway = message.get("RTA_DST"), message.get("RTA_GATEWAY")
                if message["proto"] == PROTOCOL and destination and gateway:
                    yield ip_network(f"{destination}/{message['dst_len']}"), ip_address(gateway)
    except NetlinkError as error:
        raise explain("routes to other nodes", error) from error


def own_address(version: int) -> Address | None:
    """The address with which this node reaches the world, in this thread's namespace; None where it cannot.

    The kernel is asked which source it would use towards a well-known address; nothing is sent.
    """
    family, target = (socket.AF_INET, "1.1.1.1") if version == 4 else (socket.AF_INET6, "2606:4700:4700::1111")
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.connect((target, 53))
            return ip_address(probe.getsockname()[0])
    except OSError as error:
        if error.errno in (
            errno.ENETUNREACH,
            errno.EHOSTUNREACH,
            errno.EADDRNOTAVAIL,
            errno.EAFNOSUPPORT,
            errno.EACCES,
        ):
            return None
        raise DatapathError(error.errno, f"own IPv{version} address: {os.strerror(error.errno or 0)}") from error
