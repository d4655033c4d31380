"""Routes to the pods of every other node. Blocking.

Direct routing (`auto-direct-node-routes`): via that node. Such a route exists only where the nodes share a link;
anywhere else the network between them has to know the pod ranges, and the kernel refuses ours. With a tunnel: to the
router device, whose program tunnels what this node itself sends.

Ours are told from others' by their protocol number. A route that somebody else made to the same range stays, and the
node is reported.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, NamedTuple

from ciliate.datapath import rtnl
from ciliate.datapath.errors import DatapathError

if TYPE_CHECKING:
    from ciliate.node.model import Node

PROTOCOL = 193
"""What our routes to other nodes carry as their origin (rtnetlink's rtm_protocol; `ip route show proto 193`)."""
DELROUTE, GETROUTE = 25, 26
_DST, _OIF, _GATEWAY, _SOURCE, _METRICS, _METRIC_MTU = 1, 4, 5, 7, 8, 2
_ROUTE = struct.Struct("=8B4x")
TOGETHER = 32
"""Nodes whose routes go to the kernel at once: its answers have to fit into the socket's buffer."""
_MAIN, _UNIVERSE, _LINK, _UNICAST = 254, 0, 253, 1
_NO_WAY = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EACCES})
_GONE = frozenset({errno.ESRCH, errno.ENOENT})
Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address


class Way(NamedTuple):
    """A pod range, and the node that has it or the device (by its index) that leads there.

    ``source`` is the address that this node's own packets get, ``mtu`` their largest size; 0 leaves it to the device.
    """

    destination: Network
    gateway: Address | None = None
    device: int = 0
    source: Address | None = None
    mtu: int = 0

    def __str__(self) -> str:
        return f"{self.destination} via {self.gateway or f'device {self.device}'}"


def ways(node: Node) -> list[Way]:
    """The routes that a node means without a tunnel: one for each family that it has."""
    pairs = ((node.pods4, node.ipv4), (node.pods6, node.ipv6))
    return [Way(range_, address) for range_, address in pairs if range_ is not None and address is not None]


