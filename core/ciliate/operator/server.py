"""What the operator tells over HTTP: `/healthz` (200 or 503, with a line of text) and `/metrics`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ciliate import tasks
from ciliate.backoff import pause, spread
from ciliate.exposition import MeasuredCollector
from ciliate.kvstore import StoreStatus
from ciliate.kvstore.metrics import OPERATIONS
from ciliate.listeners import REFUSED, Listener
from ciliate.measure import CONTROLLER_TIME

if TYPE_CHECKING:
    from ciliate.operator.main import Operator

AGAIN = 5.0
"""Seconds between attempts to have a port that somebody took."""
FRESH = 5.0
"""Seconds for which an answer of the store counts: many may ask for our health."""


class _Figures(Collector):
    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def collect(self) -> Iterator[Metric]:
        operator = self._operator
        leads = int(operator.leads.is_set())
        yield GaugeMetricFamily("ciliate_operator_leader", "Whether this instance does the duties", value=leads)
        text = "Identities removed because no node used them"
        yield CounterMetricFamily("ciliate_operator_identities_removed", text, value=operator.collected)
        text = "Keys of dead nodes removed"
        yield CounterMetricFamily("ciliate_operator_leftovers_removed", text, value=operator.leftovers.removed)
        yield GaugeMetricFamily("ciliate_operator_nodes", "Registered nodes", value=operator.leftovers.nodes)
        runs = CounterMetricFamily("ciliate_controllers_runs", "Runs of background duties", labels=["status"])
        for status, count in operator.controllers.runs().items():
            runs.add_metric([status], count)
        yield runs
        failing = len(operator.controllers.failing())
        yield GaugeMetricFamily("ciliate_controllers_failing", "Duties whose last run failed", value=failing)


class OperatorServer:
    """The listener of ``operator-api-serve-addr``."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self._registry = CollectorRegistry()
        self._registry.register(_Figures(operator))
        self._registry.register(MeasuredCollector([CONTROLLER_TIME, REFUSED]))
        self._registry.register(OPERATIONS)
        ProcessCollector(registry=self._registry)
        self._listener: Listener | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._status = StoreStatus(False, "not asked yet")
        self._asked = float("-inf")

    async def start(self, address: str) -> None:
        """Listen on ``address:port``. OSError that names the option where there is no such address; where somebody has
        the port it is tried again every few seconds: whoever took it keeps no cluster from its duties."""
        self._listener = Listener(
            "operator-api-serve-addr", address, {"/healthz": self._healthz, "/metrics": self._metrics}
        )
        await self._listener.ensure()
        self._waiting = tasks.start(self._wait_for_port(self._listener), "operator-listener")

    async def _wait_for_port(self, listener: Listener) -> None:
        while listener.problem:
            await pause(spread(AGAIN))
            await listener.ensure()

    @property
    def port(self) -> int:
        """Where it listens; 0 where it does not."""
        return self._listener.port if self._listener is not None else 0

    async def stop(self) -> None:
        """Stop listening."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.gather(self._waiting, return_exceptions=True)
        if self._listener is not None:
            await self._listener.stop()

    async def _healthz(self, request: web.Request) -> web.Response:
        if time.monotonic() - self._asked > FRESH:
            self._status = await self._operator.store.status()
            self._asked = time.monotonic()
        role = "leading" if self._operator.leads.is_set() else "waiting for the lead"
        return web.Response(text=f"{role}; {self._status.message}\n", status=200 if self._status.ok else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
