"""What a lab consists of, for people and programs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ciliate.lab import agent, etcd, processes, underlay, world
from ciliate.lab.lab import Lab
from ciliate.lab.state import NODE, ROOT, WORLD


def describe(name: str, root: Path = ROOT) -> dict[str, Any]:
    """A lab with its places (nodes, world, pods), as plain data. Where nodes are several, pods say theirs."""
    lab = Lab.open(name, root)
    running = {process.role: processes.alive(process) for process in lab.state.processes}
    places = [
        _place(node, "node", underlay.addresses(node), running.get(agent.role(node), False)) for node in lab.nodes
    ]
    outside = [*world.WORLD_LINK, *lab.state.world_addresses]
    places.append(_place(WORLD, "world", outside, running.get(f"helper {WORLD}", False)))
    if lab.state.kvstore == "etcd":
        places.append(_place(underlay.STORE, "store", underlay.STORE_ADDRESSES, running.get(etcd.ROLE, False)))
    for pod in lab.state.pods.values():
        up = running.get(f"helper {pod.name if not pod.host_network else pod.node or NODE}", False)
        place = _place(pod.name, "pod", pod.addresses, up)
        places.append({**place, "node": pod.node} if len(lab.nodes) > 1 else place)
    return {"name": name, "directory": str(lab.directory.path), "places": places}


def _place(name: str, kind: str, addresses: Iterable[str], up: bool) -> dict[str, Any]:
    return {"name": name, "kind": kind, "addresses": list(addresses), "state": "up" if up else "down"}
