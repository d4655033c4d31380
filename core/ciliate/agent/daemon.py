"""The agent's composition root: makes the parts, starts them in order, stops them in reverse.

Order: lock, plugins, store, identities, addresses, datapath, state from disk, API, CNI. The datapath is never taken
down when the agent stops: programs and maps stay pinned and go on enforcing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

from ciliate import wire
from ciliate.agent import flowshares, masquerading, membership, sockets, stateguard
from ciliate.agent.api.server import ApiServer
from ciliate.agent.balancing import Balancing, map_sizes
from ciliate.agent.describe import Describer
from ciliate.agent.flowshares import FlowShares
from ciliate.agent.lock import AgentLock
from ciliate.agent.macs import Macs
from ciliate.agent.masquerading import Masquerading
from ciliate.agent.membership import NOT_ASKED, Membership
from ciliate.agent.metrics import Metrics
from ciliate.agent.monitor import Monitor
from ciliate.agent.policy_service import PolicyService
from ciliate.agent.recovery import Recovery, remove_temporary_files
from ciliate.agent.routing import node_mtu, tunnel_config
from ciliate.agent.stateguard import StateGuard
from ciliate.agent.status import agent_status
from ciliate.agent.switching import Switching
from ciliate.agent.upkeep import Upkeep
from ciliate.backoff import ClusterSize
from ciliate.cni.server import CniServer
from ciliate.config import AgentConfig, changed
from ciliate.controller import Controllers
from ciliate.daemonize import set_log_level
from ciliate.datapath import Datapath, DatapathConfig, devices, nodefilters
from ciliate.datapath.events import EventReader
from ciliate.datapath.nodeprograms import NodePrograms
from ciliate.datapath.tunnel import TunnelConfig
from ciliate.directories import make_directory
from ciliate.endpoint.manager import EndpointManager
from ciliate.endpoint.model import Endpoint
from ciliate.endpoint.realize import Realizer
from ciliate.endpoint.store import EndpointStore
from ciliate.health.checks import HealthChecks
from ciliate.identity import HOST, Identity, is_local, is_reserved, reserved_identity
from ciliate.identity.backend import IdentityBackend
from ciliate.identity.filter import LabelFilter, read_prefixes
from ciliate.identity.fixed import FixedIdentities, parse_mapping
from ciliate.identity.local import LocalIdentities
from ciliate.identity.wellknown import Assigned, well_known
from ciliate.ipam import Ipam
from ciliate.ipam.counting import CountingIpam
from ciliate.ipam.node import reserve_node
from ciliate.ipam.resting import RestingIpam
from ciliate.ipcache import Ipcache, Source
from ciliate.kvstore import Kvstore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.measure import bootstrap
from ciliate.mtu import NodeMtu
from ciliate.plugin import Handle, Hooks, PluginContext, PluginManager
from ciliate.policy.repository import PolicySettings, Repository
from ciliate.redaction import hide_secrets
from ciliate.service.cluster import ClusterServices
from ciliate.service.manager import ServiceManager
from ciliate.services import Services
from ciliate.statefile import StateFile
from ciliate.workload import WorkloadRegistry

log = logging.getLogger(__name__)
RESYNC_INTERVAL = 60.0
"""Seconds between comparisons of intent and kernel (inventory 4.12 F7: policy map sync 1 min)."""
CONNTRACK_GC_INTERVAL = 900.0
STORE_INTERVAL = 30.0
STORE_RETRY = 5.0
"""Seconds between looks at the store, and while it is away (inventory 4.12 F5)."""
MUTABLE = ("enable_policy", "monitor_aggregation", "debug")
"""Options that may change while the agent runs."""


class Agent:
    """One node's agent. ``start`` returns when the API and CNI answer; ``stop`` leaves traffic as it is."""

    def __init__(self, config: AgentConfig, plugins: PluginManager) -> None:
        self.config = config
        self.plugins = plugins
        self.hooks = Hooks(plugins)
        self.handles: dict[type[Any], Handle] = {}
        self.switching = Switching(self)
        self.services = Services()
        self.cluster = ClusterSize()
        self.services.add(ClusterSize, self.cluster)
        self.mtu = NodeMtu()
        self.services.add(NodeMtu, self.mtu)
        self.controllers = Controllers(self.cluster)
        self.stopping = asyncio.Event()
        self.workloads = WorkloadRegistry(config.cluster_name)
        self.repository = Repository(_policy_settings(config))
        self.ipcache = Ipcache()
        self.local = LocalIdentities()
        self.fixed = FixedIdentities(parse_mapping(config.fixed_identity_mapping), config.cluster_name)
        self.store_status = NOT_ASKED
        self._state = Path(config.state_dir)
        self._run = Path(config.run_dir)
        self._lock = AgentLock(self._state)
        self.workload_file = StateFile(self._state / "workloads.json")
        self.node_prefixes: set[Any] = set()
        self._publishing = asyncio.Lock()
        self._served_prefixes: set[Any] = set()
        self._delivered: set[Any] = set()
        self._groups: set[Any] = set()
        self._revised = asyncio.Condition()
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Bring every part up; raises what the failing part raises, with what was started stopped again."""
        try:
            with bootstrap("overall"):
                await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        make_directory(self._state, "state-dir", 0o750)
        make_directory(self._run, "run-dir", 0o755)
        self._lock.acquire()
        self._stack.callback(self._lock.release)
        await asyncio.to_thread(remove_temporary_files, self._state)
        self._stack.push_async_callback(self.plugins.stop)
        with bootstrap("kvstore"):
            self.kvstore: Kvstore = await self._provider("kvstore", self.config.kvstore, Kvstore)
            await self._start_local_keys()
        mode = self.config.identity_allocation_mode
        with bootstrap("identity"):
            self.backend: Assigned = await self._provider("identity", mode, IdentityBackend, self._with_assigned)
        with bootstrap("ipam"):
            self.resting: RestingIpam = await self._provider("ipam", self.config.ipam, Ipam, _with_rest)
            self.ipam: Ipam = cast(Ipam, self.resting)
        with bootstrap("bpfBase"):
            await self._start_datapath()
        await self._start_services()
        self._make_endpoints()
        self.membership = await Membership.of(self)
        self._stack.push_async_callback(self.membership.stop)
        self.health = HealthChecks(self)
        self._stack.push_async_callback(self.health.close)
        with bootstrap("restore"):
            await self._restore()
        await self.masquerading.start()
        self.endpoints.before_use = self.masquerading.before_use
        self.datapath.programs.uplinks = lambda: nodefilters.native_devices(self.config.devices)
        await self.datapath.programs.start()
        if await self.datapath.switch():
            await self.masquerading.renew()
        with bootstrap("initAPI"):
            await self._serve()
        self._start_duties()
        self.hooks.agent_started(self.config.node_name)

    async def _start_local_keys(self) -> None:
        """What this node has in the store goes with one lease, and is written again after any loss."""
        config = self.config
        self.local_keys = LocalKeys(
            self.kvstore,
            ttl=config.kvstore_lease_ttl,
            sync_interval=config.kvstore_periodic_sync,
            cluster=self.cluster,
            state=self._state / "kvstore-lease.json",
        )
        self._stack.push_async_callback(self.local_keys.stop)
        await self.local_keys.start()
        self.services.add(LocalKeys, self.local_keys)

    async def _provider(
        self, kind: str, name: str, service: type[Any], facade: Callable[[Any], Any] = lambda handle: handle
    ) -> Any:
        handle = Handle(await self.plugins.start(kind, name, self.context()))
        self.handles[service] = handle
        offered = facade(handle)
        self.services.add(service, offered)
        return offered

    def _with_assigned(self, backend: IdentityBackend) -> Assigned:
        known = well_known(self.config.cluster_name, self.config.k8s_namespace)
        return Assigned(backend, [*known, *self.fixed.identities()])

    def context(self) -> PluginContext:
        """What this agent's providers are made with."""
        return PluginContext(self.config, None, self._state, self._run, self.services)

    async def _start_datapath(self) -> None:
        self.features = await self._all("feature")
        loader = await self.plugins.start("loader", self.config.datapath_loader, self.context())
        tunnel = await asyncio.to_thread(tunnel_config, self.config)
        self.mtu.current = await asyncio.to_thread(node_mtu, self.config)
        self.datapath = Datapath(self._datapath_config(tunnel), loader)
        self._stack.push_async_callback(self.datapath.stop)
        await self.datapath.start()
        self.services.add(Datapath, self.datapath)
        self.services.add(NodePrograms, self.datapath.programs)

    def _datapath_config(self, tunnel: TunnelConfig | None) -> DatapathConfig:
        config, router = self.config, self.ipam.router
        return DatapathConfig(
            instance=config.instance,
            bpf_root=Path(config.bpf_root),
            state_dir=self._state,
            enable_ipv4=config.enable_ipv4,
            enable_ipv6=config.enable_ipv6,
            router4=router.ipv4,
            router6=router.ipv6,
            ct_tcp_max=config.bpf_ct_global_tcp_max,
            ct_any_max=config.bpf_ct_global_any_max,
            monitor=config.monitor_aggregation,
            debug=config.datapath_debug,
            features=tuple(self.features.values()),
            build=config.datapath_build,
            sizes={**map_sizes(config), "ciliate_snat": config.bpf_snat_max},
            node_routes=config.tunnel == "disabled" and config.auto_direct_node_routes,
            tunnel=tunnel,
        )

    async def _start_services(self) -> None:
        self.balancing = Balancing(self)
        await self.balancing.start()
        self._stack.push_async_callback(self.balancing.stop)
        self.services.add(ServiceManager, self.balancing.manager)
        self.services.add(ClusterServices, self.balancing.cluster)

    def _make_endpoints(self) -> None:
        self.realizer = Realizer(self.datapath, self.repository, self.ipcache, self.local, self._state)
        records = EndpointStore(self._state / "endpoints")
        self.state = StateGuard(self, self._state, self._lock, records)
        self.realizer.monitor_level = self.config.monitor_aggregation
        self.endpoints = EndpointManager(
            realizer=self.realizer,
            repository=self.repository,
            backend=self.backend,
            ipcache=self.ipcache,
            workloads=self.workloads,
            label_filter=LabelFilter(self.config.labels, self.fixed, read_prefixes(self.config.label_prefix_file)),
            store=records,
            grace_period=self.config.identity_change_grace_period,
        )
        self._stack.push_async_callback(self.endpoints.stop)
        self.policies = PolicyService(self.repository, self.realizer, self._state)
        self.masquerading = Masquerading(self)
        self.services.add(EndpointManager, self.endpoints)
        self.services.add(WorkloadRegistry, self.workloads)
        self.endpoints.on_created = self._endpoint_created
        self.endpoints.on_deleted = self._endpoint_deleted
        self.endpoints.before_external = self._publish_node
        self.policies.on_change = self._policy_changed
        self.realizer.on_failure = lambda: self.controllers.trigger("policy-retry")

    async def _restore(self) -> None:
        """Bring back what the last run knew, in an order in which no endpoint ever sees less policy than before."""
        recovery = Recovery(self._state, self.datapath, self.backend, self.ipam)
        self.realizer.restore(await recovery.prefix_identities(self.realizer.numbers))
        data = await asyncio.to_thread(self.workload_file.read)
        if isinstance(data, dict):
            self.workloads.restore(data)
        count = self.policies.restore()
        for text in self.policies.unread():
            log.warning("a stored policy is in force as far as it can be read: %s", text)
        self.repository.upsert_identities(self.backend.identities().values())
        await self._publish_node()
        await recovery.mend_records()
        present = await asyncio.to_thread(devices.list_devices)
        await self.endpoints.restore(present)
        await self.health.prepare()
        await recovery.clean(self.endpoints.endpoints())
        await self.membership.start()
        await self.realizer.resync()
        log.info("restored %d endpoints and %d policies", len(self.endpoints.endpoints()), count)

    async def _publish_node(self) -> None:
        """Whatever the node takes for itself stands for the host identity."""
        async with self._publishing:  # a look that is overtaken by a later one must not undo it
            await self._publish_prefixes()
            await self._publish_groups()

    async def _publish_prefixes(self) -> None:
        delivered = await asyncio.to_thread(devices.delivered_prefixes)
        for prefix in self._delivered - delivered:
            self.ipcache.delete(prefix, Source.LOCAL)
        for prefix in delivered - self._delivered:
            self.ipcache.upsert(prefix, HOST, Source.LOCAL)
        self._delivered = delivered
        prefixes = set(await asyncio.to_thread(devices.node_prefixes))
        if prefixes != self.node_prefixes:
            await reserve_node(self.ipam, self.config.pod_ranges, [prefix.network_address for prefix in prefixes])
        self.node_prefixes = prefixes

    async def _publish_groups(self) -> None:
        """What a pod sends to everybody the node takes: it is for the host. A rule for that prefix comes before."""
        groups = set(await asyncio.to_thread(devices.group_prefixes))
        for prefix in self._groups - groups:
            self.ipcache.delete(prefix, Source.GROUP)
        for prefix in groups - self._groups:
            self.ipcache.upsert(prefix, HOST, Source.GROUP)
        self._groups = groups

    async def _serve(self) -> None:
        config = self.config
        reader = EventReader(self.datapath.events_path)
        self.monitor = Monitor(reader, Describer(self.endpoints, self.identity, self.repository))
        self.monitor.start()
        self._stack.callback(self.monitor.stop)
        modes = await self._all("chaining")
        resync = lambda: self.controllers.trigger("resync")  # noqa: E731
        self.flow_shares = FlowShares(self)
        self.upkeep = Upkeep(self.datapath, lambda: self.realizer.endpoints, resync)
        own = {
            "kernel": self.upkeep,
            "state": self.state,
            "masquerade": self.masquerading,
            "conntrack": self.flow_shares,
        }
        self.status_sources = {**await self._all("status"), **own}
        self.metrics = Metrics(self, await self._all("metrics"))
        self._stack.push_async_callback(self.metrics.stop)
        self.status_sources["metrics"] = self.metrics
        await self.metrics.start(config.prometheus_serve_addr)
        self.api = ApiServer(self, Path(config.socket_path), config.socket_group)
        self._stack.push_async_callback(self.api.stop)
        await self.api.start()
        self.cni = CniServer(Path(config.cni_socket_path), modes)
        self._stack.push_async_callback(self.cni.stop)
        await self.cni.start()

    async def _all(self, kind: str) -> dict[str, Any]:
        """Start every provider of a kind of which many are active."""
        return await self.plugins.start_all(kind, self.context())

    def _start_duties(self) -> None:
        run = self.controllers.run
        gc_interval = self.config.conntrack_gc_interval or CONNTRACK_GC_INTERVAL
        run("realize", self.realizer.realize, RESYNC_INTERVAL)
        run("addresses", self.realizer.write_addresses, RESYNC_INTERVAL)
        run("policy-retry", self.realizer.retry, RESYNC_INTERVAL)
        run("resync", self.realizer.resync, RESYNC_INTERVAL)
        run("kernel-repair", self.upkeep.mend, RESYNC_INTERVAL)
        self.upkeep.start(self._kernel_changed, lambda: self.controllers.trigger("node-addresses"))
        self._stack.callback(self.upkeep.stop)
        self.macs = Macs(self.endpoints)
        self._stack.push_async_callback(self.macs.stop)
        self.macs.start()
        run("conntrack-gc", self._collect_conntrack, gc_interval)
        run("conntrack-shares", self.flow_shares.look, flowshares.INTERVAL)
        run("sockets", lambda: sockets.keep_sockets(self), sockets.INTERVAL)
        run("state", self.state.look, stateguard.INTERVAL)
        run("metrics-listener", self.metrics.ensure, sockets.INTERVAL)
        run("node-addresses", self._refresh_node, RESYNC_INTERVAL)
        self.balancing.start_duties()
        run("masquerade", self.masquerading.refresh, masquerading.INTERVAL)
        run("masquerade-gc", self.masquerading.collect, masquerading.COLLECT_INTERVAL)
        run("masquerade-forget", self.masquerading.forget_gone, masquerading.COLLECT_INTERVAL)
        run("masquerade-usage", self.masquerading.look, masquerading.LOOK_INTERVAL)
        run("kvstore-status", self._ask_store, STORE_INTERVAL, shared=True)
        self.membership.start_duties()
        self.health.start_duties()
        self._stack.push_async_callback(self.controllers.stop)
        self.follow_identities()

    def _kernel_changed(self) -> None:
        self.controllers.trigger("kernel-repair")
        self.controllers.trigger("masquerade")

    def follow_identities(self) -> None:
        """Hear of what comes and goes in the identity backend, and of what came before."""
        self.backend.subscribe(self._identities_changed)
        self._identities_changed(list(self.backend.identities().values()), [])

    async def _collect_conntrack(self) -> None:
        sweep = await self.datapath.flows.collect()
        if not self.config.conntrack_gc_interval:
            self.controllers.set_interval("conntrack-gc", self.datapath.flows.interval(sweep))

    async def _refresh_node(self) -> None:
        await self._publish_node()
        found = self.node_prefixes
        if found != self._served_prefixes:  # by whomever the change was noticed
            await self.balancing.cluster.refresh()
            self._served_prefixes = found
        self.mtu.current = await asyncio.to_thread(node_mtu, self.config)
        await self.realizer.realize()

    async def _ask_store(self) -> None:
        self.store_status = await self.kvstore.status()
        self.controllers.set_interval("kvstore-status", STORE_INTERVAL if self.store_status.ok else STORE_RETRY)

    async def stop(self) -> None:
        """Stop answering and let go of the kernel's objects; pins, programs and devices stay."""
        if not self.stopping.is_set() and self.handles:
            self.hooks.agent_stopping(self.config.node_name)
        self.stopping.set()
        await self._stack.aclose()

    # what the API shows

    def status(self) -> dict[str, Any]:
        """The health of every part, for ``ciliate status``."""
        return agent_status(self)

    def configuration(self, secrets: bool = False) -> dict[str, Any]:
        """The effective configuration; what is secret in it only where ``secrets`` is asked for."""
        data: dict[str, Any] = wire.plain(self.config)
        return data if secrets else hide_secrets(data)

    async def configure(self, changes: Mapping[str, Any]) -> None:
        """Change options while running; ConfigError names those that cannot change or have a wrong value."""
        self.config = config = changed(self.config, changes, MUTABLE)
        set_log_level(config.debug)
        self.repository.reconfigure(_policy_settings(config, self.repository.settings))
        await self._set_monitor_level(config.monitor_aggregation)
        await self.realizer.realize()
        self._policy_changed(self.repository.revision)

    async def _set_monitor_level(self, level: str) -> None:
        await self.datapath.set_monitor_level(level)
        if level != self.realizer.monitor_level:
            self.realizer.monitor_level = level
            await self.endpoints.follow_node()

    def identity(self, number: int) -> Identity | None:
        """An identity of any kind that this node knows."""
        if is_reserved(number):
            return reserved_identity(number)
        if is_local(number):
            return self.local.get(number)
        return self.backend.get(number)

    def name_of(self, source: str) -> str:
        """What people call an address: the pod's name and endpoint where it is one of this node's."""
        try:
            endpoint = self.endpoints.holder(ip_address(source))
        except ValueError:
            return source
        return f"{source} (endpoint {endpoint.id}, {endpoint.pod or 'no pod'})" if endpoint else source

    def identities(self) -> list[Identity]:
        """Every identity that is not reserved: the cluster's and this node's prefixes."""
        return [*self.backend.identities().values(), *self.local.identities()]

    def addresses(self) -> list[dict[str, str]]:
        """Every allocated address with its owner, by family and number."""
        owners = sorted(self.ipam.owners().items(), key=lambda item: (item[0].version, int(item[0])))
        found = [{"ip": str(address), "owner": owner} for address, owner in owners]
        for item, (address, _) in zip(found, owners, strict=True):
            if address in self.resting.resting:
                item["resting"] = self.resting.reason([address])
        return found

    # what the API changes

    async def put_workloads(self, objects: Sequence[Mapping[str, Any]]) -> set[str]:
        """Take in pods and namespaces, and relabel the endpoints concerned."""
        changed = self.workloads.upsert(objects)
        await self.store_workloads()
        await self.endpoints.relabel_pods(changed)
        return changed

    async def clear_workloads(self) -> None:
        """Forget pods and namespaces; endpoints keep their labels."""
        self.workloads.clear()
        await self.store_workloads()

    async def store_workloads(self) -> None:
        """Write the file of pods and namespaces."""
        await self.workload_file.write(self.workloads.export)

    async def switch_plugin(self, kind: str, name: str, options: Mapping[str, Any]) -> None:
        """Replace the active provider of a kind; a failed start leaves the old one in place."""
        await self.switching.switch(kind, name, options)

    async def wait_revision(self, revision: int) -> None:
        """Return once every endpoint has realised a policy revision."""
        async with self._revised:
            await self._revised.wait_for(lambda: self._realised(revision))

    def _realised(self, revision: int) -> bool:
        behind = any(endpoint.policy_revision < revision for endpoint in self.endpoints.endpoints())
        return self.repository.revision >= revision and not behind

    async def put_service_objects(self, objects: Sequence[Mapping[str, Any]]) -> int:
        """Take in Services and their endpoints; returns how many services are concerned once all of it is in force."""
        count = await self.balancing.cluster.upsert(objects)
        await self.realizer.realize()
        return count

    async def remove_service_objects(self, keys: Collection[tuple[str, str, str]]) -> int:
        """Forget Services and endpoints by kind, namespace and name; returns how many were there."""
        count = await self.balancing.cluster.remove(keys)
        await self.realizer.realize()
        return count

    # what parts tell

    def _identities_changed(self, added: list[Identity], removed: list[int]) -> None:
        self.repository.upsert_identities(added)
        self.repository.remove_identities(removed)
        for endpoint in self.endpoints.clashing(added):
            log.error("endpoint %d: others have its identity %d now; it gets another", endpoint.id, endpoint.identity)
            task = asyncio.ensure_future(self.endpoints.resolve_anew(endpoint))
            task.add_done_callback(lambda done: done.exception())
        self.controllers.trigger("realize")

    def _endpoint_created(self, endpoint: Endpoint) -> None:
        labels = endpoint.labels.strings()
        self.hooks.endpoint_created(endpoint.id, labels)
        self.monitor.publish({"type": "agent", "text": f">> endpoint {endpoint.id} ({endpoint.pod}) created"})

    def _endpoint_deleted(self, endpoint: Endpoint) -> None:
        self.hooks.endpoint_deleted(endpoint.id)
        self.masquerading.forget(endpoint.addresses)
        self.controllers.trigger(membership.PURGE)
        self.monitor.publish({"type": "agent", "text": f">> endpoint {endpoint.id} ({endpoint.pod}) deleted"})

    def _policy_changed(self, revision: int) -> None:
        self.hooks.policy_changed(revision)
        self.monitor.publish({"type": "agent", "text": f">> policy revision {revision} is in force"})
        task = asyncio.ensure_future(self._announce_revision())
        task.add_done_callback(lambda done: done.exception())

    async def _announce_revision(self) -> None:
        async with self._revised:
            self._revised.notify_all()


def _with_rest(provider: Any) -> RestingIpam:
    return RestingIpam(CountingIpam(provider))


def _policy_settings(config: AgentConfig, before: PolicySettings | None = None) -> PolicySettings:
    """What options say of policy; which proxies there are stays as ``before``."""
    before = before or PolicySettings()
    return PolicySettings(
        proxies=before.proxies,
        proxies_down=before.proxies_down,
        enforcement=config.enable_policy,
        allow_localhost=config.allow_localhost != "policy",
        cluster=config.cluster_name,
    )
