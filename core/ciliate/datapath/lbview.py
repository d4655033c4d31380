"""The load balancer's maps as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ciliate.datapath import lblayout as lay
from ciliate.datapath.bpf import Map
from ciliate.datapath.layout import Address, mapped
from ciliate.datapath.reasons import protocol_name

FLAGS = {
    lay.MAGLEV: "maglev",
    lay.LOCAL_ONLY: "local-only",
    lay.RANGES: "source-ranges",
    lay.EXTERNAL: "external",
    lay.LOCAL_BEHIND: "local-terminating",
}
WAYS = {lay.FLOW_CLIENT: "pod", lay.FLOW_SELF: "self", lay.FLOW_OUTSIDE: "outside", lay.FLOW_ANSWER: "answer"}

STATES = {
    lay.UNANSWERED: "unanswered",
    lay.OPENING: "opening",
    lay.TX_CLOSING: "client closed",
    lay.RX_CLOSING: "backend closed",
    lay.RESET: "reset",
}


def place(address: Address, port: int, proto: int) -> str:
    """``10.96.0.1:80/TCP``."""
    return (
        f"[{address}]:{port}/{protocol_name(proto)}"
        if address.version == 6
        else f"{address}:{port}/{protocol_name(proto)}"
    )


def frontend_text(data: bytes) -> str:
    """A frontend, as key or value."""
    return place(*lay.frontend_of(data))


def backend_text(data: bytes) -> str:
    """A backend, without its number."""
    return place(*lay.backend_of(data))


def service_row(key: bytes, value: bytes) -> tuple[str, str]:
    """One service."""
    found = lay.service_of(value)
    flags = ", ".join(name for bit, name in FLAGS.items() if found.flags & bit) or "none"
    text = f"service {found.id} backends {found.backends} local {found.local} generation {found.generation}"
    return frontend_text(key), f"{text} affinity {found.affinity} flags {flags}"


def slot_row(key: bytes, value: bytes) -> tuple[str, str]:
    """One place of a service."""
    service, generation, slot = lay.SLOT.unpack(key)
    return f"service {service} generation {generation} slot {slot}", f"backend {lay.NUMBER.unpack(value)[0]}"


def backend_row(key: bytes, value: bytes) -> tuple[str, str]:
    """One backend."""
    return f"backend {lay.NUMBER.unpack(key)[0]}", backend_text(value)


def reverse_row(key: bytes, value: bytes) -> tuple[str, str]:
    """Where answers of a service come from."""
    return f"service {lay.NUMBER.unpack(key)[0]}", frontend_text(value)


def flow_row(key: bytes, value: bytes) -> tuple[str, str]:
    """One flow."""
    source, destination, source_port, port, proto, way, endpoint = lay.FLOW_KEY.unpack(key)
    ends = [
        f"{mapped(address)} {int.from_bytes(number, 'big')}"
        for address, number in ((source, source_port), (destination, port))
    ]
    backend, service, used, _, state = lay.FLOW.unpack(value)
    name = f"{protocol_name(proto)} {ends[0]} -> {ends[1]} {WAYS.get(way, way)} endpoint {endpoint}"
    return name, f"service {service} backend {backend} used {used} state {states(state)}"


def states(value: int) -> str:
    """The state of a flow in words."""
    return ", ".join(name for bit, name in STATES.items() if value & bit) or "answered"


def client_row(key: bytes, value: bytes) -> tuple[str, str]:
    """A client outside whom this node stands for, by the tuple that the backend knows."""
    node, backend, port, target, proto, _, _ = lay.FLOW_KEY.unpack(key)
    address, service, client_port, state, used = lay.CLIENT.unpack(value)
    ends = [
        place(mapped(data), int.from_bytes(number, "big"), proto)
        for data, number in ((node, port), (backend, target), (address, client_port))
    ]
    return f"{ends[0]} -> {ends[1]}", f"client {ends[2]} service {service} used {used} state {states(state)}"


def share_row(key: bytes, value: bytes) -> tuple[str, str]:
    """How many of the node's ports a client outside has."""
    held, refused = lay.SHARE.unpack(value)
    return f"client {mapped(key)}", f"ports {held} refused {refused}"


DESCRIBE = {
    "ciliate_lb_services": service_row,
    "ciliate_lb_slots": slot_row,
    "ciliate_lb_backends": backend_row,
    "ciliate_lb_reverse": reverse_row,
    "ciliate_lb_flow": flow_row,
    "ciliate_lb_client": client_row,
    "ciliate_lb_share": share_row,
}
NAMES = ("ciliate_lb_services", "ciliate_lb_slots", "ciliate_lb_backends", "ciliate_lb_reverse", "ciliate_lb_maglev")


def services(maps: Mapping[str, Map]) -> Iterator[dict[str, Any]]:
    """Every service with its backends in the order of their slots, as the programs find them."""
    slots = {lay.SLOT.unpack(key): lay.NUMBER.unpack(value)[0] for key, value in maps["ciliate_lb_slots"].items()}
    known = {lay.NUMBER.unpack(key)[0]: backend_text(value) for key, value in maps["ciliate_lb_backends"].items()}
    for key, value in sorted(maps["ciliate_lb_services"].items(), key=lambda item: lay.service_of(item[1]).id):
        found = lay.service_of(value)
        count = found.backends + (found.local if found.flags & lay.LOCAL_BEHIND else 0)
        numbers = [slots.get((found.id, found.generation, slot)) for slot in range(count)]
        yield {
            "id": found.id,
            "frontend": frontend_text(key),
            "backends": [f"{number}: {known.get(number or 0, 'missing')}" for number in numbers],
            "affinity": found.affinity,
            "flags": [name for bit, name in FLAGS.items() if found.flags & bit],
        }


def maglev(maps: Mapping[str, Map]) -> Iterator[dict[str, Any]]:
    """How many places of its table each backend of a service has."""
    for key, value in sorted(maps["ciliate_lb_maglev"].items()):
        places = lay.MAGLEV_TABLE.unpack(value)
        shares = {number: places.count(number) for number in dict.fromkeys(places)}
        yield {
            "service": lay.NUMBER.unpack(key)[0],
            "places": len(places),
            "backends": [f"{number}: {count}" for number, count in sorted(shares.items())],
        }
