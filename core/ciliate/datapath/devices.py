"""Devices, addresses, routes, sysctls and tc filters. Blocking: call from threads."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

from ciliate.datapath import rtnl
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.layout import Address, Network
from ciliate.datapath.netlink import NetlinkError, enter, explain, in_netns, in_own_thread, route

__all__ = [
    "Device",
    "Wanted",
    "attach_filter",
    "attach_filters",
    "attached",
    "configure_container",
    "connect_container",
    "connect_host",
    "create_endpoint_device",
    "delete_device",
    "delivered_prefixes",
    "detach_filters",
    "ensure_router_device",
    "in_netns",
    "in_own_thread",
    "list_devices",
    "list_endpoint_devices",
    "node_prefixes",
    "prepare_node",
]

PREFIX = "lxc"
"""Every endpoint's host-side device begins with this."""
_OURS = re.compile(PREFIX + "[0-9a-f]{12}$")
PRIORITY = 10
"""Of the endpoint's own filters; what has to come before them has a smaller one."""
DIRECTIONS = {False: 0xFFFFFFF2, True: 0xFFFFFFF3}
"""Whether it is the device's egress -> the parent of its filters."""
_SCOPE_LINK = 253
_NODAD = 0x02
_PERMANENT = 0x80
_FORWARDING, _PROXY_ARP, _ACCEPT_REDIRECTS, _SEND_REDIRECTS, _RP_FILTER, _ACCEPT_SOURCE_ROUTE = 1, 3, 4, 6, 8, 9
_IPV4_SETTINGS = {
    _FORWARDING: 1,
    _PROXY_ARP: 0,
    _ACCEPT_REDIRECTS: 0,
    _SEND_REDIRECTS: 0,
    _RP_FILTER: 0,
    _ACCEPT_SOURCE_ROUTE: 0,
}
_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EOPNOTSUPP})


_GROUPS = tuple(ip_network(text) for text in ("255.255.255.255/32", "224.0.0.0/4", "ff00::/8"))


class Device(NamedTuple):
    """An endpoint's veth pair: the host side's index and MAC, the container side's MAC (6 bytes each)."""

    host_ifname: str
    host_ifindex: int
    host_mac: bytes
    container_mac: bytes


class Wanted(NamedTuple):
    """A container's addresses, and the node's on its link."""

    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    router4: IPv4Address | None
    router6: IPv6Address | None


@contextlib.contextmanager
def doing(action: str) -> Iterator[None]:
    """Turn what netlink refuses into a DatapathError that names the action."""
    try:
        yield
    except NetlinkError as error:
        raise explain(action, error) from error


