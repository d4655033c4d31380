"""Waits until every node of a lab knows every pod of the others, in its kernel."""

from __future__ import annotations

import time
from typing import Any

from ciliate.api_client import ApiError
from ciliate.lab.errors import LabError
from ciliate.lab.lab import Lab

TIMEOUT = 30.0
_POLL = 0.02
Known = dict[str, int]
"""Prefix of one address -> identity."""


def wait_propagated(lab: Lab, timeout: float = TIMEOUT) -> None:
    """Return once every agent has every other node's pods in its ipcache; LabError names what is missing."""
    if len(lab.nodes) == 1:
        return
    deadline = time.monotonic() + timeout
    own = {node: pods_of(lab, node) for node in lab.nodes}
    for node in lab.nodes:
        wanted = {prefix: number for other, pods in own.items() if other != node for prefix, number in pods.items()}
        while missing := _missing(lab, node, wanted):
            if time.monotonic() > deadline:
                raise LabError(f"{node}: after {timeout:g} s it does not know {', '.join(sorted(missing))}")
            time.sleep(_POLL)


def pods_of(lab: Lab, node: str) -> Known:
    """The pods of one node, by its own agent."""
    found: Known = {}
    for document in lab.request("GET", "/v1/endpoint", node=node):
        status = document["status"]
        for pair in status["networking"]["addressing"]:
            found.update({_prefix(text): status["identity"]["id"] for text in pair.values() if text})
    return found


def _prefix(text: str) -> str:
    return f"{text}/{128 if ':' in text else 32}"


def ipcache_of(lab: Lab, node: str) -> Known:
    """What a node's kernel has behind each prefix, as far as it is what the agent wants."""
    rows: list[dict[str, Any]] = lab.request("GET", "/v1/map/ipcache", node=node)["cache"]
    return {row["key"]: int(row["value"].split()[1]) for row in rows if row["desired-action"] == "ok"}


def _missing(lab: Lab, node: str, wanted: Known) -> set[str]:
    present = ipcache_of(lab, node)
    missing = {prefix for prefix, number in wanted.items() if present.get(prefix) != number}
    return missing or {f"identity {number}" for number in set(wanted.values()) if not _knows(lab, node, number)}


def _knows(lab: Lab, node: str, identity: int) -> bool:
    try:
        lab.client(node).request("GET", f"/v1/identity/{identity}")
    except ApiError:
        return False
    return True
