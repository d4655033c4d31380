"""Probes of all nodes: which ways there are to each, and which of them answer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Sequence
from ipaddress import IPv4Address, IPv6Address

import msgspec

from ciliate.backoff import pause
from ciliate.health import PORT, hello
from ciliate.health.ping import Pinger
from ciliate.node import Node

TIMEOUT = 3.0
AT_ONCE = 32
"""Nodes that are probed at the same time; in a larger cluster the probes are spread over half of the interval."""
Address = IPv4Address | IPv6Address


class Probe(msgspec.Struct, frozen=True):
    """One question and what came of it: ``latency`` in seconds, ``error`` empty where it was answered."""

    latency: float = 0.0
    error: str = ""


class Path(msgspec.Struct, frozen=True):
    """One way to a node: its own address, or that of its health endpoint. ``http`` is None where it offers none."""

    kind: str
    address: str
    icmp: Probe
    http: Probe | None

    @property
    def ok(self) -> bool:
        """Whether everything that was asked was answered."""
        return not self.icmp.error and not (self.http and self.http.error)


class NodeHealth(msgspec.Struct, frozen=True):
    """What the probes of one node found; ``time`` in seconds since the epoch."""

    name: str
    cluster: str
    local: bool
    time: float
    paths: list[Path]

    def reachable(self, kind: str) -> bool:
        """Whether the node, or its health endpoint, answers on every address that it has; True where it has none."""
        return all(path.ok for path in self.paths if path.kind == kind)

    @property
    def problem(self) -> str:
        """What does not answer, for people; empty where all does."""
        return "; ".join(_problem(path) for path in self.paths if not path.ok)


def _problem(path: Path) -> str:
    asked = {"ICMP": path.icmp.error, f"HTTP {PORT}": path.http.error if path.http else ""}
    told = ", ".join(f"{name}: {error}" for name, error in asked.items() if error)
    return f"{path.kind} {path.address}: {told}"


def ways(node: Node) -> list[tuple[str, Address]]:
    """Kind and address of every way to a node."""
    own = [("node", address) for address in (node.ipv4, node.ipv6) if address is not None]
    return own + [("endpoint", address) for address in (node.health4, node.health6) if address is not None]


async def probe_all(nodes: Sequence[Node], local: str, now: float, during: float = 0.0) -> list[NodeHealth]:
    """Probe every node, spread over ``during`` seconds where there are many. ``local`` is this node's id."""
    limit, gap = asyncio.Semaphore(AT_ONCE), during / len(nodes) if len(nodes) > AT_ONCE else 0.0

    with Pinger() as pinger:

        async def one(node: Node, place: int) -> NodeHealth:
            await pause(gap * place)
            async with limit:
                # a node without a health endpoint does not take part: nobody answers HTTP there
                takes_part = node.health4 is not None or node.health6 is not None
                paths = await asyncio.gather(*(_path(pinger, *way, takes_part) for way in ways(node)))
            return NodeHealth(node.name, node.cluster, node.id == local, now, paths)

        return await asyncio.gather(*(one(node, place) for place, node in enumerate(nodes)))


async def _path(pinger: Pinger, kind: str, address: Address, http: bool) -> Path:
    icmp = _probe(pinger.ping(address, TIMEOUT))
    asked = [icmp, _probe(hello.ask(address, PORT, TIMEOUT))] if http else [icmp]
    found = await asyncio.gather(*asked)
    return Path(kind, str(address), found[0], found[1] if http else None)


async def _probe(question: Awaitable[float]) -> Probe:
    try:
        return Probe(round(await question, 6))
    except TimeoutError:
        return Probe(error=f"no answer within {TIMEOUT:g} s")
    except OSError as error:
        return Probe(error=os.strerror(error.errno) if error.errno else str(error))
