"""The node's own addresses are nobody else's (inventory 4.7), also where they lie in the range of its pods."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from ipaddress import IPv4Network, IPv6Network

from ciliate.ipam import NODE, RESERVED_OWNERS, Address, Ipam, IpamError

log = logging.getLogger(__name__)


async def reserve_node(ipam: Ipam, ranges: Collection[IPv4Network | IPv6Network], addresses: Iterable[Address]) -> None:
    """Hold those of ``addresses`` that are in ``ranges`` for the node, and give back what it has no more.

    What a pod has already stays the pod's; the log says so, since somebody gave the node an address that was taken.
    """
    owners, wanted = ipam.owners(), set()
    for address in addresses:
        owner = owners.get(address, NODE)
        if owner == NODE and any(address in network for network in ranges):
            wanted.add(address)
        elif owner not in RESERVED_OWNERS:
            log.error("address %s is on a device of the node, and %s has it", address, owner)
    if wanted == {address for address, owner in owners.items() if owner == NODE}:
        return
    try:
        await (ipam.claim(NODE, wanted) if wanted else ipam.release(NODE))
    except IpamError as error:
        log.error("addresses of the node: %s", error)
