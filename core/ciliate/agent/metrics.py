"""Prometheus metrics (names as in inventory section 4.4, with our prefix): the agent's own and those of plugins."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ciliate.agent.counting import API_TIME, LogCounter
from ciliate.agent.shares import policy_shares
from ciliate.datapath.reasons import DIRECTIONS, reason_text
from ciliate.exposition import MeasuredCollector, family
from ciliate.kvstore.metrics import OPERATIONS
from ciliate.listeners import REFUSED, Listener
from ciliate.measure import MEASURED

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint

Totals = dict[tuple[int, int], tuple[int, int]]

log = logging.getLogger(__name__)


class AgentCollector(Collector):
    """Reads the agent's state when somebody asks. ``totals`` are the datapath's counters as last read."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.totals: Totals = {}
        self.log = LogCounter()

    def collect(self) -> Iterator[Metric]:
        """Every metric of the agent."""
        yield from self._packets()
        yield from self._endpoints()
        yield from self._policy()
        yield from self._duties()
        yield from self._agent.balancing.metrics()
        yield from self._masquerade()
        yield from self._conntrack()
        yield from self._cluster()
        yield from self._health()
        yield _by_label(GaugeMetricFamily, "ip_addresses", "Addresses in use", "family", self._families())
        resting = Counter({f"ipv{version}": 0 for version in (4, 6)})
        resting.update(f"ipv{address.version}" for address in self._agent.resting.resting)
        yield _by_label(GaugeMetricFamily, "ipam_resting_addresses", "Addresses that rest", "family", resting)
        yield _by_label(GaugeMetricFamily, "identity_count", "Identities", "scope", self._identities())

    def _packets(self) -> Iterator[Metric]:
        drops = CounterMetricFamily("ciliate_drop_count", "Packets dropped", labels=["reason", "direction"])
        drop_bytes = CounterMetricFamily("ciliate_drop_bytes", "Bytes dropped", labels=["reason", "direction"])
        passed = CounterMetricFamily("ciliate_forward_count", "Packets forwarded", labels=["direction"])
        passed_bytes = CounterMetricFamily("ciliate_forward_bytes", "Bytes forwarded", labels=["direction"])
        for (reason, number), (packets, size) in self.totals.items():
            direction = DIRECTIONS[number]
            labels = [direction] if reason == 0 else [reason_text(reason), direction]
            (drops if reason else passed).add_metric(labels, packets)
            (drop_bytes if reason else passed_bytes).add_metric(labels, size)
        yield from (drops, drop_bytes, passed, passed_bytes)

    def _endpoints(self) -> Iterator[Metric]:
        endpoints = self._agent.endpoints.endpoints()
        yield GaugeMetricFamily("ciliate_endpoint_count", "Endpoints of this node", value=len(endpoints))
        states = Counter(str(endpoint.state) for endpoint in endpoints)
        yield _by_label(GaugeMetricFamily, "endpoint_state", "Endpoints by state", "endpoint_state", states)
        built = self._agent.endpoints.regenerations
        yield _by_label(CounterMetricFamily, "endpoint_regenerations", "Endpoints written anew", "outcome", built)
        queued = GaugeMetricFamily("ciliate_buildqueue_entries", "Events in queues", labels=["state", "name"])
        for state, count in self._agent.endpoints.events().items():
            queued.add_metric([state, "endpoint"], count)
        yield queued
        enforced = Counter(_enforcement(endpoint) for endpoint in endpoints)
        text = "Endpoints by the directions in which policy is enforced"
        yield _by_label(GaugeMetricFamily, "policy_endpoint_enforcement_status", text, "enforcement", enforced)

    def _policy(self) -> Iterator[Metric]:
        repository = self._agent.repository
        yield GaugeMetricFamily("ciliate_policy_count", "Policy objects in force", value=len(repository.objects()))
        yield GaugeMetricFamily("ciliate_policy_max_revision", "Policy revision", value=repository.revision)
        built = repository.counters.policies_rebuilt
        yield CounterMetricFamily("ciliate_policy_regeneration", "Policies that were worked out anew", value=built)
        taken = GaugeMetricFamily("ciliate_policy_usage", "What namespaces take", labels=["namespace", "resource"])
        shares = GaugeMetricFamily(
            "ciliate_policy_share", "Of what a namespace may take, 0 to 1", labels=["namespace", "resource"]
        )
        for item in policy_shares(repository, self._agent.realizer):
            for name, count, most in (
                ("prefixes", item.prefixes, item.most_prefixes),
                ("entries", item.entries, item.most_entries),
            ):
                taken.add_metric([item.namespace, name], count)
                shares.add_metric([item.namespace, name], count / most)
        yield from (taken, shares)
        refused = len(set(repository.shares.refused.values()))
        yield GaugeMetricFamily("ciliate_policy_refused", "Policy objects that take too much", value=refused)
        errors = self._agent.policies.import_errors
        yield CounterMetricFamily("ciliate_policy_import_errors", "Imports of policies that were refused", value=errors)

    def _masquerade(self) -> Iterator[Metric]:
        masquerading = self._agent.masquerading
        text = "How full the table of masqueraded flows is, 0 to 1"
        yield GaugeMetricFamily("ciliate_masquerade_pressure", text, value=masquerading.pressure)
        yield _by_label(GaugeMetricFamily, "masquerade_flows", "Masqueraded flows", "engine", masquerading.served)
        labels = ["pod", "address"]
        shares = GaugeMetricFamily("ciliate_masquerade_pod_share", "Part of its share that a pod has", labels=labels)
        refused = CounterMetricFamily(
            "ciliate_masquerade_pod_refused", "New flows of a pod beyond its share", labels=labels
        )
        for item in masquerading.usage:
            values = [masquerading.pod_of(item.source), str(item.source)]
            shares.add_metric(values, item.share)
            refused.add_metric(values, item.refused)
        yield from (shares, refused)

    def _conntrack(self) -> Iterator[Metric]:
        flows, labels = self._agent.flow_shares, ["pod", "endpoint", "table"]
        text = "How full a table of flows is, 0 to 1; dead ones count until they are collected"
        yield _by_label(GaugeMetricFamily, "conntrack_pressure", text, "table", flows.full)
        text = "Part of its share of a table of flows that a pod has"
        shares = GaugeMetricFamily("ciliate_conntrack_pod_share", text, labels=labels)
        text = "New flows of a pod that took the place of one of its own, as its share was used up"
        replaced = CounterMetricFamily("ciliate_conntrack_pod_replaced", text, labels=labels)
        for item in flows.usage:
            values = [flows.pod_of(item.endpoint), str(item.endpoint), item.table]
            shares.add_metric(values, item.share)
            replaced.add_metric(values, item.replaced)
        yield from (shares, replaced)

    def _duties(self) -> Iterator[Metric]:
        controllers = self._agent.controllers
        runs, text = controllers.runs(), "Runs of background duties"
        yield _by_label(CounterMetricFamily, "controllers_runs", text, "status", runs)
        failing = len(controllers.failing())
        yield GaugeMetricFamily("ciliate_controllers_failing", "Duties whose last run failed", value=failing)
        yield from self._triggers()
        told = CounterMetricFamily("ciliate_errors_warnings", "Lines of the log", labels=["level", "subsystem"])
        for (level, subsystem), count in self.log.counts.items():
            told.add_metric([level, subsystem], count)
        yield told

    def _triggers(self) -> Iterator[Metric]:
        """How often policy was to be realised at once, and how often several such wishes became one run."""
        asked, name = self._agent.controllers.triggered["realize"], "ciliate_triggers_policy_update"
        yield CounterMetricFamily(name, "Wishes that policy be realised now", value=asked.total)
        yield GaugeMetricFamily(f"{name}_folds", "Of them, those that were one with an earlier one", value=asked.folds)
        yield family(asked.times, f"{name}_call_duration_seconds")

    def _cluster(self) -> Iterator[Metric]:
        membership = self._agent.membership
        count = len(membership.registry.others) + 1
        yield GaugeMetricFamily("ciliate_nodes_all_num", "Nodes of the cluster that this one knows", value=count)
        pods = len(membership.addresses.shared.items)
        yield GaugeMetricFamily("ciliate_cluster_addresses", "Addresses of pods of all nodes", value=pods)
        failing = len(membership.peers.errors)
        yield GaugeMetricFamily("ciliate_nodes_without_route", "Nodes that the kernel has no way to", value=failing)

    def _health(self) -> Iterator[Metric]:
        health = self._agent.health
        nodes, endpoints = len(health.unreachable("node")), len(health.unreachable("endpoint"))
        yield GaugeMetricFamily("ciliate_unreachable_nodes", "Nodes that do not answer probes", value=nodes)
        text = "Nodes whose health endpoint does not answer probes"
        yield GaugeMetricFamily("ciliate_unreachable_health_endpoints", text, value=endpoints)

    def _families(self) -> Counter[str]:
        return Counter(f"ipv{address.version}" for address in self._agent.ipam.owners())

    def _identities(self) -> dict[str, int]:
        backend = self._agent.backend
        assigned, local = len(backend.assigned), len(self._agent.local.identities())
        return {"cluster": len(backend.identities()) - assigned, "assigned": assigned, "local": local}


