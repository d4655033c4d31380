"""What each pod has of the conntrack tables, which all share: collection in time, and who used up its share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ciliate.datapath.flows import FlowUsage

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

INTERVAL = 1.0
SHOWN = 10
"""Seconds between looks, and how many pods are shown at most."""
BUSY = 0.125
"""Part of a table from where on it is worth a look who has it."""
TOLD = 60.0
"""Seconds for which status names who used up its share."""


class FlowShares:
    """A duty (``look``) and a status source."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._replaced: dict[tuple[int, str], tuple[int, float]] = {}
        self.usage: list[FlowUsage] = []
        """Who has most, offenders first."""
        self.full: dict[str, float] = {}
        """How full each table is, 0 to 1; dead flows count until they are collected."""

    async def look(self) -> None:
        """See how full the tables are, and where it matters who has them; what is over goes before it is in the way."""
        flows = self._agent.datapath.flows
        self.full = await flows.full()
        if max(self.full.values()) < BUSY and not self.usage:
            return
        now = time.monotonic()
        found = await flows.usage(item.id for item in self._agent.endpoints.endpoints())
        for item in found:
            before = self._replaced.get((item.endpoint, item.table), (item.replaced, now - TOLD))
            self._replaced[item.endpoint, item.table] = before if item.replaced <= before[0] else (item.replaced, now)
        present = {(item.endpoint, item.table) for item in found}
        self._replaced = {key: value for key, value in self._replaced.items() if key in present}
        self.usage = sorted(found, key=lambda item: (self._offends(item, now), item.share), reverse=True)[:SHOWN]
        if flows.wants_collection():
            self._agent.controllers.trigger("conntrack-gc")

    def _offends(self, item: FlowUsage, now: float) -> bool:
        return now - self._replaced[item.endpoint, item.table][1] < TOLD

    def pod_of(self, endpoint: int) -> str:
        """The name of an endpoint's pod, else its number."""
        found = next((item for item in self._agent.endpoints.endpoints() if item.id == endpoint), None)
        return found.pod if found is not None and found.pod else f"endpoint {endpoint}"

    def status(self) -> tuple[str, str]:
        """State and one line for people."""
        now = time.monotonic()
        text = ", ".join(f"{name} {part:.0%} full" for name, part in self.full.items()) or "not looked at yet"
        offenders = [
            f"{self.pod_of(item.endpoint)} (endpoint {item.endpoint}) used up its share of {item.table}: it has "
            f"{item.entries} flows, {item.share:.0%} of what is its own, and {item.replaced} replaced earlier ones"
            for item in self.usage
            if self._offends(item, now)
        ]
        if offenders:
            return "warning", f"{text}; {'; '.join(offenders)}"
        return "ok", text
