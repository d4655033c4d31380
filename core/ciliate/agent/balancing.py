"""The agent's services: their file, their maps, their objects, their duties, and what is said of them."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Iterator, Sequence
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

log = logging.getLogger(__name__)
FILE = "services.db"
RETRY_INTERVAL, SYNC_INTERVAL, FLOWS_INTERVAL = 30.0, 600.0, 30.0
PORTS_INTERVAL = 60.0
"""Seconds between looks at the ports that services have; a change of services looks at once."""
FIRST_LENT, FEWEST_LENT = 1024, 4096
SHARE_WARNING = 0.9


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


def own_ports() -> tuple[int, int]:
    """The first and the last port that the kernel gives to the node's own connections."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(first), int(last)


def lent_ports(taken: Sequence[PortRange]) -> tuple[int, int]:
    """The first and how many of the ports by which the node speaks to others for clients outside: the longest run free
    of those ``taken``. Where none is long, all: a connection of the node's own then ends a client's that has its port.
    """
    runs, first = [], FIRST_LENT
    for low, high in [*sorted(taken), (65536, 65536)]:
        runs.append((low - first, first))
        first = max(first, high + 1)
    count, start = max(runs, key=lambda run: (run[0], -run[1]))
    return (start, count) if count >= FEWEST_LENT else (FIRST_LENT, 65536 - FIRST_LENT)


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
        self.share = 0
        """How many of the node's ports one client outside may have; 0 while no program serves the outside."""

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
        datapath = self._agent.datapath
        names = await asyncio.to_thread(nodefilters.native_devices, self._agent.config.devices)
        constants = await asyncio.to_thread(self._constants)
        served = ("CILIATE_SERVICES",)
        features = [NodeFeature("services", "netdev", tuple(names), served, constants)]
        tunnel, router = datapath.config.tunnel, datapath.config.router_device[0]
        if tunnel is not None:
            # answers of other nodes' backends come by the tunnel, and what clients ask them goes there
            features.insert(0, NodeFeature("services-overlay", "overlay", (tunnel.device,), served))
            features.insert(0, NodeFeature("services-host", "host", (router,), served))
        for feature in features:
            await datapath.programs.enable(feature)
        for name in await asyncio.to_thread(nodefilters.refuse_own_source, names):
            log.warning("device %s: accept_local was on; it is off, as nothing needs it any more", name)

    def _constants(self) -> dict[str, bytes]:
        node_ports = parse_range(self._agent.config.node_port_range)
        first, count = lent_ports([own_ports(), *([node_ports] if node_ports else [])])
        share = max(1, count * self._agent.config.bpf_lb_client_share // 100)
        numbers = {"lb_first_port": first, "lb_ports": count, "lb_client_share": share}
        self.share = share
        return self._own_addresses() | {name: struct.pack("=I", number) for name, number in numbers.items()}

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
        lent, worst = manager.shares, self._offenders()
        text += f", {lent.held} ports lent to clients outside" if lent.held else ""
        if manager.behind:
            return (
                "failure",
                f"{text}; the kernel is behind: {manager.behind}",
                "is retried by itself; the log says more",
            )
        if self.cluster.refused:
            first = next(iter(self.cluster.refused.values()))
            return "warning", f"{text}; {len(self.cluster.refused)} frontends refused: {first}", "give one another port"
        if worst:
            said = ", ".join(f"{client} has {share:.0%} of a client's share" for client, share in worst)
            hint = "is he who you think? then raise bpf-lb-client-share"
            return "warning", f"{text}; {said} and gets no more", hint
        return "ok", text, ""

    def _shares(self) -> Iterator[tuple[str, float]]:
        """The clients outside that have most of the node's ports, with the part that they have of their share."""
        for client, held, _ in self.manager.shares.most:
            yield str(client), held / self.share if self.share else 0.0

    def _offenders(self) -> list[tuple[str, float]]:
        return [(client, share) for client, share in self._shares() if share >= SHARE_WARNING]

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
        lent = "Ports of the node lent to clients outside for flows to backends of other nodes"
        yield GaugeMetricFamily("ciliate_services_client_ports", lent, value=self.manager.shares.held)
        most = "Part of his share of these ports that a client outside has; of the clients with most"
        shares = GaugeMetricFamily("ciliate_services_client_share", most, labels=["client"])
        for client, share in self._shares():
            shares.add_metric([client], share)
        yield shares
