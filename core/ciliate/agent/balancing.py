"""The agent's services: their file, their maps, their objects, their duties, and what is said of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ciliate.agent.reservedports import ReservedPorts
from ciliate.config import AgentConfig, ConfigError, Problem
from ciliate.configvalues import addresses
from ciliate.datapath import nodefilters, socketlb
from ciliate.datapath.lblayout import frontend_of
from ciliate.datapath.loadbalancer import LoadBalancer
from ciliate.datapath.nodeprograms import NodeFeature
from ciliate.datapath.noderoutes import own_address
from ciliate.ports import PortRange, merged, parse_range
from ciliate.service.cluster import ClusterServices
from ciliate.service.manager import EXTERNAL_KINDS, ServiceManager
from ciliate.service.model import Address, Network, Rules
from ciliate.service.objects import Surroundings
from ciliate.service.store import ServiceStore

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

FILE = "services.db"
RETRY_INTERVAL, SYNC_INTERVAL, FLOWS_INTERVAL = 30.0, 600.0, 300.0
PORTS_INTERVAL = 60.0
"""Seconds between looks at the ports that services have; a change of services looks at once."""


def map_sizes(config: AgentConfig) -> dict[str, int]:
    """Entries of the load balancer's maps."""
    services, slots, flows = config.bpf_lb_services_max, config.bpf_lb_slots_max, config.bpf_lb_flows_max
    return {
        "ciliate_lb_services": services,
        "ciliate_lb_reverse": services,
        "ciliate_lb_maglev": services,
        "ciliate_lb_slots": slots,
        "ciliate_lb_members": slots,
        "ciliate_lb_backends": config.bpf_lb_backends_max,
        "ciliate_lb_flow": flows,
        "ciliate_lb_sock": flows,
    }


def external_ranges(config: AgentConfig) -> tuple[Network, ...]:
    """The networks of ``service-external-ranges``; ConfigError where one is none."""
    text = config.service_external_ranges
    try:
        return tuple(ip_network(item.strip()) for item in text.split(",") if item.strip())
    except ValueError as error:
        raise ConfigError([Problem("service-external-ranges", text, f"expected CIDRs: {error}")]) from error