class NodeRoutes:
    """The routes to other nodes. ``ways_of`` says which ones a node means."""

    def __init__(self, ways_of: Callable[[Node], list[Way]] = ways) -> None:
        self._ways_of = ways_of
        self._of: dict[str, list[Way]] = {}
        self._kernel: dict[Network, Way] | None = None

    def update(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> dict[str, OSError]:
        """Change by a delta; returns what failed, by `Node.id`."""
        failed: dict[str, OSError] = {}
        for node in deletes:
            self._change(node.id, [], failed)
        wanted = {node.id: self._ways_of(node) for node in upserts}
        fresh = {number: found for number, found in wanted.items() if number not in self._of}
        self._add(fresh, failed)
        for number in wanted.keys() - fresh.keys():
            self._change(number, wanted[number], failed)
        return failed

    def _add(self, wanted: dict[str, list[Way]], failed: dict[str, OSError]) -> None:
        """Routes of many nodes at once; one by one where that fails, to know whose fault it is."""
        numbers = list(wanted)
        for start in range(0, len(numbers), TOGETHER):
            some = numbers[start : start + TOGETHER]
            try:
                self._write([way for number in some for way in wanted[number]], [])
                self._of.update((number, wanted[number]) for number in some if wanted[number])
            except OSError:
                for number in some:
                    self._change(number, wanted[number], failed)

    def _change(self, number: str, wanted: list[Way], failed: dict[str, OSError]) -> None:
        old = self._of.get(number, [])
        targets = {way.destination for way in wanted}
        gone = [way for way in old if way.destination not in targets]
        heirs = self._heirs(number, gone)
        try:
            self._write([*wanted, *heirs.values()], [way for way in gone if way.destination not in heirs])
        except OSError as error:
            failed[number] = error
            # both are tried to be removed later
            self._of[number] = [*wanted, *(way for way in old if way not in wanted)]
            return
        if wanted:
            self._of[number] = wanted
        else:
            self._of.pop(number, None)

    def _heirs(self, number: str, gone: Sequence[Way]) -> dict[Network, Way]:
        """Ways of other nodes to the same ranges: they took the place of these, or do now."""
        targets = {way.destination for way in gone}
        if not targets:
            return {}
        others = (other for name, found in self._of.items() if name != number for other in found)
        return {other.destination: other for other in others if other.destination in targets}

    def sync(self, nodes: Sequence[Node], prune: bool = True) -> dict[str, OSError]:
        """Make our routes those of ``nodes`` and, with ``prune``, no others; returns what failed, by `Node.id`."""
        self._kernel = _present()
        failed: dict[str, OSError] = {}
        wanted = {node.id: self._ways_of(node) for node in nodes}
        every = {way.destination for found in wanted.values() for way in found}
        others = [way for way in self._kernel.values() if way.destination not in every]
        try:
            self._write([], others if prune else [])
        except OSError as error:
            failed[""] = error
        self._of = {}
        self._add(wanted, failed)
        return failed

    def _write(self, upserts: Sequence[Way], deletes: Sequence[Way]) -> None:
        if self._kernel is None:
            self._kernel = _present()
        ours, batch = self._kernel, rtnl.Batch()
        changes = [way for way in upserts if ours.get(way.destination) != way]
        for way in deletes:
            batch.add(DELROUTE, 0, _message(way), f"route to {way}: removal", _GONE)
        for way in changes:
            # a route of the administrator's to the same place must not be replaced
            flags = rtnl.REPLACE if way.destination in ours else rtnl.EXCL
            batch.add(rtnl.NEWROUTE, rtnl.CREATE | flags, _message(way), f"route to {way}")
        if not deletes and not changes:
            return
        try:
            batch.run()
        except BaseException:
            self._kernel = None  # some may be done
            raise
        for way in deletes:
            ours.pop(way.destination, None)
        ours.update((way.destination, way) for way in changes)


def _message(way: Way) -> bytes:
    version = way.destination.version
    # a route without gateway to IPv4 is on the link
    scope = _LINK if version == 4 and way.gateway is None else _UNIVERSE
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    head = struct.pack("=BBBBBBBBI", family, way.destination.prefixlen, 0, 0, _MAIN, PROTOCOL, scope, _UNICAST, 0)
    parts = [rtnl.attribute(1, way.destination.network_address.packed)]
    parts += [rtnl.attribute(5, way.gateway.packed)] if way.gateway else []
    parts += [rtnl.number(4, way.device)] if way.device else []
    parts += [rtnl.attribute(7, way.source.packed)] if way.source else []
    parts += [rtnl.nested(8, rtnl.number(2, way.mtu))] if way.mtu else []
    return head + b"".join(parts)


def _present() -> dict[Network, Way]:
    """Our routes in the kernel."""
    return {way.destination: way for way in _read()}


def _read() -> Iterator[Way]:
    for family, network in ((socket.AF_INET, IPv4Network), (socket.AF_INET6, IPv6Network)):
        for message in rtnl.dump(GETROUTE, struct.pack("=B11x", family), "routes to other nodes"):
            _, length, _, _, table, protocol, _, _ = _ROUTE.unpack_from(message)
            if protocol != PROTOCOL or table != _MAIN:
                continue
            found = rtnl.attributes(message, _ROUTE.size)
            if _DST in found:
                yield _way(network((int.from_bytes(found[_DST], "big"), length)), found)


def _way(destination: Network, found: dict[int, bytes]) -> Way:
    mtu = rtnl.attributes(found[_METRICS], 0).get(_METRIC_MTU, b"") if _METRICS in found else b""
    size = int.from_bytes(mtu, sys.byteorder)
    if _GATEWAY in found:
        # the kernel found the device itself
        return Way(destination, ip_address(found[_GATEWAY]), mtu=size)
    device = int.from_bytes(found.get(_OIF, b""), sys.byteorder)
    return Way(destination, None, device, ip_address(found[_SOURCE]) if _SOURCE in found else None, size)


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
