"""Health checks between nodes as a part of the agent: on while there is somebody to ask, rarer in larger clusters."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec

from ciliate.backoff import ClusterSize
from ciliate.health import PORT, hello
from ciliate.health.endpoint import HealthEndpoint
from ciliate.health.probing import NodeHealth, probe_all
from ciliate.listeners import Door

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

log = logging.getLogger(__name__)
INTERVAL = 60.0
"""Seconds between probes of a node, times ln(1 + nodes) (inventory 4.7, 4.12 F1)."""
DUTY = "node-health"
_SHOWN = 5


class HealthChecks:
    """What this node answers, and what it hears of the others."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._option = agent.config.enable_health_checking
        self._bounds = hello.share(agent.name_of)
        self._endpoint = HealthEndpoint(agent, self._bounds)
        self._servers: list[Door] = []
        self._running = False
        self._lock = asyncio.Lock()
        self.nodes: list[NodeHealth] = []
        self._asked = 0.0

    @property
    def wanted(self) -> bool:
        """Whether there is somebody to ask, or the option asks for it anyway."""
        return self._option == "true" or (self._option == "auto" and bool(self._agent.membership.registry.others))

    async def prepare(self) -> None:
        """Forget the endpoint of an earlier agent."""
        await self._endpoint.forget_old()

    def start_duties(self) -> None:
        """Check from now on, and at once whenever nodes come."""
        if self._option == "false":
            return
        self._agent.controllers.run(DUTY, self.check, INTERVAL, shared=True)
        self._agent.membership.registry.subscribe(self._nodes_changed)

    def _nodes_changed(self, came: list[Any], went: list[Any]) -> None:
        if self._running != self.wanted or went:
            self._agent.controllers.trigger(DUTY)

    async def check(self) -> None:
        """Be ready to answer and ask everybody, where that is wanted; else take it down."""
        during = ClusterSize(self._agent.cluster.nodes).interval(INTERVAL) / 2
        await self._check(during)

    async def probe(self) -> list[NodeHealth]:
        """Ask everybody now; what was found."""
        await self._check(0.0)
        return self.nodes

    async def _check(self, during: float) -> None:
        async with self._lock:
            if self.wanted != self._running:
                await (self._start() if self.wanted else self.stop())
            if self._running:
                registry = self._agent.membership.registry
                nodes = [registry.own, *registry.others.values()]
                self.nodes = await probe_all(nodes, registry.own.id, time.time(), during)
                self._asked = time.monotonic()

    async def _start(self) -> None:
        await self._endpoint.start()
        try:
            await self._listen()
        except BaseException:
            await self._take_down()
            raise
        self._tell(*self._endpoint.addresses)
        self._running = True

    async def _listen(self) -> None:
        """At the addresses by which other nodes know this one, and no others."""
        own = self._agent.membership.registry.own
        for address in (own.ipv4, own.ipv6):
            if address is not None:
                try:
                    self._servers.append(await hello.serve(hello.listening(address, PORT), self._bounds))
                except OSError as error:
                    text = f"{address}, port {PORT}: cannot listen there: {error.strerror}"
                    raise OSError(error.errno, f"{text}; free it, or set enable-health-checking=false") from error

    def _tell(self, *addresses: Any) -> None:
        """Make the health endpoint's addresses known."""
        registry = self._agent.membership.registry
        four, six = (next((item for item in addresses if item.version == version), None) for version in (4, 6))
        registry.publish(msgspec.structs.replace(registry.own, health4=four, health6=six))

    async def stop(self) -> None:
        """Answer and ask no more."""
        if not self._running:
            return
        self._running = False
        self.nodes = []
        self._tell()
        await self._take_down()

    async def _take_down(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        await self._endpoint.stop()

    async def close(self) -> None:
        """The agent ends: take down what answers. What others know stays, so that they notice who is missing."""
        if self._running:
            self._running = False
            await self._take_down()
        self._bounds.close()

    def unreachable(self, kind: str) -> list[NodeHealth]:
        """Nodes of which the node itself (``node``), or its health endpoint (``endpoint``), does not answer."""
        return [item for item in self.nodes if not item.reachable(kind)]

    def status(self) -> tuple[str, str]:
        """State and one line for people."""
        if not self._running:
            return "ok", "off: " + ("no other node" if self._option == "auto" else "enable-health-checking")
        if not self.nodes:
            return "ok", "nobody was asked yet"
        count, age = len(self.nodes), time.monotonic() - self._asked
        bad = [item for item in self.nodes if item.problem]
        text = f"{count - len(bad)} of {count} nodes answer at every address, asked {age:.0f} s ago"
        if not bad:
            return "ok", text
        return "warning", text + "; " + "; ".join(f"{item.name}: {item.problem}" for item in bad[:_SHOWN])

    def describe(self) -> dict[str, Any]:
        """The document of ``GET /v1/health``."""
        return {"enabled": self._running, "nodes": [describe(item) for item in self.nodes]}


def describe(item: NodeHealth) -> dict[str, Any]:
    """One node's health for the API."""
    data: dict[str, Any] = msgspec.to_builtins(item)
    return {**data, "reachable": not item.problem, "problem": item.problem}
