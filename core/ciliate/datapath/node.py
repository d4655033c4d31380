"""The datapath of one node: the one owner of its maps, programs and devices."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ciliate.datapath import devices, external, kernel, layout, mapversions, netlink, repair, socketlb, tunnel
from ciliate.datapath.bpf import BATCH, Map
from ciliate.datapath.endpointmaps import EndpointMaps
from ciliate.datapath.feature import feature_defines
from ciliate.datapath.flows import Flows
from ciliate.datapath.loader import Loader, LoadPlan, Ready
from ciliate.datapath.migration import Migration
from ciliate.datapath.model import MONITOR_LEVELS, DatapathConfig, EndpointConfig, PolicyChange, Present
from ciliate.datapath.nodeprograms import NodePrograms
from ciliate.datapath.nodes import Nodes, Router
from ciliate.datapath.pins import PinDirectory, unmount
from ciliate.policy.mapstate import MapState, PolicyEntry, PolicyKey

log = logging.getLogger(__name__)
T = TypeVar("T")
FEW = 64
"""Changes of the ipcache that take less time (2 µs each) than it takes to give them to another thread."""
MAPS = (
    *("ciliate_ep", "ciliate_link", "ciliate_lxc", "ciliate_ipcache", "ciliate_place"),
    *("ciliate_policy", "ciliate_metrics", "ciliate_config"),
)


class Datapath:
    """Kernel side of the node. Its methods are serialised in one thread; long sweeps have another.

    Few changes of the ipcache are written at once where that thread has nothing to do: a cluster has some a second.
    """

    def __init__(self, config: DatapathConfig, loader: Loader) -> None:
        self.config = config
        self._loader = loader
        self._pins = PinDirectory(config.bpf_root, config.instance)
        self._migration = Migration(self._pins)
        self._waiting: dict[int, int] = {}  # interface index -> endpoint, by the programs of an earlier layout
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="datapath")
        self._jobs: set[Future[Any]] = set()
        self._sweeper = ThreadPoolExecutor(1, thread_name_prefix="conntrack")
        self._maps: dict[str, Map] = {}
        self._endpoints: dict[int, EndpointConfig] = {}
        self._devices: set[int] = set()
        self._router = 0
        self._cgroup: Path | None = None
        self.flows = Flows(self.sweep)
        self.programs = NodePrograms(self._run, self._pins, self._plan)
        self._tunnel = 0
        self.nodes = Nodes(self._run, self._pins, self._router_of_nodes, config.tunnel, config.node_routes)

    @property
    def events_path(self) -> Path:
        """The pin of the events ring buffer."""
        return self._pins.home / "ciliate_events"

    @property
    def pins(self) -> Path:
        """The directory of this instance's pins, as programs that are loaded now find them."""
        return self._pins.path

    @property
    def home(self) -> Path:
        """The directory of this instance's pins, which is always the same."""
        return self._pins.home

    async def start(self) -> None:
        """Mount, compile, load, adopt what is there. DatapathError says which step failed and why.

        Where maps have an earlier layout or another size, nothing of this serves before ``switch``.
        """
        await self._run(self._start)
        if self.config.tunnel is not None:
            for feature in tunnel.features(self.config.tunnel, self.config.router_device[0], self.nodes.maps.fill):
                await self.programs.enable(feature)

    def _start(self) -> None:
        config = self.config
        self._pins.open()
        self._migration.begin(self._sizes())
        self._build = kernel.select(config.build)
        log.info("datapath build: %s (%s)", self._build.name, self._build.reason)
        devices.prepare_node(config.enable_ipv4, config.enable_ipv6)
        self._ensure_router()
        self._ensure_tunnel()
        self._loader.prepare(self._plan())
        tunnel.remove_devices(config.tunnel)
        if config.tunnel is None:
            self._pins.unlink("ciliate_nodes")
        self._maps = {name: Map.open(self._pins.of(name)) for name in MAPS}
        self.flows.open(self._pins)
        self._entries = EndpointMaps(self._maps)
        self._set_monitor(config.monitor)
        mapversions.write_records(self._pins)
        self._pins.hold()

    def _ensure_router(self) -> None:
        config = self.config
        self._devices.discard(self._router)
        self._router = devices.ensure_router_device(*config.router_device, config.router4, config.router6)
        self._devices.add(self._router)

    def _ensure_tunnel(self) -> bool:
        """The device of the tunnel, where there is to be one; whether it is another one than before."""
        config, before = self.config, self._tunnel
        if config.tunnel is not None:
            self._tunnel = tunnel.ensure_device(config.tunnel)
            tunnel.prepare_router(self._router, config.tunnel.mtu)
        return self._tunnel != before

    def _router_of_nodes(self) -> Router:
        return Router(self._router, self.config.router4, self.config.router6)

    def _plan(self) -> LoadPlan:
        config = self.config
        zero4, zero6 = b"\0" * 4, b"\0" * 16
        values = {
            "enable_ipv4": bytes([config.enable_ipv4]),
            "enable_ipv6": bytes([config.enable_ipv6]),
            "enable_debug": bytes([config.debug]),
            "router_ipv4": config.router4.packed if config.router4 else zero4,
            "router_ipv6": config.router6.packed if config.router6 else zero6,
            "ct_tcp_max": config.ct_tcp_max.to_bytes(4, sys.byteorder),
            "ct_any_max": config.ct_any_max.to_bytes(4, sys.byteorder),
            **tunnel.constants(self._tunnel, self.config.tunnel),
        }
        cache = config.state_dir / "templates"
        defines = self._build.defines + feature_defines(config.features, cache)
        return LoadPlan(self._pins, cache, values, self._sizes(), defines, self._migration.fill)

    def _sizes(self) -> dict[str, int]:
        config = self.config
        return {"ciliate_ct_tcp": config.ct_tcp_max, "ciliate_ct_any": config.ct_any_max, **config.sizes}

    async def switch(self) -> bool:
        """Let everything that was loaded since ``start`` serve, where maps change; whether they did.

        Traffic goes by the programs and maps of before until then. To be called once all endpoints and features are
        there; without a change of maps it does nothing. DatapathError where a step failed; the next start mends it.
        """
        return await self._run(self._switch)

    def _switch(self) -> bool:
        if not self._migration.active:
            return False
        if isinstance(self._loader, Ready):
            for ifindex, endpoint in self._waiting.items():
                self._loader.ready(ifindex, endpoint)
        self._migration.at_switch(self._attach_waiting)
        try:
            self._migration.switch()
        finally:
            self._pins.hold()
        self.flows.forget_later(self._endpoints)  # what of theirs was removed may have been copied once more
        self.programs.refill()
        return True

    def _attach_waiting(self) -> None:
        failures: dict[int, OSError] = {}
        while self._waiting:
            ifindex, endpoint = self._waiting.popitem()
            try:
                self._loader.attach(ifindex, endpoint)
                if self._endpoints[endpoint].external:
                    external.remove_link_rules(ifindex)
            except OSError as error:
                failures[endpoint] = error
        repair.raise_all(failures)

    async def templates(self) -> list[dict[str, Any]]:
        """Every compiled template in the cache with what it was made of, and the endpoints that run it."""
        return await self._run(self._templates)

    def _templates(self) -> list[dict[str, Any]]:
        current, found = self._loader.template(), []
        for info in sorted((self.config.state_dir / "templates").glob("*/endpoint.txt")):
            facts = dict(line.partition(" ")[::2] for line in info.read_text().splitlines())
            name = info.parent.name
            users = sorted(self._endpoints) if name == current else []
            size = info.with_suffix(".o").stat().st_size
            found.append({"sha": name, **facts, "bytes": size, "endpoints": users})
        return found

    async def upgrade(self) -> None:
        """Compile and load the programs again under traffic: each slot is switched in one step."""
        await self._run(self._loader.prepare, self._plan())
        await self._run(self.programs.upgrade)
        await self.balance_sockets(self._cgroup)

    async def balance_sockets(self, cgroup: Path | None) -> None:
        """Let the sockets of this cgroup's processes meet services; None: of no process. May raise DatapathError."""
        self._cgroup = cgroup
        if cgroup is not None:
            await self._run(socketlb.attach, self._plan(), cgroup, self._at_switch)
        else:
            await self._run(socketlb.detach, self._pins)

    async def switch_loader(self, loader: Loader) -> None:
        """Let another loader serve every endpoint; where that fails the old one serves all of them again."""
        await self._run(self._switch_loader, loader)

    def _switch_loader(self, loader: Loader) -> None:
        loader.prepare(self._plan())
        try:
            for config in self._endpoints.values():
                loader.attach(config.ifindex, config.id)
        except BaseException:
            for config in self._endpoints.values():
                self._loader.attach(config.ifindex, config.id)
            raise
        self._loader.close()
        self._loader = loader

    async def stop(self) -> None:
        """Close descriptors. Programs, maps and devices stay and go on."""
        await self._run(self._close)
        await self._end_threads()

    async def _end_threads(self) -> None:
        await self._run(netlink.close)
        self._worker.shutdown()
        self._sweeper.shutdown()

    def _close(self) -> None:
        for table in self._maps.values():
            table.close()
        self._maps = {}
        self.flows.close()
        self._migration.close()
        self._loader.close()
        self._pins.close()

    async def destroy(self) -> None:
        """Remove this instance from the kernel: endpoint devices, router device, pins, and the mount if it is ours."""
        await self._run(self._destroy)
        await self._end_threads()

    def _destroy(self) -> None:
        for config in self._endpoints.values():
            if config.external:
                external.release(config.ifindex)
            else:
                devices.delete_device(config.ifname)
        self.programs.remove()
        self.nodes.remove()
        tunnel.remove_devices(None)
        self._close()
        devices.delete_device(self.config.router_device[0])
        self._pins.remove()
        if self.config.bpf_root != Path("/sys/fs/bpf"):
            unmount(self.config.bpf_root)

    async def add_endpoint(self, config: EndpointConfig, policy: MapState) -> None:
        """Connect an endpoint: policy, its entry, its addresses, filters, and only then the device goes up.

        For one that an earlier run connected this changes only what differs, with its filters in place throughout.
        """
        await self.flows.before_use(config.id, config.addresses)
        await self._run(self._add, config, policy)

    def _add(self, config: EndpointConfig, policy: MapState) -> None:
        known = self._endpoints.get(config.id) or self._entries.known(config)
        self._entries.write_link(config)
        self._entries.sync(config, policy, known)
        self._endpoints[config.id] = config
        self._entries.write_addresses(config)
        self._connect(config)

    def _connect(self, config: EndpointConfig) -> None:
        self._devices.add(config.ifindex)
        if self._migration.active and len(devices.attached(config.ifindex)) == 2:
            self._waiting[config.ifindex] = config.id
            serving = False
        else:
            self._loader.attach(config.ifindex, config.id)
            serving = True
        if config.external:
            if serving:  # programs of before may need them
                external.remove_link_rules(config.ifindex)
            return
        router4, router6 = self.config.router4, self.config.router6
        devices.connect_host(config.ifindex, config.mac, config.ipv4, config.ipv6, router4, router6)

    async def left_behind(self, endpoint: int) -> EndpointConfig | None:
        """An endpoint as the kernel has it, without its device's name; None where it has no valid entry."""
        return await self._run(self._entries.left_behind, endpoint)

    async def update_endpoint(self, config: EndpointConfig) -> None:
        """Follow a changed identity. Policy entries are changed by ``apply_policy`` or ``sync_policy``."""
        await self._run(self._update, config)

    def _update(self, config: EndpointConfig) -> None:
        self._endpoints[config.id] = config
        self._entries.write(config)

    async def remove_endpoint(self, endpoint: int, addresses: Iterable[layout.Address] = ()) -> None:
        """Disconnect: no delivery to it and nothing from it, then its entries and flows go, and all that names its
        addresses; ``addresses`` are those that it is known to have had, where it was not connected by this run.

        Its filters stay on the device, which drop everything now; the device's owner removes it.
        """
        found = await self._run(self._remove, endpoint)
        await self.flows.forget(endpoint, {*found, *addresses})

    def _remove(self, endpoint: int) -> list[layout.Address]:
        config = self._endpoints.pop(endpoint, None)
        if config is not None:
            self._devices.discard(config.ifindex)
            self._waiting.pop(config.ifindex, None)
        self._entries.remove(endpoint, config)
        return config.addresses if config is not None else []

    async def forget_unknown(self, known: Collection[int]) -> list[int]:
        """Remove what endpoints that are not ``known`` left in the maps, after a crash; returns their ids.

        Flows of every other id go with the next collection, at the latest before such an id is used again.
        """
        found = await self._run(self._entries.forget_unknown, known)
        self.flows.forget_later(known)
        return found

    @property
    def endpoint_devices(self) -> Collection[int]:
        """The interface indexes of connected endpoints and of the router, as they are at any time."""
        return self._devices

    async def mend(self) -> repair.Inspection:
        """Put back what somebody took from the endpoints: filters, routes, neighbours, entries of the maps.

        DatapathError where something cannot be put back; everything else is.
        """
        return await self._run(self._mend)

    def _mend(self) -> repair.Inspection:
        self._ensure_router()
        mended = self._pins.mend()
        self._pins.hold()
        if self._ensure_tunnel():
            self._loader.prepare(self._plan())
            self.programs.upgrade()
            mended.append("the tunnel device")
        found, gone, before = repair.inspect(self._endpoints, self._maps, self._entries.entry_of)
        failures: dict[int, OSError] = {}
        for number in found:
            config = self._endpoints[number]
            try:
                self._entries.write(config)
                self._connect(config)
            except OSError as error:
                failures[number] = error
        repair.raise_all(failures)
        return repair.Inspection([*mended, *repair.describe(found), *self.programs.mend()], gone, before)

    async def refresh_policy(self) -> None:
        """Read from the kernel which policy entries there are, in case somebody else changed them."""
        await self._run(self._entries.policy.adopt)

    async def apply_policy(
        self,
        endpoint: int,
        upserts: MapState,
        deletes: Collection[PolicyKey],
        enforce_ingress: bool,
        enforce_egress: bool,
    ) -> None:
        """Change an endpoint's policy by a delta, in the order that ``policymap`` describes."""
        await self._run(self._apply, endpoint, upserts, deletes, (enforce_ingress, enforce_egress))

    async def apply_policies(self, changes: Sequence[PolicyChange]) -> dict[int, OSError]:
        """Change the policies of several endpoints as ``apply_policy`` does; what failed, by endpoint."""
        return await self._run(self._apply_all, changes)

    def _apply_all(self, changes: Sequence[PolicyChange]) -> dict[int, OSError]:
        failed = {}
        for change in changes:
            try:
                self._apply(*change)
            except OSError as error:
                failed[change.endpoint] = error
        return failed

    def _apply(
        self, endpoint: int, upserts: MapState, deletes: Collection[PolicyKey], enforce: tuple[bool, bool]
    ) -> None:
        known = self._endpoints[endpoint]
        config = msgspec.structs.replace(known, enforce_ingress=enforce[0], enforce_egress=enforce[1])
        self._entries.change(config, upserts, deletes, known)
        self._endpoints[endpoint] = config

    async def sync_policy(self, endpoint: int, desired: MapState, enforce_ingress: bool, enforce_egress: bool) -> None:
        """Make an endpoint's policy exactly ``desired``."""
        await self._run(self._sync_policy, endpoint, desired, (enforce_ingress, enforce_egress))

    def _sync_policy(self, endpoint: int, desired: MapState, enforce: tuple[bool, bool]) -> None:
        upserts, deletes = self._entries.policy.difference(endpoint, desired)
        known = self._endpoints[endpoint]
        changed = upserts or deletes or enforce != (known.enforce_ingress, known.enforce_egress)
        if changed or self._entries.policy.unsure(endpoint):
            self._apply(endpoint, upserts, deletes, enforce)

    async def present(self, config: EndpointConfig) -> Present | None:
        """What the kernel enforces for an endpoint, also one of an earlier run; None where it has no such endpoint."""
        return await self._run(self._present, config)

    def _present(self, config: EndpointConfig) -> Present | None:
        known = self._endpoints.get(config.id) or self._entries.known(config)
        if known is None:
            return None
        return Present(dict(self._entries.policy.entries(config.id)), known.enforce_ingress, known.enforce_egress)

    async def policy_entries(self, endpoint: int) -> dict[PolicyKey, PolicyEntry]:
        """What the kernel has of an endpoint's policy."""
        return await self._run(lambda: dict(self._entries.policy.entries(endpoint)))

    async def policy_counters(self, endpoint: int) -> dict[PolicyKey, layout.PolicyCounters]:
        """An endpoint's policy in the kernel, with packets and bytes of each entry."""
        return await self._run(self._entries.policy.counters, endpoint)

    async def change_ipcache(self, upserts: Mapping[bytes, bytes], deletes: Collection[bytes] = ()) -> None:
        """Say what is behind prefixes, and forget others: keys and values as `layout` makes them; upserts first."""
        if len(upserts) + len(deletes) <= FEW and not self._jobs:
            self._change_ipcache(upserts, deletes)
        else:
            await self._run(self._change_ipcache, upserts, deletes)

    def _change_ipcache(self, upserts: Mapping[bytes, bytes], deletes: Collection[bytes]) -> None:
        table, pairs = self._maps["ciliate_ipcache"], iter(upserts.items())
        while some := list(itertools.islice(pairs, BATCH)):
            table.update_many(some)
        table.delete_many(deletes)

    async def compare_ipcache(self, wanted: Mapping[bytes, bytes]) -> tuple[dict[bytes, bytes], set[bytes]]:
        """What would make the kernel's ipcache equal to ``wanted``: upserts and deletes."""
        return await self._run(lambda: layout.differences(self._maps["ciliate_ipcache"].items(), wanted))

    async def ipcache(self) -> dict[bytes, bytes]:
        """Every key and value in the kernel."""
        return await self._run(lambda: dict(self._maps["ciliate_ipcache"].items()))

    async def change_places(self, upserts: Mapping[bytes, bytes], deletes: Collection[bytes] = ()) -> None:
        """Know places by prefix, and forget others: keys and values as `layout` makes them; upserts first."""
        await self._run(self._change_places, upserts, deletes)

    def _change_places(self, upserts: Mapping[bytes, bytes], deletes: Collection[bytes]) -> None:
        table = self._maps["ciliate_place"]
        if upserts:
            table.update_many(upserts.items())
        table.delete_many(deletes)

    async def compare_places(self, wanted: Mapping[bytes, bytes]) -> tuple[dict[bytes, bytes], set[bytes]]:
        """What would make the kernel's places equal to ``wanted``: upserts and deletes."""
        return await self._run(lambda: layout.differences(self._maps["ciliate_place"].items(), wanted))

    async def metrics(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(reason, direction) -> (packets, bytes); reason 0 is what was forwarded."""
        return await self._run(lambda: read_metrics(self._maps["ciliate_metrics"]))

    async def set_monitor_level(self, level: str) -> None:
        """Which traces are sent: none (all), low (one a packet), medium (new flows), maximum (verdicts only)."""
        await self._run(self._set_monitor, level)

    def _set_monitor(self, level: str) -> None:
        self._maps["ciliate_config"].update(b"\0" * 4, layout.NODE_CONFIG.pack(MONITOR_LEVELS[level]))

    def _at_switch(self, step: Callable[[], None]) -> None:
        """Do this now, or when programs are switched."""
        if self._migration.active:
            self._migration.at_switch(step)
        else:
            step()

    def _map(self, name: str) -> Map:
        return self._maps[name]

    async def sweep(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run something that takes long in the thread for that; it must not touch devices."""
        return await asyncio.get_running_loop().run_in_executor(self._sweeper, function, *arguments)

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        job = self._worker.submit(function, *arguments)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(job)


def read_metrics(table: Map) -> dict[tuple[int, int], tuple[int, int]]:
    """Sum the per-CPU counters of the metrics map."""
    totals = {}
    for key, value in table.items():
        index = int.from_bytes(key, "little")
        counters = list(layout.METRICS_VALUE.iter_unpack(value))
        packets, size = sum(item[0] for item in counters), sum(item[1] for item in counters)
        if packets:
            totals[index // 2, index % 2] = (packets, size)
    return totals