def _enforcement(endpoint: Endpoint) -> str:
    both = {(True, True): "both", (True, False): "ingress", (False, True): "egress"}
    return both.get((endpoint.enforce_ingress, endpoint.enforce_egress), "none")


def _by_label(
    family: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    metric = family(f"ciliate_{name}", text, labels=[label])
    for value, count in values.items():
        metric.add_metric([value], count)
    return metric


class OfPlugin(Collector):
    """A plugin's collector; where it fails, the others' metrics are told without its."""

    def __init__(self, name: str, collector: Collector) -> None:
        self._name, self._collector = name, collector
        self._failed = False

    def describe(self) -> list[Metric]:
        """Nothing, so that nothing of it is asked while the agent starts."""
        return []

    def collect(self) -> list[Metric]:
        """What it collects; empty, and once in the log, where it fails."""
        try:
            found = list(self._collector.collect())
            generate_latest(_Given(found))
        except Exception as error:  # a plugin may raise anything
            if not self._failed:
                log.error("metrics of plugin provider %s: %s: %s", self._name, type(error).__name__, error)
            self._failed = True
            return []
        self._failed = False
        return found


class _Given(CollectorRegistry):
    """A registry of metrics that are there already: to see whether they can be written."""

    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        """Those."""
        return self._metrics


class Metrics:
    """The registry, and the optional TCP listener of ``prometheus-serve-addr``."""

    def __init__(self, agent: Agent, plugins: Mapping[str, Collector]) -> None:
        self._agent = agent
        self._own = AgentCollector(agent)
        self._registry = CollectorRegistry()
        self._registry.register(self._own)
        self._registry.register(MeasuredCollector([*MEASURED, REFUSED]))
        self._registry.register(OPERATIONS)
        self._registry.register(API_TIME)
        logging.getLogger().addHandler(self._own.log)
        ProcessCollector(registry=self._registry)
        for name, collector in plugins.items():
            self._registry.register(OfPlugin(name, collector))
        self._listener: Listener | None = None
        self._read = 0.0

    async def text(self) -> bytes:
        """The exposition format."""
        await self._refresh()
        return generate_latest(self._registry)

    async def samples(self) -> list[dict[str, Any]]:
        """Every sample as name, labels and value."""
        await self._refresh()
        return [
            {"name": sample.name, "labels": dict(sample.labels), "value": sample.value}
            for metric in self._registry.collect()
            for sample in metric.samples
        ]

    async def _refresh(self) -> None:
        if time.monotonic() - self._read > 1.0:
            self._own.totals = await self._agent.datapath.metrics()
            self._read = time.monotonic()

    async def handle(self, request: web.Request) -> web.Response:
        """Answer a scrape."""
        return web.Response(body=await self.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def start(self, address: str) -> None:
        """Listen on ``address:port`` where that is given. OSError where there is no such address.

        Any process of the node can take the port: that shows in the status and is tried again (``ensure``).
        """
        if address:
            self._listener = Listener("prometheus-serve-addr", address, {"/metrics": self.handle})
            await self._listener.ensure()

    async def ensure(self) -> None:
        """A duty: listen where that was not possible before."""
        if self._listener is not None:
            await self._listener.ensure()

    def status(self) -> tuple[str, str]:
        """State and one line for people."""
        if self._listener is None:
            return "ok", "told by the API alone: prometheus-serve-addr is empty"
        if self._listener.problem:
            return "warning", self._listener.problem
        return "ok", f"served at {self._listener.address}"

    async def stop(self) -> None:
        """Stop listening and counting."""
        logging.getLogger().removeHandler(self._own.log)
        if self._listener is not None:
            await self._listener.stop()