class Balancing:
    """Services of one agent. ``manager`` takes services as such, ``cluster`` as Kubernetes' objects."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        config = agent.config
        self.rules = Rules(tuple(config.pod_ranges), external_ranges(config))
        self._pins, self._state = agent.datapath.pins, Path(config.state_dir)
        self._ports = ReservedPorts(self._state / "reserved-ports.json")

    async def start(self) -> None:
        """Adopt what disk and kernel have. StateFileError where the file cannot be used."""
        store, balancer = ServiceStore(self._state / FILE), LoadBalancer.open(self._pins)
        self.manager = ServiceManager(store, balancer, self._agent.config.loadbalancer_algorithm, self.rules)
        self.cluster = ClusterServices(self.manager, self._around, self._agent.repository.set_services)
        self.manager.on_failure = lambda: self._agent.controllers.trigger("services-retry")
        self.manager.on_external = self._serve_outside
        await self.manager.start()
        await self.cluster.restore()
        self.cgroup = self._cgroup()
        await self._agent.datapath.balance_sockets(self.cgroup)

    async def _serve_outside(self) -> None:
        """A node without services for the outside has no program of them on its devices."""
        names = await asyncio.to_thread(nodefilters.native_devices, self._agent.config.devices)
        constants = await asyncio.to_thread(self._own_addresses)
        feature = NodeFeature("services", "netdev", tuple(names), ("CILIATE_SERVICES",), constants)
        await self._agent.datapath.programs.enable(feature)
        await asyncio.to_thread(nodefilters.accept_own_source, names)

    def _own_addresses(self) -> dict[str, bytes]:
        """By which the node speaks to other nodes' backends for clients outside."""
        config, found = self._agent.config, {}
        for version, text in ((4, config.ipv4_node), (6, config.ipv6_node)):
            address = own_address(version) if text == "auto" else ip_address(text) if text else None
            if address is not None:
                found[f"lb_node_ipv{version}"] = address.packed
        return found

    def _cgroup(self) -> Path | None:
        """Where sockets are met. A node that is a network namespace shares the machine with others, and with their
        processes: it has to be told which are its own."""
        config = self._agent.config
        wanted = config.enable_socket_lb
        if wanted == "false" or (wanted == "auto" and not config.cgroup_root and not socketlb.in_initial_netns()):
            return None
        found = Path(config.cgroup_root) if config.cgroup_root else socketlb.cgroup2_mount()
        if found is None and wanted == "true":
            raise ConfigError([Problem("cgroup-root", "", "expected a mounted cgroup2, as enable-socket-lb is true")])
        return found

    async def stop(self) -> None:
        """Close; packets go on as before."""
        await self.manager.stop()

    def start_duties(self) -> None:
        """What has to be done again and again."""
        run = self._agent.controllers.run
        run("services-retry", self.manager.retry, RETRY_INTERVAL)
        run("services-sync", self.manager.sync, SYNC_INTERVAL)
        run("service-flows", self._collect, FLOWS_INTERVAL)
        run("service-ports", self._reserve_ports, PORTS_INTERVAL)
        self.manager.on_ports = self._ports_changed

    async def _collect(self) -> None:
        await self.manager.collect_flows(int(time.monotonic()))

    def _ports_changed(self) -> None:
        for duty in ("service-ports", "masquerade"):
            self._agent.controllers.trigger(duty)

    async def _reserve_ports(self) -> None:
        await self._ports.sync(self.reserved_ports())

    def reserved_ports(self) -> tuple[PortRange, ...]:
        """Ports of the node's own addresses that are services', or may become so: nothing else may have them."""
        config = self._agent.config
        given = parse_range(config.node_port_range)
        own = {*self._node_addresses(), *addresses(config.snat_addresses)}
        fronts = (
            frontend_of(record.frontend + b"\0")
            for record in self.manager.table.records.values()
            if record.kind in EXTERNAL_KINDS
        )
        return merged([*([given] if given else []), *((port, port) for address, port, _ in fronts if address in own)])

    def _around(self) -> Surroundings:
        return Surroundings(self._node_addresses(), self._agent.config.node_name, self.rules)

    def _node_addresses(self) -> tuple[Address, ...]:
        """Where node ports are reached: never a loopback address, where nobody else may come (CVE-2020-8558)."""
        found = {prefix.network_address for prefix in self._agent.node_prefixes}
        return tuple(
            address
            for address in sorted(found, key=str)
            if not (address.is_loopback or address.is_link_local or any(address in item for item in self.rules.pods))
        )

    def status(self) -> tuple[str, str, str]:
        """State, one line for people, and what to do."""
        manager = self.manager
        table = manager.table
        empty = sum(1 for record in table.records.values() if not record.backends)
        algorithm = self._agent.config.loadbalancer_algorithm
        text = f"{len(table.records)} services, {len(table.backends)} backends, {algorithm}"
        text += f", {empty} without backends" if empty else ""
        text += f", sockets of {self.cgroup}" if self.cgroup else ", packets only"
        if left := self.cluster.objects.left_out():
            text += f"; of the objects {len(left)} make no backend: {left[0]}"
        if manager.behind:
            return (
                "failure",
                f"{text}; the kernel is behind: {manager.behind}",
                "is retried by itself; the log says more",
            )
        if self.cluster.refused:
            first = next(iter(self.cluster.refused.values()))
            return "warning", f"{text}; {len(self.cluster.refused)} frontends refused: {first}", "give one another port"
        return "ok", text, ""

    def describe(self, number: int) -> dict[str, Any]:
        """A service as the API shows it."""
        import msgspec

        spec: dict[str, Any] = msgspec.to_builtins(self.manager.spec(number))
        record = self.manager.table.get(number)
        realized = "" if self.manager.behind else "ready"
        return {"spec": spec, "status": {"source": record.source, "state": realized or "behind"}}

    def metrics(self) -> Iterator[Metric]:
        """Counts of services, backends and changes."""
        table = self.manager.table
        events = CounterMetricFamily("ciliate_services_events", "Changes of services", labels=["action"])
        for action in ("add", "update", "delete"):
            events.add_metric([action], self.manager.events[action])
        yield events
        yield GaugeMetricFamily("ciliate_services_count", "Services", value=len(table.records))
        yield GaugeMetricFamily("ciliate_services_backends", "Backends", value=len(table.backends))
