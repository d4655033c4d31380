"""Masquerading as a part of the agent: one engine for new flows, and those before it until their flows are over.

A switch first lets the new engine begin and then the old one end, so that no flow leaves unmasqueraded in between; the
old one serves its flows until they are over and is removed then. Which engines are at work is on disk, so that a new
agent goes on with it, whatever its configuration says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciliate import atomicfile
from ciliate.configvalues import addresses, networks
from ciliate.datapath import nodefilters
from ciliate.masquerade import Address, Masquerade, MasqueradedFlow, MasqueradePlan, Network, PodUsage, Spare
from ciliate.plugin import PluginError

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.config import AgentConfig
    from ciliate.endpoint.model import Endpoint
    from ciliate.node.model import Node

log = logging.getLogger(__name__)
INTERVAL, COLLECT_INTERVAL = 10.0, 60.0
"""Seconds between looks at addresses, devices and rules, and between collections."""
LOOK_INTERVAL, TOLD = 5.0, 60.0
"""Seconds between looks at what each pod has, and for how long a pod that was refused something is told of."""
NONE = "none"
ALWAYS_DIRECT = tuple(ip_network(text) for text in ("169.254.0.0/16", "224.0.0.0/4", "fe80::/10", "ff00::/8"))
"""Link-local and multicast: no answer could find back to the pod."""
PRESSURE_WARNING = 0.8
MUCH, NOTABLE, SHOWN = 0.5, 0.1, 10
"""Of a share: from where on mappings are collected at once, and status names the pod; how many are shown at most."""


class Masquerading:
    """Two duties (``refresh``, ``collect``), a status source, and what a switch of the kind needs (``move``)."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._file = Path(agent.config.state_dir) / "masquerade.json"
        self._name = NONE
        self._active: Masquerade | None = None
        self._draining: dict[str, Masquerade] = {}
        self._plan: MasqueradePlan | None = None
        self._lock = asyncio.Lock()
        self._direct: tuple[Network, ...] | None = None
        """Prefixes that are never masqueraded; None where they have to be put together anew, which thousands of nodes
        make long."""
        self.pressure = 0.0
        """How full the engine's table was when it was last looked at, 0 to 1."""
        self.served: dict[str, int] = {}
        """Flows by engine, as last looked at."""
        self.usage: list[PodUsage] = []
        """Of the pods that have most, or were refused most, what they have; as last looked at."""
        self._refused: dict[Address, tuple[int, float]] = {}
        """How many flows of a pod were refused, and when that was last more than before."""
        self._looked = False
        self._gone: set[Address] = set()
        """Addresses of endpoints that are gone, whose mappings have not been ended yet."""

    async def start(self) -> None:
        """Engage the chosen engine, and go on with those that an earlier agent left at work."""
        agent = self._agent
        agent.membership.registry.subscribe(self._nodes_changed)
        self._name = agent.config.masquerade
        self._active = await self._chosen()
        left = await asyncio.to_thread(atomicfile.read_json, self._file)
        names = left.get("engines", []) if isinstance(left, dict) else []
        plan = self._plan = await self._make_plan()
        await self._remember([self._name, *names])
        for name in names:
            if name != self._name:
                await self._bring_back(name)
        if self._active is not None:
            await self._active.engage(plan, self._spare(self._active))
        for name, engine in list(self._draining.items()):
            await self._go_on(name, engine, plan)

    async def _chosen(self) -> Masquerade | None:
        plugins = self._agent.plugins
        if self._name == NONE and NONE not in plugins.providers("masquerade"):
            return None  # its plugin may be disabled, and there is nothing to do
        engine: Masquerade = await plugins.start("masquerade", self._name, self._agent.context())
        return engine

    async def _bring_back(self, name: str) -> None:
        """An engine that an earlier agent left at work: it tells its flows before the chosen one begins."""
        try:
            self._draining[name] = await self._fresh(name)
        except (PluginError, OSError) as error:
            log.error("masquerade %s: what it left in the kernel cannot be served on: %s", name, error)

    async def _go_on(self, name: str, engine: Masquerade, plan: MasqueradePlan) -> None:
        try:
            await engine.drain(plan, self._name != NONE)
        except OSError as error:
            del self._draining[name]
            log.error("masquerade %s: what it left in the kernel cannot be served on: %s", name, error)

    async def _fresh(self, name: str) -> Masquerade:
        plugins = self._agent.plugins
        engine: Masquerade = await plugins.bring_up(plugins.select("masquerade", name), self._agent.context())
        return engine

    def _spare(self, engine: Masquerade) -> Spare:
        """What an engine is told of the flows that the others serve at that moment."""

        async def told() -> list[MasqueradedFlow]:
            others = [*self._draining.values(), *([self._active] if self._active is not None else [])]
            return [flow for other in others if other is not engine for flow in await other.flows()]

        return told

    async def move(self, name: str, new: Masquerade) -> None:
        """Let engine ``new``, started already, masquerade new flows, and the one before serve its own to their end.

        Where that fails everything is as before and the error is raised.
        """
        async with self._lock:
            before, plan = self._name, await self._make_plan()
            await self._remember([name, before, *self._draining])
            try:
                await new.engage(plan, self._spare(new))
                if before != NONE:
                    old = await self._fresh(before)
                    await old.drain(plan, name != NONE)
                    self._draining[before] = old
            except BaseException:
                await self._undo(name, new, plan)
                raise
            self._draining.pop(name, None)
            self.served.pop(name, None)
            self._name, self._active, self._plan = name, new, plan
        self._agent.controllers.trigger("masquerade")

    async def _undo(self, name: str, new: Masquerade, plan: MasqueradePlan) -> None:
        if self._active is not None:
            await self._active.engage(plan, self._spare(self._active))
        if name in self._draining:
            await new.drain(plan, self._name != NONE)
        else:
            await new.remove()
        await self._remember([self._name, *self._draining])

    async def refresh(self) -> None:
        """Follow addresses, devices and nodes; mend, and remove engines whose flows are over."""
        async with self._lock:
            plan = await self._make_plan()
            if plan != self._plan:
                await self._replan(plan)
            elif self._active is not None:
                for text in await self._active.mend():
                    log.warning("masquerade %s: somebody changed the kernel: %s; put back", self._name, text)
            for name, engine in list(self._draining.items()):
                await self._end(name, engine)

    async def renew(self) -> None:
        """Let every engine engage anew: what it has of the datapath's programs and maps was replaced."""
        async with self._lock:
            await self._replan(await self._make_plan())

    async def _replan(self, plan: MasqueradePlan) -> None:
        if self._active is not None:
            await self._active.engage(plan, self._spare(self._active))
        for engine in self._draining.values():
            await engine.drain(plan, self._name != NONE)
        self._plan = plan

    async def _end(self, name: str, engine: Masquerade) -> None:
        await engine.collect()
        self.served[name] = await engine.remaining()
        if self.served[name]:
            return
        log.info("masquerade %s: its last flow is over", name)
        await engine.remove()
        del self._draining[name]
        del self.served[name]
        await self._remember([self._name, *self._draining])

    async def collect(self) -> None:
        """Remove mappings of flows that are over, and look how full the table is."""
        async with self._lock:
            if self._active is not None:
                await self._active.collect()
                self.served[self._name] = await self._active.remaining()
                self.pressure = await self._active.pressure()

    def forget(self, sources: Collection[Address]) -> None:
        """The endpoint with these addresses is gone: its mappings end now, at the latest before one is used again."""
        self._gone.update(sources)
        self._agent.controllers.trigger("masquerade-forget")

    async def forget_gone(self) -> None:
        """End the mappings of addresses that are gone. OSError where that fails; they are still to be ended then."""
        async with self._lock:
            gone = frozenset(self._gone)
            if not gone:
                return
            for engine in [*self._draining.values(), *([self._active] if self._active is not None else [])]:
                await engine.forget(gone)
            self._gone -= gone

    async def before_use(self, endpoint: Endpoint) -> None:
        """No mapping of an earlier holder of the endpoint's addresses is left."""
        if self._gone.intersection(endpoint.addresses):
            await self.forget_gone()

    async def look(self) -> None:
        """See what each pod has of what all share; who has much gives back what is over."""
        engine = self._active
        found = await engine.usage() if engine is not None else []
        now = time.monotonic()
        for item in found:
            before = self._refused.get(item.source)
            if before is None or item.refused > before[0]:
                # what an earlier agent saw is no news
                new = item.refused and (before is not None or self._looked)
                self._refused[item.source] = (item.refused, now if new else now - TOLD)
        self._looked = True
        present = {item.source for item in found}
        self._refused = {source: seen for source, seen in self._refused.items() if source in present}
        order = sorted(found, key=lambda item: (self._was_refused(item, now), item.share, item.refused), reverse=True)
        self.usage = [item for item in order if item.mappings or item.refused][:SHOWN]
        if any(item.share >= MUCH for item in found):
            self._agent.controllers.trigger("masquerade-gc")

    def _was_refused(self, item: PodUsage, now: float) -> bool:
        return item.source in self._refused and now - self._refused[item.source][1] < TOLD

    def pod_of(self, address: Address) -> str:
        """Whose address it is: the pod's name, else the endpoint's number, else nothing."""
        for endpoint in self._agent.endpoints.endpoints():
            if address in endpoint.addresses:
                return endpoint.pod or f"endpoint {endpoint.id}"
        return ""

    def _who(self, item: PodUsage) -> str:
        return f"{self.pod_of(item.source) or 'an unknown pod'} ({item.source})"

    def _offenders(self) -> list[str]:
        now = time.monotonic()
        return [
            f"{self._who(item)} used up its share: it has {item.mappings} "
            f"flows, {item.share:.0%} of what one pod may have, and {item.refused} more were refused"
            for item in self.usage
            if self._was_refused(item, now)
        ]

    def _nodes_changed(self, changed: list[Node], removed: list[Node]) -> None:
        self._direct = None

    async def _make_plan(self) -> MasqueradePlan:
        agent, config = self._agent, self._agent.config
        direct = self._direct  # nodes may come, and forget it, before the plan is made
        if direct is None:
            direct = self._direct = self._direct_prefixes()
        devices = await agent.datapath.programs.run(_device_addresses, config)
        return MasqueradePlan(
            sources=tuple(_ranges(config)),
            direct=direct,
            devices=devices,
            entries=config.bpf_snat_max,
            reserved=agent.balancing.reserved_ports(),
        )

    def _direct_prefixes(self) -> tuple[Network, ...]:
        config, others = self._agent.config, self._agent.membership.registry.others.values()
        direct: set[Network] = {*(networks(config.non_masquerade_cidrs) or _ranges(config)), *ALWAYS_DIRECT}
        direct.update(prefix for node in others for prefix in (node.pods4, node.pods6) if prefix is not None)
        return tuple(sorted(direct, key=lambda prefix: (prefix.version, int(prefix.network_address), prefix.prefixlen)))

    async def _remember(self, names: Collection[str]) -> None:
        engines = sorted({*names} - {NONE})
        if engines or self._file.exists():
            await asyncio.to_thread(atomicfile.write_json, self._file, {"engines": engines})

    def status(self) -> tuple[str, str]:
        """State and one line for people."""
        ending = ", ".join(f"{self.served.get(name, 0)} flows of {name} end by themselves" for name in self._draining)
        rest = f"; {ending}" if ending else ""
        if self._name == NONE:
            return "ok", f"none{rest}"
        plan = self._plan
        devices = [f"{name} ({', '.join(map(str, found))})" for name, found in plan.devices.items()] if plan else []
        text = f"{self._name} on {', '.join(devices) or 'no device'}, {self.served.get(self._name, 0)} flows{rest}"
        if not devices:
            return "warning", f"{text}: no device leads out of the node; say which with the option devices"
        most = max(self.usage, key=lambda item: item.share, default=None)
        if most is not None and most.share >= NOTABLE:
            text += f"; {self._who(most)} has most, {most.share:.0%} of what one pod may have"
        offenders = self._offenders()
        if offenders:
            return "warning", f"{text}; {'; '.join(offenders)}"
        if self.pressure >= PRESSURE_WARNING:
            return "warning", f"{text}; the table of mappings is {self.pressure:.0%} full: raise bpf-snat-max"
        return "ok", text


def _ranges(config: AgentConfig) -> list[Network]:
    pairs = ((config.enable_ipv4, config.ipv4_range), (config.enable_ipv6, config.ipv6_range))
    return [prefix for enabled, prefix in pairs if enabled]


def _device_addresses(config: AgentConfig) -> Mapping[str, tuple[Address, ...]]:
    """Each device out of the node with the address to use of each family: the chosen ones, else its own. Blocking."""
    chosen = {address.version: address for address in addresses(config.snat_addresses)}
    found: dict[str, tuple[Any, ...]] = {}
    for name in nodefilters.native_devices(config.devices):
        own = nodefilters.addresses_of(name)
        found[name] = tuple((own | chosen)[version] for version in (4, 6) if version in own | chosen)
    return found
