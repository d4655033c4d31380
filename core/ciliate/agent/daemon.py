"""The agent's composition root: makes the parts, starts them in order, stops them in reverse.

Order: lock, plugins, store, identities, addresses, datapath, state from disk, API, endpoints, CNI. The datapath is
never taken down when the agent stops: programs and maps stay pinned and go on enforcing.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from ciliate import atomicfile
from ciliate.agent.api.server import ApiServer
from ciliate.agent.describe import Describer
from ciliate.agent.lock import AgentLock
from ciliate.agent.monitor import Monitor
from ciliate.agent.policy_service import PolicyService
from ciliate.agent.status import agent_status
from ciliate.cni.server import CniServer
from ciliate.config import AgentConfig
from ciliate.controller import Controllers
from ciliate.datapath import Datapath, DatapathConfig, devices
from ciliate.datapath.events import EventReader
from ciliate.endpoint.manager import EndpointManager
from ciliate.endpoint.realize import Realizer
from ciliate.endpoint.store import EndpointStore
from ciliate.identity import HOST, Identity, reserved_identity
from ciliate.identity.backend import IdentityBackend
from ciliate.identity.filter import LabelFilter
from ciliate.identity.local import LocalIdentities
from ciliate.ipam import Ipam
from ciliate.ipcache import Ipcache, Source
from ciliate.kvstore import Kvstore
from ciliate.plugin import PluginContext, PluginManager
from ciliate.policy.repository import PolicySettings, Repository
from ciliate.services import Services
from ciliate.workload import WorkloadRegistry

log = logging.getLogger(__name__)
RESYNC_INTERVAL = 60.0
"""Seconds between comparisons of intent and kernel (inventory 4.12 F7: policy map sync 1 min)."""


class Agent:
    """One node's agent. ``start`` returns when the API and CNI answer; ``stop`` leaves traffic as it is."""

    def __init__(self, config: AgentConfig, plugins: PluginManager) -> None:
        self.config = config
        self.plugins = plugins
        self.services = Services()
        self.controllers = Controllers()
        self.stopping = asyncio.Event()
        self.workloads = WorkloadRegistry(config.cluster_name)
        self.repository = Repository(_policy_settings(config))
        self.ipcache = Ipcache()
        self._state = Path(config.state_dir)
        self._run = Path(config.run_dir)
        self._lock = AgentLock(self._state)
        self._workload_file = self._state / "workloads.json"

    async def start(self) -> None:
        """Bring every part up; raises what the failing part raises, with what was started stopped again."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        self._state.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._run.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._lock.acquire()
        await self._start_providers()
        await self._start_datapath()
        await self._restore()
        await self._serve()
        self._start_duties()
        self.plugins.hooks.ciliate_agent_started(node_name=self.config.node_name)

    async def _start_providers(self) -> None:
        config = self.config
        self.kvstore: Kvstore = await self._provider("kvstore", config.kvstore, Kvstore)
        self.backend: IdentityBackend = await self._provider(
            "identity", config.identity_allocation_mode, IdentityBackend
        )
        self.ipam: Ipam = await self._provider("ipam", config.ipam, Ipam)

    async def _provider(self, kind: str, name: str, service: type[Any]) -> Any:
        instance = await self.plugins.start(kind, name, self._context())
        self.services.add(service, instance)
        return instance

    def _context(self) -> PluginContext:
        return PluginContext(
            config=self.config, options=None, state_dir=self._state, run_dir=self._run, services=self.services
        )

    async def _start_datapath(self) -> None:
        loader = await self.plugins.start("loader", self.config.datapath_loader, self._context())
        self.datapath = Datapath(self._datapath_config(), loader)
        await self.datapath.start()
        self.services.add(Datapath, self.datapath)
        self.local = LocalIdentities()
        self.realizer = Realizer(self.datapath, self.repository, self.ipcache, self.local, self._state)
        self.endpoints = EndpointManager(
            realizer=self.realizer,
            repository=self.repository,
            backend=self.backend,
            ipcache=self.ipcache,
            workloads=self.workloads,
            label_filter=LabelFilter(self.config.labels),
            store=EndpointStore(self._state / "endpoints"),
            grace_period=self.config.identity_change_grace_period,
        )
        self.services.add(EndpointManager, self.endpoints)
        self.services.add(WorkloadRegistry, self.workloads)
        self.policies = PolicyService(self.repository, self.realizer, self._state)
        self.endpoints.on_created = self._endpoint_created
        self.endpoints.on_deleted = self._endpoint_deleted
        self.policies.on_change = self._policy_changed
        self.realizer.on_failure = lambda: self.controllers.trigger("policy-retry")

    def _datapath_config(self) -> DatapathConfig:
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
        )

    async def _restore(self) -> None:
        """Bring back what the last run knew, in an order in which no endpoint ever sees less policy than before."""
        await asyncio.to_thread(self.realizer.restore)
        data = await asyncio.to_thread(atomicfile.read_json, self._workload_file)
        if isinstance(data, dict):
            self.workloads.restore(data)
        count = self.policies.restore()
        self.repository.upsert_identities(self.backend.identities().values())
        self.backend.subscribe(self._identities_changed)
        await self._publish_node()
        present = await asyncio.to_thread(devices.list_endpoint_devices)
        await self.endpoints.restore(present)
        await self._release_orphans()
        await self.realizer.resync()
        log.info("restored %d endpoints and %d policies", len(self.endpoints.endpoints()), count)

    async def _publish_node(self) -> None:
        """Every address of the node itself stands for the host identity."""
        prefixes = set(await asyncio.to_thread(devices.node_prefixes))
        for prefix in self._node_prefixes - prefixes:
            self.ipcache.delete(prefix, Source.LOCAL)
        for prefix in prefixes - self._node_prefixes:
            self.ipcache.upsert(prefix, HOST, Source.LOCAL)
        self._node_prefixes = prefixes

    async def _release_orphans(self) -> None:
        """Undo half-made endpoints: devices and addresses that no endpoint owns."""
        owned = {address for endpoint in self.endpoints.endpoints() for address in endpoint.addresses}
        names = {endpoint.request.host_ifname for endpoint in self.endpoints.endpoints()}
        for name in await asyncio.to_thread(devices.list_endpoint_devices):
            if name not in names:
                log.warning("device %s belongs to no endpoint and is removed", name)
                await asyncio.to_thread(devices.delete_device, name)
        keep = {address for address in (self.ipam.router.ipv4, self.ipam.router.ipv6) if address}
        orphans = {owner for address, owner in self.ipam.owners().items() if address not in owned | keep}
        for owner in orphans - RESERVED_OWNERS:
            log.warning("addresses of %s belong to no endpoint and are released", owner)
            await self.ipam.release(owner)

    async def _serve(self) -> None:
        config = self.config
        reader = EventReader(self.datapath.events_path)
        self.monitor = Monitor(reader, Describer(self.endpoints, self.identity, self.repository))
        self.monitor.start()
        self.api = ApiServer(self, Path(config.socket_path), config.socket_group)
        await self.api.start()
        self.cni = CniServer(Path(config.cni_socket_path), await self._chaining_modes())
        await self.cni.start()

    async def _chaining_modes(self) -> dict[str, Any]:
        modes = {}
        for name in self.plugins.providers("chaining"):
            modes[name] = await self.plugins.start("chaining", name, self._context())
        return modes

    def _start_duties(self) -> None:
        gc_interval = self.config.conntrack_gc_interval or CONNTRACK_GC_INTERVAL
        self.controllers.run("policy-retry", self.realizer.retry, RESYNC_INTERVAL)
        self.controllers.run("resync", self.realizer.resync, RESYNC_INTERVAL)
        self.controllers.run("conntrack-gc", self._collect_conntrack, gc_interval)
        self.controllers.run("node-addresses", self._refresh_node, RESYNC_INTERVAL)

    async def _collect_conntrack(self) -> None:
        await self.datapath.collect_conntrack()

    async def _refresh_node(self) -> None:
        await self._publish_node()
        await self.realizer.realize()

    async def stop(self) -> None:
        """Stop answering and let go of the kernel's objects; pins, programs and devices stay."""
        self.stopping.set()
        await self._stack.aclose()

    def status(self) -> dict[str, Any]:
        """The health of every part, for ``ciliate status``."""
        return agent_status(self)

    def configuration(self) -> dict[str, Any]:
        """The effective configuration."""
        data: dict[str, Any] = msgspec.to_builtins(self.config)
        return data

    def identity(self, number: int) -> Identity | None:
        """An identity of any kind that this node knows."""
        if is_reserved(number):
            return reserved_identity(number)
        if is_local(number):
            return self.local.get(number)
        return self.backend.identities().get(number)

    def identities(self) -> list[Identity]:
        """Every identity that is not reserved: the cluster's and this node's prefixes."""
        return [*self.backend.identities().values(), *self.local.identities()]

    def addresses(self) -> list[dict[str, str]]:
        """Every allocated address with its owner."""
        return [{"ip": str(address), "owner": owner} for address, owner in sorted_addresses(self.ipam.owners())]

    async def put_workloads(self, objects: list[dict[str, Any]]) -> set[str]:
        """Take in pods and namespaces, and relabel the endpoints concerned."""
        changed = self.workloads.upsert(objects)
        await self._store_workloads()
        await self.endpoints.relabel_pods(changed)
        return changed

    async def clear_workloads(self) -> None:
        """Forget pods and namespaces; endpoints keep their labels."""
        self.workloads.clear()
        await self._store_workloads()

    async def _store_workloads(self) -> None:
        await asyncio.to_thread(atomicfile.write_json, self._workload_file, self.workloads.export())

    async def switch_plugin(self, kind: str, name: str) -> None:
        """Replace the active provider of a kind; a failed start leaves the old one in place."""
        await self.plugins.switch(kind, name, self._context())

    async def wait_revision(self, revision: int) -> None:
        """Return once every endpoint has realised a policy revision."""
        while any(endpoint.policy_revision < revision for endpoint in self.endpoints.endpoints()):
            await self._revised.wait()
            self._revised.clear()

    def _identities_changed(self, added: list[Identity], removed: list[int]) -> None:
        self.repository.upsert_identities(added)
        self.repository.remove_identities(removed)
        self.controllers.trigger("realize")
