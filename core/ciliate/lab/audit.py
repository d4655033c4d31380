"""Compares what a lab's agent says with what is on its disk and in the kernel: everything that belongs to nobody."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ciliate.datapath import layout
from ciliate.datapath.bpf import Map
from ciliate.identity import is_assigned
from ciliate.ipam import RESERVED_OWNERS
from ciliate.lab.command import run
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE


class Endpoint(NamedTuple):
    """What must stay the same of an endpoint whatever happens to the agent."""

    id: int
    identity: int
    addresses: tuple[str, ...]
    device: str
    ifindex: int


def endpoints(lab: Lab) -> dict[str, Endpoint]:
    """Every endpoint by its container id, as the agent tells."""
    found = {}
    for document in lab.client().request("GET", "/v1/endpoint"):
        status = document["status"]
        network = status["networking"]
        addresses = tuple(text for item in network["addressing"] for text in item.values() if text)
        found[status["external-identifiers"]["container-id"]] = Endpoint(
            document["id"], status["identity"]["id"], addresses, network["interface-name"], network["interface-index"]
        )
    return found


def leftovers(lab: Lab) -> list[str]:
    """Everything that no endpoint owns, and everything that an endpoint should have and has not."""
    known, found = endpoints(lab), list[str]()
    for part in (_addresses, _devices, _files, _identities, _maps):
        try:
            found += part(lab, known)
        except (OSError, LabError, sqlite3.Error) as error:
            # what is being put back is not there at one moment: whoever waits looks again
            where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            found.append(f"{part.__name__.strip('_')}: cannot be read: {where}{error}")
    return found


def _differ(what: str, present: set[Any], wanted: set[Any]) -> Iterator[str]:
    for item in sorted(present - wanted, key=str):
        yield f"{what} {item}: belongs to no endpoint"
    for item in sorted(wanted - present, key=str):
        yield f"{what} {item}: is missing"


def _addresses(lab: Lab, known: dict[str, Endpoint]) -> Iterator[str]:
    allocated = lab.client().request("GET", "/v1/ipam")["addresses"]
    present = {item["ip"] for item in allocated if item["owner"] not in RESERVED_OWNERS}
    yield from _differ("address", present, {address for item in known.values() for address in item.addresses})


def _devices(lab: Lab, known: dict[str, Endpoint]) -> Iterator[str]:
    node = lab.directory.namespace(NODE)
    links = json.loads(run("ip", "-n", node, "-j", "link"))
    present = {link["ifname"] for link in links if link["ifname"].startswith("lxc")}
    yield from _differ("device", present, {item.device for item in known.values()})
    filters = {name for name in present if filters_of(lab, name) == (1, 1)}
    yield from _differ("filters of", filters, present)
    destinations = {
        route["dst"]
        for family in ("-4", "-6")
        for route in json.loads(run("ip", "-n", node, "-j", family, "route"))
        if route.get("dev", "").startswith("lxc") and not route["dst"].startswith("fe80")
    }
    yield from _differ("route to", destinations, {text for item in known.values() for text in item.addresses})


def filters_of(lab: Lab, device: str) -> tuple[int, int]:
    """How many BPF filters a device of the node has at ingress and egress."""
    node = lab.directory.namespace(NODE)

    def count(side: str) -> int:
        with contextlib.suppress(json.JSONDecodeError):
            filters = json.loads(run("tc", "-n", node, "-j", "filter", "show", "dev", device, side) or "[]")
            return sum("options" in item for item in filters)
        return 0

    return count("ingress"), count("egress")


def _files(lab: Lab, known: dict[str, Endpoint]) -> Iterator[str]:
    state = lab.directory.state_dir
    records = {int(path.stem) for path in (state / "endpoints").glob("*.json")}
    yield from _differ("endpoint record", records, {item.id for item in known.values()})
    attachments = {path.stem for path in (state / "cni").glob("*.json")}
    yield from _differ("attachment", attachments, {item.device for item in known.values()})
    # an agent that runs may be writing just now; its files carry its number
    running = f".{lab.agent_process().pid}"
    left = {path for path in state.rglob("*.tmp") if path.suffixes[-2:-1] != [running]}
    yield from _differ("temporary file", left, set())
    yield from _differ("queued DEL", set((lab.directory.run_dir / "cni-spool").glob("*")), set())


def _identities(lab: Lab, known: dict[str, Endpoint]) -> Iterator[str]:
    """What this node holds in its embedded store."""
    path = lab.directory.state_dir / "kvstore.db"
    if not path.exists():
        return
    with contextlib.closing(sqlite3.connect(path)) as store:
        rows = store.execute("SELECT value FROM kv WHERE key LIKE ?", (f"%/identities/v1/value/%/{NODE}",)).fetchall()
    held = {int(value) for (value,) in rows}
    yield from _differ(
        "identity held", held, {item.identity for item in known.values() if not is_assigned(item.identity)}
    )


@contextlib.contextmanager
def open_map(lab: Lab, name: str) -> Iterator[Map]:
    """A pinned map of the lab's agent."""
    table = Map.open(pins(lab) / name)
    try:
        yield table
    finally:
        table.close()


def pins(lab: Lab) -> Path:
    """The directory of the pins of the lab's agent."""
    return lab.directory.bpf_dir / "ciliate" / "default"


def _maps(lab: Lab, known: dict[str, Endpoint]) -> Iterator[str]:
    ids = {item.id for item in known.values()}
    addresses = {text for item in known.values() for text in item.addresses}
    with open_map(lab, "ciliate_ep") as table:
        valid = {int.from_bytes(key, "little") for key, value in table.items() if _valid(value)}
    yield from _differ("ciliate_ep entry", valid, ids)
    with open_map(lab, "ciliate_lxc") as table:
        yield from _differ(
            "ciliate_lxc entry", {str(layout.endpoint_address(key)) for key, _ in table.items()}, addresses
        )
    with open_map(lab, "ciliate_policy") as table:
        owners = {layout.policy_key_of(key)[0] for key, _ in table.items()}
    yield from _differ("policy entries of endpoint", owners - ids, set())
    for name in ("ciliate_ct_tcp", "ciliate_ct_any"):
        with open_map(lab, name) as table:
            flows = {end.endpoint for key, value in table.items() for end in layout.conntrack_entries(key, value)}
        yield from _differ(f"{name} entries of endpoint", flows - ids, set())


def _valid(value: bytes) -> bool:
    return bool(layout.EP_CONFIG.unpack(value)[7] & layout.EP_VALID)
