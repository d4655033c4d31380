"""From decisions to the kernel: the one place that writes policy and ipcache through the datapath.

Everything is serialised by one lock, so that the kernel sees changes in an order that never opens what was denied:
identities of new prefixes, then policy entries that speak of them, then the ipcache entries that lead to them; and
the other way round when prefixes go.

A policy that has more entries than an endpoint may have is compressed; where it still does not fit, the endpoint keeps
the policy that it has and says why.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ciliate.datapath import MAX_ENTRIES, Datapath, EndpointConfig, PolicyChange, PolicyTooLargeError
from ciliate.endpoint import options
from ciliate.endpoint.places import KernelPlaces, parts
from ciliate.identity.local import LocalIdentities
from ciliate.ipcache import Ipcache, Source
from ciliate.measure import POLICY_TIME, REGENERATION
from ciliate.policy import bounds
from ciliate.policy.compress import compressed
from ciliate.policy.mapstate import MapState
from ciliate.policy.repository import EndpointDelta, EndpointPolicy, Repository
from ciliate.policy.resolve import written_out
from ciliate.statefile import StateFile

if TYPE_CHECKING:
    from ciliate.endpoint.model import Endpoint

log = logging.getLogger(__name__)


class Enforced(Protocol):
    """Whatever says which directions are enforced."""

    @property
    def enforce_ingress(self) -> bool: ...
    @property
    def enforce_egress(self) -> bool: ...


class Realizer:
    """Keeps the kernel's policy and ipcache equal to the repository and the ipcache table."""

    def __init__(
        self, datapath: Datapath, repository: Repository, ipcache: Ipcache, local: LocalIdentities, state_dir: Path
    ) -> None:
        self._datapath = datapath
        self._repository = repository
        self._ipcache = ipcache
        self._local = local
        self.numbers = StateFile(state_dir / "cidr-identities.json")
        """Prefix -> number, as this node gave them."""
        self._cidrs: set[Any] = set()
        self._places = KernelPlaces(datapath, repository, local)
        self._stored: dict[str, int] = {}
        self._lock = asyncio.Lock()
        self._attached: set[int] = set()
        self._resync: set[int] = set()
        self._refused: set[int] = set()
        self._compressed: set[int] = set()
        self._widened = -1
        """State of the repository's prefixes of which everything is known."""
        self.entries: dict[int, int] = {}
        """How many entries of the policy map each endpoint has."""
        self.by_namespace: Counter[str] = Counter()
        """How many of them the endpoints of each namespace have."""
        self.endpoints: Mapping[int, Endpoint] = {}
        self.monitor_level = "medium"
        """The node's level of aggregation, which endpoints follow that have none of their own."""
        self.on_failure: Callable[[], None] = lambda: None

    def restore(self, numbers: Mapping[str, Any]) -> None:
        """Take back the numbers of prefix identities, so that they mean the same after a restart."""
        self._local.restore(numbers)
        self._stored = dict(numbers)

    async def attach(self, endpoint: Endpoint) -> None:
        """Connect an endpoint: its policy is in the kernel before its first packet can be."""
        async with self._lock:
            self._repository.register_endpoint(endpoint.id, endpoint.identity, endpoint.named_ports)
            await self._widen_prefixes()
            await self._add(endpoint, self._resolved(endpoint.id))
            self._attached.add(endpoint.id)
            await self._settle()

    def _resolved(self, number: int) -> EndpointPolicy:
        with REGENERATION.measured("policyCalculation"):
            return self._repository.resolve(number)

    async def _add(self, endpoint: Endpoint, policy: EndpointPolicy) -> None:
        config = self._config(endpoint, policy)
        try:
            state = await self._fitted(endpoint, policy)
            with REGENERATION.measured("bpfLoadProg"):
                await self._datapath.add_endpoint(config, state)
            self._realized(endpoint, policy, len(state))
        except PolicyTooLargeError as error:
            present = await self._datapath.present(config)
            if present is None:
                raise  # a new endpoint has no older policy that it could keep
            await self._datapath.add_endpoint(self._config(endpoint, present), present.map_state)
            _enforces(endpoint, present)
            self._count(endpoint, len(present.map_state))
            self._refuse(endpoint, error)

    async def change_identity(self, endpoint: Endpoint) -> None:
        """Make the kernel follow an endpoint's new identity: its policy and what others see behind its addresses."""
        async with self._lock:
            self._repository.register_endpoint(endpoint.id, endpoint.identity, endpoint.named_ports)
            await self._widen_prefixes()
            await self._sync(endpoint, self._resolved(endpoint.id))
            # what peers allow the new identity is in the kernel before anybody can see it
            await self._apply_policy()
            await self._datapath.update_endpoint(self._config(endpoint, endpoint))
            await self._settle()

    async def detach(self, endpoint: Endpoint) -> None:
        """Take an endpoint out of the kernel and of the repository."""
        async with self._lock:
            self._repository.unregister_endpoint(endpoint.id)
            for names in (self._attached, self._resync, self._refused, self._compressed):
                names.discard(endpoint.id)
            self._count(endpoint, 0)
            del self.entries[endpoint.id]
            await self._datapath.remove_endpoint(endpoint.id, endpoint.addresses)
            await self._settle()

    async def realize(self) -> None:
        """Bring every pending change of policy, identities and ipcache into the kernel."""
        async with self._lock:
            await self._widen_prefixes()
            await self._settle()

    async def write_addresses(self) -> None:
        """As `realize`, for those who changed nothing but the ipcache and what policies know of identities.

        Nothing here looks at what policies name: with thousands of prefixes that would cost more than the change.
        """
        async with self._lock:
            await self._widen_prefixes()
            await self._apply_policy()
            await self.write_ipcache(*self._ipcache.take())

    async def resync(self) -> None:
        """Compare every endpoint's policy and the ipcache with the kernel and mend what differs."""
        async with self._lock:
            await self._widen_prefixes()
            await self._settle()
            await self._datapath.refresh_policy()
            # those that are still being made write everything themselves
            for endpoint in [item for item in self.endpoints.values() if item.id in self._attached]:
                await self._sync(endpoint, self._resolved(endpoint.id))
            await self.write_ipcache(*await self._datapath.compare_ipcache(self._ipcache.entries()))
            await self._places.resync()

    async def _widen_prefixes(self) -> None:
        state = self._repository.prefix_changes
        if state == self._widened:
            return
        added = self._repository.wanted_cidrs() - self._cidrs
        if added:
            await self._add_prefixes(added)
        await self._places.add()
        self._widened = state

    async def _add_prefixes(self, added: set[Any]) -> None:
        """Nobody waits long for that: there can be tens of thousands, and others get their turn in between."""
        identities = {}
        try:
            for some in parts(list(added)):
                identities.update({prefix: self._local.acquire(prefix) for prefix in some})
                await asyncio.sleep(0)
            await self._store_local()
        except BaseException:
            for prefix in identities:
                self._local.release(prefix)
            raise
        for some in parts(list(identities)):
            self._repository.upsert_identities([identities[prefix] for prefix in some])
            self._cidrs.update(some)
            for prefix in some:
                self._ipcache.upsert(prefix, identities[prefix].id, Source.CIDR)
            await asyncio.sleep(0)

    async def _settle(self) -> None:
        await self._apply_policy()
        held = await self._held_prefixes()
        removed = self._cidrs - self._repository.wanted_cidrs() - held
        for some in parts(list(removed)):
            for prefix in some:
                self._ipcache.delete(prefix, Source.CIDR)
            await asyncio.sleep(0)
        await self.write_ipcache(*self._ipcache.take())
        if await self._places.write(held):
            await self._apply_policy()
        if removed:
            await self._drop_prefixes(removed)

    async def _held_prefixes(self) -> set[Any]:
        """Prefixes of which endpoints with an older policy speak. Entries for peers that are gone are taken away.

        Such numbers may be given to others, and mean nobody meanwhile.
        """
        if not self._refused:
            return set()
        used: set[int] = set()
        for number in self._refused & self.endpoints.keys():
            endpoint, keys = self.endpoints[number], await self._datapath.policy_entries(number)
            known, places = self._repository.cache.members, self._repository.cache.places
            gone = {key for key in keys if key.identity and key.identity not in known}
            gone |= {key for key in keys if key.place and key.place not in places}
            if gone:
                await self._datapath.apply_policy(number, {}, gone, endpoint.enforce_ingress, endpoint.enforce_egress)
            used.update(number for key in keys for number in (key.identity, key.place))
        held = {text for text, number in self._local.snapshot().items() if number in used}
        return {prefix for prefix in self._cidrs if str(prefix) in held}

    async def _drop_prefixes(self, removed: Iterable[Any]) -> None:
        gone = []
        for prefix in removed:
            self._cidrs.discard(prefix)
            number = self._local.release(prefix)
            if number is not None:
                gone.append(number)
        try:
            await self._store_local()
        except OSError as error:
            # the file knows prefixes that nobody names any more, which does no harm until it can be written again
            log.warning("prefix identities: %s", error)
        for some in parts(gone):
            self._repository.remove_identities(some)
            await asyncio.sleep(0)
        await self._apply_policy()

    async def _apply_policy(self) -> None:
        # one policy at a time: each is bounded, and all of them together are not
        for _ in iter(self._repository.settle_one, False):
            await asyncio.sleep(0)
        with POLICY_TIME.measured("total"):
            deltas = [delta for delta in self._repository.drain_changes() if delta.ep_id in self.endpoints]
        # the kernel has not exactly what a delta of these starts from, or there is none
        whole = self._refused | self._compressed | self._resync | {delta.ep_id for delta in deltas if delta.whole}
        whole |= {delta.ep_id for delta in deltas if self._beyond_share(self.endpoints[delta.ep_id], delta.size)}
        plain = [_change(delta) for delta in deltas if delta.ep_id not in whole]
        failed = await self._datapath.apply_policies(plain) if plain else {}
        for delta in deltas:
            endpoint = self.endpoints.get(delta.ep_id)
            if endpoint is not None:
                await self._applied(endpoint, delta, delta.ep_id in whole, failed.get(delta.ep_id))
        revision = self._repository.revision
        behind = self._resync | self._refused
        for endpoint in self.endpoints.values():
            if endpoint.id not in behind:
                endpoint.policy_revision = revision

    async def _applied(self, endpoint: Endpoint, delta: EndpointDelta, whole: bool, error: OSError | None) -> None:
        """Note what became of a delta; where it was not or cannot be written as it is, write the whole policy."""
        if not whole and error is None:
            self._realized(endpoint, delta, delta.size)
            return
        try:
            if error is not None and not isinstance(error, PolicyTooLargeError):
                raise error
            await self._sync(endpoint, self._resolved(endpoint.id))
        except OSError as reason:
            self._failed(endpoint, reason)

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
                    await self._sync(endpoint, self._resolved(number))
                self._resync.discard(number)

    async def _sync(self, endpoint: Endpoint, policy: EndpointPolicy) -> None:
        """Make the kernel's policy of an endpoint this one, or note why it cannot be; raises OSError else."""
        try:
            state = await self._fitted(endpoint, policy)
            with REGENERATION.measured("mapSync"):
                await self._datapath.sync_policy(endpoint.id, state, policy.enforce_ingress, policy.enforce_egress)
        except PolicyTooLargeError as error:
            self._refuse(endpoint, error)
        else:
            self._realized(endpoint, policy, len(state))
            self._resync.discard(endpoint.id)

    async def _fitted(self, endpoint: Endpoint, policy: EndpointPolicy) -> MapState:
        """The map state, compressed where it has too many entries. PolicyTooLargeError where there is none that fits.

        It is written out only if so: the product of peers and ports can be hundreds of times what there may be.
        """
        if policy.problem:
            raise PolicyTooLargeError(errno.E2BIG, policy.problem)
        tables, size = policy.tables, policy.size
        if size > MAX_ENTRIES:
            tables = await asyncio.to_thread(compressed, tables)
            size = sum(len(table) for _, table in tables)
            if size > MAX_ENTRIES:
                reason = f"it would take {size} entries of the policy map, and one endpoint may have {MAX_ENTRIES}"
                raise PolicyTooLargeError(errno.E2BIG, reason)
        if reason := self._beyond_share(endpoint, size):
            raise PolicyTooLargeError(errno.E2BIG, reason)
        if policy.size <= MAX_ENTRIES:
            self._compressed.discard(endpoint.id)
            return policy.map_state
        self._compressed.add(endpoint.id)
        endpoint.note(f"policy of {policy.size} entries compressed to {size}")
        return written_out(tables)

    def _beyond_share(self, endpoint: Endpoint, size: int) -> str:
        """Why a policy of so many entries is more than the endpoint's namespace may have; empty where it is not."""
        namespace, before = endpoint.request.pod_namespace, self.entries.get(endpoint.id, 0)
        if not namespace or size <= before:
            return ""
        total = self.by_namespace[namespace] - before + size
        if total <= bounds.NAMESPACE_ENTRIES:
            return ""
        there = f"the endpoints of one namespace may have {bounds.NAMESPACE_ENTRIES}"
        return f"namespace {namespace} would take {total} entries of the policy map, and {there}"

    def _count(self, endpoint: Endpoint, size: int) -> None:
        """Note how many entries an endpoint has."""
        namespace = endpoint.request.pod_namespace
        self.by_namespace[namespace] += size - self.entries.get(endpoint.id, 0)
        self.entries[endpoint.id] = size

    def _refuse(self, endpoint: Endpoint, error: PolicyTooLargeError) -> None:
        heaviest = self._repository.heaviest(endpoint.id)
        most = f", most by {heaviest}" if heaviest and heaviest not in str(error.strerror) else ""
        reason = f"revision {self._repository.revision} does not fit: {error.strerror}{most}; the older policy stays"
        if endpoint.id not in self._refused:
            log.error("endpoint %d (%s): policy %s", endpoint.id, endpoint.pod, reason)
            endpoint.note(f"policy {reason}")
        endpoint.policy_problem = reason
        self._refused.add(endpoint.id)

    def _realized(self, endpoint: Endpoint, policy: EndpointPolicy | EndpointDelta, size: int) -> None:
        _enforces(endpoint, policy)
        self._count(endpoint, size)
        endpoint.policy_revision = policy.revision
        endpoint.policy_problem = ""
        self._refused.discard(endpoint.id)

    async def write_ipcache(self, upserts: Mapping[bytes, bytes], deletes: set[bytes]) -> None:
        """Write a set of ipcache changes; on failure they stay pending and OSError is raised."""
        try:
            if upserts or deletes:
                await self._datapath.change_ipcache(upserts, deletes)
        except OSError:
            self._ipcache.put_back([*upserts, *deletes])
            raise

    async def save_numbers(self) -> None:
        """Write the numbers of prefixes again."""
        await self.numbers.write(self._snapshot)

    async def _store_local(self) -> None:
        if self.numbers.owed or self._local.snapshot() != self._stored:
            await self.numbers.write(self._snapshot)

    def _snapshot(self) -> dict[str, int]:
        self._stored = self._local.snapshot()
        return self._stored

    def _config(self, endpoint: Endpoint, policy: Enforced) -> EndpointConfig:
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
            link_local=request.link_local,
            monitor=options.monitor(endpoint.options, self.monitor_level),
        )


def _change(delta: EndpointDelta) -> PolicyChange:
    return PolicyChange(delta.ep_id, delta.upserts, delta.deletes, (delta.enforce_ingress, delta.enforce_egress))


def _enforces(endpoint: Endpoint, policy: Enforced) -> None:
    endpoint.enforce_ingress = policy.enforce_ingress
    endpoint.enforce_egress = policy.enforce_egress
