"""Limits of what a pod receives and sends, as queues of its device pair (tbf). Blocking: call from threads.

What it receives waits at the node's end, what it sends at its own: both wait where the sender's socket sees it.
"""

from __future__ import annotations

import errno
import socket
import struct

import msgspec

from ciliate.datapath import rtnl
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.netlink import in_netns

MAX_RATE = (1 << 32) * 8 - 8
"""Bits a second, and bits at once: the kernel counts bytes in 32 bits."""
_NEWQDISC, _DELQDISC, _GETQDISC = rtnl.NEWQDISC, 37, 38
_ROOT, _HANDLE = 0xFFFFFFFF, 0x00010000
_KIND, _OPTIONS, _PARMS, _BURST = 1, 2, 1, 6
_HEAD = struct.Struct("=BxxxiIII")
_RATE = struct.Struct("=BBHhHI")
_SIZES = struct.Struct("=III")
_LATENCY = 0.025
_QUEUE = 65_536, 1 << 20
"""Bytes that wait at least (a packet of the largest size fits), and at most beside what comes in 25 ms."""


class Limits(msgspec.Struct, frozen=True):
    """Bits a second and bits at once of what the pod gets (ingress) and of what it sends (egress). 0: no limit."""

    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0


def limit(index: int, netns_fd: int, ifname: str, limits: Limits) -> None:
    """Put both limits on a device pair: ``index`` is the node's end. Where one is refused, none stays."""
    try:
        if limits.ingress_rate:
            _add(index, limits.ingress_rate, limits.ingress_burst, "ingressRate")
        if limits.egress_rate:
            in_netns(netns_fd, lambda: _add(_index(ifname), limits.egress_rate, limits.egress_burst, "egressRate"))
    except BaseException:
        unlimit(index, netns_fd, ifname)
        raise


def unlimit(index: int, netns_fd: int | None, ifname: str) -> None:
    """Take both away, as far as they are there."""
    _remove(index)
    if netns_fd is not None:
        in_netns(netns_fd, lambda: _remove(_index(ifname)))


def missing(index: int, netns_fd: int, ifname: str, limits: Limits) -> str:
    """What of the limits is not in force, in words; nothing where all is."""
    inside = in_netns(netns_fd, lambda: _rate(_index(ifname)))
    ways = ("ingressRate", limits.ingress_rate, _rate(index)), ("egressRate", limits.egress_rate, inside)
    for name, expected, rate in ways:
        if expected and rate != max(expected // 8, 1):
            return f"{name}: {rate * 8 or 'no limit'} found, expected {expected} bits a second"
    return ""


def _index(ifname: str) -> int:

    return socket.if_nametoindex(ifname)


def _add(index: int, rate: int, burst: int, field: str) -> None:
    speed, at_once = max(rate // 8, 1), max(burst // 8, 1)
    queue = max(min(at_once, _QUEUE[1]), _QUEUE[0]) + int(speed * _LATENCY)
    spec = _RATE.pack(0, 1, 0, 0, 0, speed)
    parameters = spec + bytes(_RATE.size) + _SIZES.pack(min(queue, 0xFFFFFFFF), 0, 0)
    options = rtnl.nested(_OPTIONS, rtnl.attribute(_PARMS, parameters), rtnl.number(_BURST, at_once))
    batch = rtnl.Batch()
    message = _HEAD.pack(0, index, _HANDLE, _ROOT, 0) + rtnl.text(_KIND, "tbf") + options
    batch.add(_NEWQDISC, rtnl.CREATE | rtnl.REPLACE, message, f"{field} {rate}: queueing discipline tbf")
    batch.run()


def _remove(index: int) -> None:
    if not _rate(index):
        return
    batch = rtnl.Batch()
    gone = frozenset({errno.ENOENT, errno.EINVAL, errno.ENODEV})
    batch.add(_DELQDISC, 0, _HEAD.pack(0, index, _HANDLE, _ROOT, 0), f"limit of device {index}: removal", gone)
    batch.run()


def _rate(index: int) -> int:
    """Bytes a second of a device's own limit, 0 where it has none."""
    for message in rtnl.dump(_GETQDISC, _HEAD.pack(0, index, 0, 0, 0), "queueing disciplines"):
        _, device, handle, parent, _ = _HEAD.unpack_from(message)
        if (device, handle, parent) != (index, _HANDLE, _ROOT):
            continue
        found = rtnl.attributes(message, _HEAD.size)
        if found.get(_KIND, b"").rstrip(b"\0") == b"tbf":
            speed: int = _RATE.unpack_from(rtnl.attributes(found[_OPTIONS], 0)[_PARMS])[5]
            return speed
    return 0


def refuse_ingress(index: int, name: str) -> None:
    """DatapathError where a device has the one queueing discipline on which our filters cannot hang."""
    for message in rtnl.dump(_GETQDISC, _HEAD.pack(0, index, 0, 0, 0), "queueing disciplines"):
        _, device, _, _, _ = _HEAD.unpack_from(message)
        if device == index and rtnl.attributes(message, _HEAD.size).get(_KIND, b"").rstrip(b"\0") == b"ingress":
            found = f"device {name}: has the queueing discipline 'ingress', expected none, as policy needs its place"
            advice = "instead of the plugin that made it (bandwidth) give ciliate-cni the capability bandwidth"
            raise DatapathError(errno.EINVAL, f"{found}: {advice}")
