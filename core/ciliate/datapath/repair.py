"""Finds what somebody took away from attached endpoints behind our back, and puts it back. Blocking."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple

from ciliate.datapath import layout, precedence, rtnl
from ciliate.datapath.bpf import Map
from ciliate.datapath.devices import DIRECTIONS
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.netlink import NetlinkError, explain, route

if TYPE_CHECKING:
    from ciliate.datapath.model import EndpointConfig

_GETROUTE, _ROUTE_HEAD, _DST, _OIF = 26, 12, 1, 4
_UP = 1
_PERMANENT = 0x80
Place = tuple[int, layout.Address]
"""An interface index and an address."""


class Inspection(NamedTuple):
    """What was missing and is there again, the endpoints whose device is gone, which nobody can put back, and what
    others put before our filters.
    """

    mended: list[str]
    gone: frozenset[int]
    before: list[str]


class Lacks(NamedTuple):
    """What each endpoint lacks; the endpoints whose device is gone; what comes before our filters. In words."""

    found: dict[int, list[str]]
    gone: frozenset[int]
    before: list[str]


class Surroundings:
    """Devices, routes and neighbours of this namespace, as read at one moment."""

    def __init__(self) -> None:
        ipr = route()
        self.links = {link["index"]: link["flags"] for link in ipr.get_links()}
        self.routes = set[Place]()
        # a node has routes to thousands of others, which a parser that makes objects of them takes seconds for
        for family, length in ((2, 32), (10, 128)):
            for message in rtnl.dump(_GETROUTE, bytes([family]).ljust(_ROUTE_HEAD, b"\0"), "routes to endpoints"):
                if message[1] != length:
                    continue
                found = rtnl.attributes(message, _ROUTE_HEAD)
                if _DST in found and _OIF in found:
                    self.routes.add((int.from_bytes(found[_OIF], sys.byteorder), ip_address(found[_DST])))
        self.neighbours = {
            (message["ifindex"], ip_address(message.get("NDA_DST"))): message.get("NDA_LLADDR")
            for message in ipr.get_neighbours()
            if message["state"] & _PERMANENT and message.get("NDA_DST")
        }


def inspect(
    endpoints: Mapping[int, EndpointConfig], maps: Mapping[str, Map], expected: Callable[[EndpointConfig], bytes]
) -> Lacks:
    """Compare; ``expected`` is what an endpoint's entry in ``ciliate_ep`` should be."""
    found: dict[int, list[str]] = {}
    gone: set[int] = set()
    before: list[str] = []
    try:
        around = Surroundings()
        for config in endpoints.values():
            if config.ifindex not in around.links:
                gone.add(config.id)
                continue
            filters = {egress: _filters(config, parent) for egress, parent in DIRECTIONS.items()}
            lacks = [*_connection(config, around, filters), *_entries(config, maps, expected(config))]
            if lacks:
                found[config.id] = lacks
            for egress, messages in filters.items():
                before += precedence.strangers(config, egress, messages)
    except NetlinkError as error:
        raise explain("comparison of devices, filters and routes", error) from error
    return Lacks(found, frozenset(gone), before)


def _connection(config: EndpointConfig, around: Surroundings, filters: Mapping[bool, list[Any]]) -> Iterator[str]:
    for egress, side in ((False, "ingress"), (True, "egress")):
        if all(precedence.class_of(message) != config.id for message in filters[egress]):
            yield f"the filter at {side} of {config.ifname}"
    if config.external:
        return  # everything but the filters is another plugin's
    if not around.links[config.ifindex] & _UP:
        yield f"{config.ifname} being up"
    for address in config.addresses:
        if (config.ifindex, address) not in around.routes:
            yield f"the route to {address}"
        if around.neighbours.get((config.ifindex, address)) != config.mac.hex(":"):
            yield f"the neighbour entry of {address}"


def _filters(config: EndpointConfig, parent: int) -> list[Any]:
    try:
        return list(route().get_filters(index=config.ifindex, parent=parent))
    except NetlinkError as error:
        if error.code in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            return []  # no queueing discipline at all
        raise


def _entries(config: EndpointConfig, maps: Mapping[str, Map], expected: bytes) -> Iterator[str]:
    if maps["ciliate_ep"].lookup(config.id.to_bytes(4, "little")) != expected:
        yield "its entry in ciliate_ep"
    present = maps["ciliate_link"].lookup(config.id.to_bytes(4, "little"))
    if (not is_link(present, config)) if config.external else present is not None:
        yield "its entry in ciliate_link"
    for address in () if config.through_stack else config.addresses:
        value = maps["ciliate_lxc"].lookup(layout.endpoint_key(address))
        if value is None or layout.ENDPOINT_INFO.unpack(value)[:3] != (config.ifindex, config.identity, config.id):
            yield f"the entry of {address} in ciliate_lxc"


def is_link(present: bytes | None, config: EndpointConfig) -> bool:
    """Whether an entry of ``ciliate_link`` is that of an endpoint on somebody else's link."""
    return present is not None and layout.LINK_ENTRY.unpack(present)[1] == config.interface_id


def forget_unknown(maps: Mapping[str, Map], known: frozenset[int]) -> list[int]:
    """Remove the entries of endpoints that are not ``known`` from the maps of endpoints and addresses; their ids."""
    unknown = set()
    for keys, values, count in maps["ciliate_ep"].batches():
        for index in range(count):
            start = index * layout.EP_CONFIG.size
            valid = values[start : start + layout.EP_CONFIG.size].strip(b"\0")
            number = int.from_bytes(keys[index * 4 : index * 4 + 4], "little")
            if valid and number not in known:
                unknown.add(number)
    for number in unknown:
        maps["ciliate_ep"].update(number.to_bytes(4, "little"), bytes(layout.EP_CONFIG.size))
    links = maps["ciliate_link"]
    links.delete_many([key for key, _ in links.items() if int.from_bytes(key, "little") not in known])
    table = maps["ciliate_lxc"]
    strangers = [(key, owner) for key, value in table.items() if (owner := _owner(value)) and owner not in known]
    table.delete_many(key for key, _ in strangers)
    return sorted(unknown.union(owner for _, owner in strangers))


def _owner(value: bytes) -> int:
    owner: int = layout.ENDPOINT_INFO.unpack(value)[2]
    return owner


def describe(found: Mapping[int, list[str]]) -> list[str]:
    """One line for each endpoint that lacked something."""
    return [f"endpoint {number} had lost {', '.join(lacks)}" for number, lacks in found.items()]


def raise_all(failures: Mapping[int, OSError]) -> None:
    """One DatapathError for every endpoint that could not be mended."""
    if failures:
        text = "; ".join(f"endpoint {number}: {error}" for number, error in failures.items())
        raise DatapathError(next(iter(failures.values())).errno, f"cannot be mended: {text}")
