"""What is really in a container's network namespace, read without netlink."""

from __future__ import annotations

import fcntl
import socket
import struct
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from ciliate.datapath import devices

SIOCGIFADDR = 0x8915


def container_addresses(netns_fd: int, ifname: str) -> set[str]:
    """The addresses of one interface inside the namespace. Blocking."""
    found: set[str] = devices.in_netns(netns_fd, lambda: _addresses(ifname))
    return found


def _addresses(ifname: str) -> set[str]:
    addresses = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as query:
        try:
            answer = fcntl.ioctl(query, SIOCGIFADDR, struct.pack("256s", ifname.encode()))
            addresses.add(str(IPv4Address(answer[20:24])))
        except OSError:
            # no such interface, or none of this family: the caller misses the address and says so
            pass
    for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines():
        address, *_, name = line.split()
        if name == ifname:
            addresses.add(str(IPv6Address(bytes.fromhex(address))))
    return addresses
