"""What the operator tells over HTTP: `/healthz` (200 or 503, with a line of text) and `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ciliate.exposition import MeasuredCollector
from ciliate.kvstore import StoreStatus
from ciliate.kvstore.metrics import OPERATIONS
from ciliate.measure import CONTROLLER_TIME

if TYPE_CHECKING:
    from ciliate.operator.main import Operator

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
        self._registry.register(MeasuredCollector([CONTROLLER_TIME]))
        self._registry.register(OPERATIONS)
        ProcessCollector(registry=self._registry)
        self._runner: web.AppRunner | None = None
        self._status = StoreStatus(False, "not asked yet")
        self._asked = float("-inf")
        self.port = 0

    async def start(self, address: str) -> None:
        """Listen on ``address:port``; OSError that names the option where that is taken."""
        host, _, port = address.rpartition(":")
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host.strip("[]") or None, int(port)).start()
        except OSError as error:
            text = (
                f"operator-api-serve-addr {address}: cannot listen there: {error.strerror}; choose another or free it"
            )
            raise OSError(error.errno, text) from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        if time.monotonic() - self._asked > FRESH:
            self._status = await self._operator.store.status()
            self._asked = time.monotonic()
        role = "leading" if self._operator.leads.is_set() else "waiting for the lead"
        return web.Response(text=f"{role}; {self._status.message}\n", status=200 if self._status.ok else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
