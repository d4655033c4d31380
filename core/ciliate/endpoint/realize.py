"""From decisions to the kernel: the one place that writes policy and ipcache through the datapath.

Everything is serialised by one lock, so that the kernel sees changes in an order that never opens what was denied:
identities of new prefixes, then policy entries that speak of them, then the ipcache entries that lead to them; and
the other way round when prefixes go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ciliate import atomicfile
from ciliate.datapath import Datapath, EndpointConfig
from ciliate.identity.local import LocalIdentities
from ciliate.ipcache import Ipcache, Source
from ciliate.policy.repository import EndpointPolicy, Repository

if TYPE_CHECKING:
    from ciliate.endpoint.model import Endpoint

log = logging.getLogger(__name__)


class Realizer:
    """Keeps the kernel's policy and ipcache equal to the repository and the ipcache table."""

    def __init__(
        self, datapath: Datapath, repository: Repository, ipcache: Ipcache, local: LocalIdentities, state_dir: Path
    ) -> None:
        self._datapath = datapath
        self._repository = repository
        self._ipcache = ipcache
        self._local = local
        self._local_file = state_dir / "cidr-identities.json"
        self._cidrs: set[Any] = set()
        self._lock = asyncio.Lock()
        self._resync: set[int] = set()
        self.endpoints: Mapping[int, Endpoint] = {}
        self.on_failure: Callable[[], None] = lambda: None

    def restore(self) -> None:
        """Take back the numbers of prefix identities, so that they mean the same after a restart."""
        data = atomicfile.read_json(self._local_file)
        if isinstance(data, dict):
            self._local.restore(data)

    async def attach(self, endpoint: Endpoint) -> None:
        """Connect an endpoint: its policy is in the kernel before its first packet can be."""
        async with self._lock:
            await self._widen_prefixes()
            self._repository.register_endpoint(endpoint.id, endpoint.identity, endpoint.named_ports)
            policy = self._repository.resolve(endpoint.id)
            await self._datapath.add_endpoint(self._config(endpoint, policy), policy.map_state)
            _realized(endpoint, policy)
            await self._settle()

    async def change_identity(self, endpoint: Endpoint) -> None:
        """Make the kernel follow an endpoint's new identity: its policy and what others see behind its addresses."""
        async with self._lock:
            await self._widen_prefixes()
            self._repository.register_endpoint(endpoint.id, endpoint.identity, endpoint.named_ports)
            policy = self._repository.resolve(endpoint.id)
            await self._sync(endpoint, policy)
            await self._datapath.update_endpoint(self._config(endpoint, policy))
            await self._settle()

    async def detach(self, endpoint: Endpoint) -> None:
        """Take an endpoint out of the kernel and of the repository."""
        async with self._lock:
            self._repository.unregister_endpoint(endpoint.id)
            self._resync.discard(endpoint.id)
            await self._datapath.remove_endpoint(endpoint.id)
            await self._settle()

    async def realize(self) -> None:
        """Bring every pending change of policy, identities and ipcache into the kernel."""
        async with self._lock:
            await self._widen_prefixes()
            await self._settle()

    async def resync(self) -> None:
        """Compare every endpoint's policy and the ipcache with the kernel and mend what differs."""
        async with self._lock:
            await self._widen_prefixes()
            await self._settle()
            for endpoint in list(self.endpoints.values()):
                await self._sync(endpoint, self._repository.resolve(endpoint.id))
            await self.write_ipcache(*self._ipcache.differs(await self._datapath.ipcache()))

    async def _widen_prefixes(self) -> None:
        added = self._repository.cidrs() - self._cidrs
        if not added:
            return
        identities = [self._local.acquire(prefix) for prefix in added]
        await self._store_local()
        self._repository.upsert_identities(identities)
        self._cidrs |= added
        for prefix, identity in zip(added, identities, strict=True):
            self._ipcache.upsert(prefix, identity.id, Source.CIDR)

    async def _settle(self) -> None:
        await self._apply_policy()
        removed = self._cidrs - self._repository.cidrs()
        for prefix in removed:
            self._ipcache.delete(prefix, Source.CIDR)
        await self.write_ipcache(*self._ipcache.take())
        if removed:
            await self._drop_prefixes(removed)

    async def _drop_prefixes(self, removed: Iterable[Any]) -> None:
        gone = []
        for prefix in removed:
            self._cidrs.discard(prefix)
            number = self._local.release(prefix)
            if number is not None:
                gone.append(number)
        await self._store_local()
        self._repository.remove_identities(gone)
        await self._apply_policy()

    async def _apply_policy(self) -> None:
        for delta in self._repository.drain_changes():
            endpoint = self.endpoints.get(delta.ep_id)
            if endpoint is None:
                continue
            try:
                await self._datapath.apply_policy(
                    delta.ep_id, delta.upserts, delta.deletes, delta.enforce_ingress, delta.enforce_egress
                )
            except OSError as error:
                self._failed(endpoint, error)
            else:
                _realized(endpoint, delta)
        revision = self._repository.revision
        for endpoint in self.endpoints.values():
            if endpoint.id not in self._resync:
                endpoint.policy_revision = revision

    def _failed(self, endpoint: Endpoint, error: OSError) -> None:
        log.error("endpoint %d: policy could not be written: %s; it is retried", endpoint.id, error)
        endpoint.note(f"policy could not be written: {error}")
        self._resync.add(endpoint.id)
        self.on_failure()

    async def retry(self) -> None:
        """Write the whole policy of endpoints whose last update failed; raises OSError while that goes on."""
        async with self._lock:
            for number in sorted(self._resync):
                endpoint = self.endpoints.get(number)
                if endpoint is not None:
                    await self._sync(endpoint, self._repository.resolve(number))
                self._resync.discard(number)

    async def _sync(self, endpoint: Endpoint, policy: EndpointPolicy) -> None:
        await self._datapath.sync_policy(endpoint.id, policy.map_state, policy.enforce_ingress, policy.enforce_egress)
        _realized(endpoint, policy)

    async def write_ipcache(self, upserts: Mapping[Any, int], deletes: set[Any]) -> None:
        """Write a set of ipcache changes; on failure they stay pending and OSError is raised."""
        try:
            if upserts:
                await self._datapath.upsert_ipcache(upserts)
            if deletes:
                await self._datapath.delete_ipcache(deletes)
        except OSError:
            self._ipcache.put_back([*upserts, *deletes])
            raise

    async def _store_local(self) -> None:
        await asyncio.to_thread(atomicfile.write_json, self._local_file, self._local.snapshot())

    def _config(self, endpoint: Endpoint, policy: EndpointPolicy) -> EndpointConfig:
        request = endpoint.request
        return EndpointConfig(
            id=endpoint.id,
            ifindex=request.host_ifindex,
            ifname=request.host_ifname,
            identity=endpoint.identity,
            ipv4=request.ipv4,
            ipv6=request.ipv6,
            mac=request.mac,
            node_mac=request.host_mac,
            enforce_ingress=policy.enforce_ingress,
            enforce_egress=policy.enforce_egress,
            external=request.external,
            through_stack=request.through_stack,
        )


def _realized(endpoint: Endpoint, policy: Any) -> None:
    endpoint.enforce_ingress = policy.enforce_ingress
    endpoint.enforce_egress = policy.enforce_egress
    endpoint.policy_revision = policy.revision