def find_link(name: str) -> Any | None:
    """The netlink message of a device, or None where there is none of that name."""
    try:
        links = route().link("get", ifname=name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    return links[0]


def mtu_of(name: str) -> int:
    """A device's MTU in bytes, 0 where there is none of that name."""
    with doing(f"device {name}"):
        link = find_link(name)
    return int(link.get("IFLA_MTU")) if link is not None else 0


def link_mac(link: Any) -> bytes:
    """A device's MAC address, 6 bytes."""
    return bytes.fromhex(link.get("IFLA_ADDRESS").replace(":", ""))


def _sysctl(path: str, value: str) -> None:
    file = Path("/proc/sys/net") / path
    try:
        if file.read_text().strip() != value:
            file.write_text(value)
    except FileNotFoundError:
        return  # the kernel has no IPv6, or the device has none of it
    except OSError as error:
        raise DatapathError(error.errno, f"sysctl net/{path}={value}: {error.strerror}") from error


def _device_sysctl(path: str, value: str) -> None:
    """Set a device's sysctl, with as few system calls as there can be: every container waits for these."""
    try:
        file = os.open(f"/proc/sys/net/{path}", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # the kernel has no IPv6, or the device has none of it
    except OSError:
        _sysctl(path, value)  # where they cannot be written the value may be right nevertheless
        return
    try:
        os.write(file, value.encode())
    except OSError as error:
        raise DatapathError(error.errno, f"sysctl net/{path}={value}: {error.strerror}") from error
    finally:
        os.close(file)


def create_endpoint_device(host_ifname: str, netns_fd: int, container_ifname: str, mtu: int = 0) -> Device:
    """Make a veth pair with one end in the container's namespace under its final name; both ends are down.

    Raises DatapathError, where either name is taken (EEXIST) among others; then nothing is left.
    """
    host_mac, container_mac = _new_mac(), _new_mac()
    batch = rtnl.Batch()
    message = rtnl.veth(host_ifname, host_mac, container_ifname, container_mac, netns_fd, mtu)
    batch.add(rtnl.NEWLINK, rtnl.CREATE | rtnl.EXCL, message, f"veth pair {host_ifname}/{container_ifname}")
    batch.run()  # alone: what follows in a batch is done even where this is refused, to a device that is not ours
    try:
        index = socket.if_nametoindex(host_ifname)
        quiet_device(host_ifname)
    except BaseException:
        delete_device(host_ifname)
        raise
    return Device(host_ifname, index, host_mac, container_mac)


def _new_mac() -> bytes:
    """Locally administered, of one host. The system's device manager leaves alone what somebody chose."""
    first, *others = os.urandom(6)
    return bytes([first & 0xFC | 0x02, *others])


def quiet_device(name: str) -> None:
    """Sysctls of a host-side device: no autoconfiguration, no redirects, no reverse path filter, forwarding.

    No source routes: by one a pod would send to where it may not, with the node as its hop.
    """
    batch, action = rtnl.Batch(), f"settings of device {name}"
    batch.add(rtnl.NEWLINK, 0, rtnl.no_link_local(name), action, _NO_IPV6)
    batch.add(rtnl.NEWLINK, 0, rtnl.settings(name, _IPV4_SETTINGS), action)
    batch.run()
    for key, value in (("accept_ra", "0"), ("accept_dad", "0"), ("forwarding", "1")):
        _device_sysctl(f"ipv6/conf/{name}/{key}", value)


def configure_container(
    netns_fd: int,
    ifname: str,
    ipv4: IPv4Address | None,
    ipv6: IPv6Address | None,
    router4: IPv4Address | None,
    router6: IPv6Address | None,
) -> None:
    """Inside the container: loopback up, host addresses, the router on the link and as default, device up."""
    wanted = Wanted(ipv4, ipv6, router4, router6)
    in_netns(netns_fd, lambda: _configure(ifname, wanted))


def connect_container(host_ifname: str, netns_fd: int, ifname: str, mtu: int, wanted: Wanted) -> Device:
    """Make a container's device pair and configure the container's end; only in a thread that ends with it.

    Nothing is left where anything fails.
    """
    device, inside = create_endpoint_device(host_ifname, netns_fd, ifname, mtu), False
    try:
        enter(netns_fd)
        inside = True
        _configure(ifname, wanted)
    except BaseException:
        delete_device(ifname if inside else host_ifname)
        raise
    return device


def _configure(ifname: str, wanted: Wanted) -> None:
    action = f"container interface {ifname}"
    try:
        index = socket.if_nametoindex(ifname)
    except OSError:
        raise DatapathError(errno.ENODEV, f"device {ifname}: is not in the container's namespace") from None
    for name in ("accept_ra", "accept_dad"):
        _device_sysctl(f"ipv6/conf/{ifname}/{name}", "0")
    batch = rtnl.Batch()
    for device in (1, index):
        batch.add(rtnl.NEWLINK, 0, rtnl.link_up(device), action)
    for address, router in ((wanted.ipv4, wanted.router4), (wanted.ipv6, wanted.router6)):
        if address is not None:
            _add_address(batch, index, address, router, action)
    batch.run()


_REPLACE = rtnl.CREATE | rtnl.REPLACE


def _add_address(batch: rtnl.Batch, index: int, address: Address, router: Address | None, action: str) -> None:
    batch.add(rtnl.NEWADDR, _REPLACE, rtnl.interface_address(index, address, _flags(address)), action)
    if router is not None:
        version = router.version
        on_link = rtnl.route_to(index, router, version, _scope(router))
        batch.add(rtnl.NEWROUTE, _REPLACE, on_link, action)
        batch.add(rtnl.NEWROUTE, _REPLACE, rtnl.route_to(index, None, version, gateway=router), action)


def _flags(address: Address) -> int:
    return _NODAD if address.version == 6 else 0


def _scope(address: Address) -> int:
    return _SCOPE_LINK if address.version == 4 else 0


def connect_host(
    index: int,
    container_mac: bytes,
    ipv4: IPv4Address | None,
    ipv6: IPv6Address | None,
    router4: IPv4Address | None,
    router6: IPv6Address | None,
) -> None:
    """Bring the device up, then host routes to the endpoint's addresses and permanent neighbours."""
    batch, action = rtnl.Batch(), f"routes to device {index}"
    batch.add(rtnl.NEWLINK, 0, rtnl.link_up(index), f"device {index} up")
    for address, router in ((ipv4, router4), (ipv6, router6)):
        if address is not None:
            batch.add(rtnl.NEWNEIGH, _REPLACE, rtnl.neighbour(index, address, container_mac, _PERMANENT), action)
            way = rtnl.route_to(index, address, address.version, _scope(address), source=router)
            batch.add(rtnl.NEWROUTE, _REPLACE, way, action)
    batch.run()


def delete_device(name: str) -> bool:
    """Remove a device (a veth's other end goes with it); False where there is none of that name."""
    try:
        route().link("del", ifname=name)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise explain(f"device {name}: removal", error) from error
    return True


def list_devices() -> dict[str, int]:
    """Name -> interface index of every device of this namespace."""
    return {link.get("IFLA_IFNAME"): link["index"] for link in route().get_links()}


def list_endpoint_devices() -> dict[str, int]:
    """Name -> interface index of every device that we made for an endpoint in this namespace."""
    return {name: index for name, index in list_devices().items() if name and _OURS.match(name)}


def node_prefixes() -> list[Network]:
    """Every address of this namespace's own devices, as host prefixes; link-local ones belong to a link, not to us."""
    prefixes = []
    with doing("addresses of the node"):
        for message in route().get_addr():
            text = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
            if text and not ip_address(text).is_link_local:
                prefixes.append(ip_network(text))
    return prefixes


_ROUTE_HEAD, _TABLE_LOCAL, _TYPE_LOCAL, _TYPE_ANYCAST, _DST = 12, 255, 2, 4, 1


def delivered_prefixes() -> set[Network]:
    """What this namespace delivers to itself: every address, link-local and anycast ones too, and local routes.

    The subnet-router anycast address of an IPv6 range is the node's while it forwards. A link-local address is nobody
    else's on a pod's own link; on a bridge that another plugin made no pod is known by one.
    A local default route is left out: it would make the whole world the node.
    """
    found = set()
    with doing("addresses of the node"):
        for message in route().get_addr():
            text = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
            if text:
                found.add(ip_network(text))
    for family in (socket.AF_INET, socket.AF_INET6):
        # a node has routes to thousands of others, which a parser that makes objects of them takes seconds for
        for route_ in rtnl.dump(rtnl.GETROUTE, bytes([family]).ljust(_ROUTE_HEAD, b"\0"), "local routes"):
            if route_[4] != _TABLE_LOCAL or route_[7] not in (_TYPE_LOCAL, _TYPE_ANYCAST) or not route_[1]:
                continue
            target = rtnl.attributes(route_, _ROUTE_HEAD).get(_DST)
            if target is not None:
                found.add(ip_network((target, route_[1])))
    return found


def _last(address: str, length: int) -> str:
    return str(ip_network(f"{address}/{length}", strict=False).broadcast_address)


def group_prefixes() -> list[Network]:
    """Addresses by which the node itself is reached among others: broadcast and multicast."""
    prefixes = list(_GROUPS)
    with doing("broadcast addresses of the node"):
        for message in route().get_addr(family=socket.AF_INET):
            own, length = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS"), message["prefixlen"]
            # that of the network too, which the kernel takes whether or not an address names another
            found = {message.get("IFA_BROADCAST"), _last(own, length) if own and length < 31 else None}
            prefixes += [ip_network(text) for text in found if text]
    return prefixes


def ensure_router_device(name: str, peer: str, router4: IPv4Address | None, router6: IPv6Address | None) -> int:
    """The veth pair whose host end holds the router's addresses; returns its interface index."""
    ipr = route()
    with doing(f"router device {name}"):
        link = find_link(name)
        if link is None:
            ipr.link("add", ifname=name, kind="veth", peer={"ifname": peer})
            link = find_link(name)
        if link is None:
            raise DatapathError(errno.ENODEV, f"device {name}: vanished while it was made")
        index: int = link["index"]
        for end in (name, peer):
            quiet_device(end)
        # said again, an address counts as a change to whoever listens, and that is who calls us
        present = {message.get("IFA_ADDRESS") for message in ipr.get_addr(index=index)}
        for address in (router4, router6):
            if address is not None and str(address) not in present:
                prefix = address.max_prefixlen
                ipr.addr("replace", index=index, address=str(address), prefixlen=prefix, flags=_flags(address))
        for end in (name, peer):
            other = find_link(end)
            if other is not None:
                ipr.link("set", index=other["index"], state="up")
        return index


def prepare_node(ipv4: bool, ipv6: bool) -> None:
    """Forwarding, and no reverse path filter that would outvote that of our devices (the kernel takes the maximum)."""
    if ipv4:
        _sysctl("ipv4/ip_forward", "1")
        _sysctl("ipv4/conf/all/rp_filter", "0")
        _sysctl("ipv4/conf/default/rp_filter", "0")
    if ipv6:
        _sysctl("ipv6/conf/all/forwarding", "1")


def attach_filter(index: int, egress: bool, program: int, class_id: int, name: str) -> None:
    """Attach a program to a device, or replace in one step what is attached; ``class_id`` is what it reads back."""
    attach_filters(index, {egress: (program, name)}, class_id)


def attach_filters(index: int, programs: Mapping[bool, tuple[int, str]], class_id: int) -> None:
    """Attach programs (descriptor and name) by direction (whether egress), as ``attach_filter`` does for one."""
    rtnl.ensure_clsact(index)
    batch, action = rtnl.Batch(), f"filter on device {index}"
    for egress, (program, name) in programs.items():
        message = rtnl.bpf_filter(index, DIRECTIONS[egress], PRIORITY, program, class_id, name)
        batch.add(rtnl.NEWTFILTER, _REPLACE, message, action)
    batch.run()


def attached(index: int) -> dict[bool, int]:
    """Whether egress -> class id of the endpoint filter there; a direction without one is left out."""
    found = {}
    with doing(f"filters of device {index}"):
        for egress, parent in DIRECTIONS.items():
            for message in route().get_filters(index=index, parent=parent):
                options = message.get("TCA_OPTIONS")
                if message["info"] >> 16 == PRIORITY and options is not None:
                    found[egress] = int(options.get("TCA_BPF_CLASSID") or 0)
    return found


def detach_filters(index: int) -> bool:
    """Remove both filters of a device with their qdisc; False where the device or the qdisc is gone."""
    try:
        route().tc("del", "clsact", index=index)
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            return False
        raise explain(f"filters of device {index}", error) from error
    return True
