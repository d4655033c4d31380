"""The endpoint manager: creates, relabels, restores and removes endpoints. One per agent, owned by its loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_network
from typing import TYPE_CHECKING

from ciliate.endpoint.model import Endpoint, EndpointRequest
from ciliate.endpoint.realize import Realizer
from ciliate.endpoint.state import State
from ciliate.endpoint.store import EndpointStore
from ciliate.identity import INIT, Identity, is_reserved, reserved_identity
from ciliate.identity.backend import IdentityBackend
from ciliate.identity.filter import LabelFilter
from ciliate.ipcache import Ipcache, Source
from ciliate.labels import LabelSet
from ciliate.workload import WorkloadRegistry

if TYPE_CHECKING:
    from ciliate.policy.repository import Repository

log = logging.getLogger(__name__)
MAX_ENDPOINTS = 65535


class EndpointError(Exception):
    """An endpoint cannot be made or found; the text names the field and what was expected."""


class EndpointExistsError(EndpointError):
    """There is an endpoint of this container interface, interface or address already."""


async def _nothing() -> None:
    """What happens where nobody asked for more."""


class EndpointManager:
    """Every endpoint of the node."""

    def __init__(
        self,
        *,
        realizer: Realizer,
        repository: Repository,
        backend: IdentityBackend,
        ipcache: Ipcache,
        workloads: WorkloadRegistry,
        label_filter: LabelFilter,
        store: EndpointStore,
        grace_period: float = 5.0,
    ) -> None:
        self._realizer = realizer
        self._repository = repository
        self._backend = backend
        self._ipcache = ipcache
        self._workloads = workloads
        self._filter = label_filter
        self._store = store
        self._grace = grace_period
        self._endpoints: dict[int, Endpoint] = {}
        self._next_id = 1
        self._releases: set[asyncio.Task[None]] = set()
        self.on_created: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_deleted: Callable[[Endpoint], None] = lambda endpoint: None
        self.before_external: Callable[[], Awaitable[None]] = _nothing
        """Awaited before an endpoint on another plugin's device: that plugin may have given the node addresses."""
        realizer.endpoints = self._endpoints

    def endpoints(self) -> list[Endpoint]:
        """Every endpoint, by id."""
        return [self._endpoints[number] for number in sorted(self._endpoints)]

    def get(self, endpoint_id: int) -> Endpoint:
        """The endpoint of that id; EndpointError where there is none."""
        try:
            return self._endpoints[endpoint_id]
        except KeyError:
            raise EndpointError(f"endpoint {endpoint_id}: there is no endpoint of this id") from None

    def find(self, container_id: str, ifname: str) -> Endpoint | None:
        """The endpoint of one container interface, or None."""
        for endpoint in self._endpoints.values():
            request = endpoint.request
            if request.container_id == container_id and request.container_ifname == ifname:
                return endpoint
        return None

    async def create(self, request: EndpointRequest) -> Endpoint:
        """Connect a new pod. When this returns its policy is enforced and its device is up.

        Raises EndpointExistsError for a container interface or address in use, EndpointError where ids are used up,
        and what the identity backend or the datapath raise; then nothing of it stays behind.
        """
        self._refuse_duplicate(request)
        endpoint = Endpoint(self._free_id(), request, self._labels_of(request))
        self._endpoints[endpoint.id] = endpoint
        endpoint.move(State.WAITING_FOR_IDENTITY, "created")
        try:
            await self._bring_up(endpoint)
        except BaseException:
            # also on cancellation: a pod whose runtime gave up must leave nothing
            await asyncio.shield(self._dismantle(endpoint))
            raise
        self.on_created(endpoint)
        return endpoint

    async def _bring_up(self, endpoint: Endpoint) -> None:
        identity = await self._acquire_identity(endpoint.labels)
        endpoint.identity = identity.id
        await asyncio.to_thread(self._store.save, endpoint)
        self._regenerating(endpoint)
        self._repository.upsert_identities([identity])
        self._publish(endpoint)
        if endpoint.request.external:
            await self.before_external()
        await self._realizer.attach(endpoint)
        endpoint.move(State.READY, f"ready with identity {identity.id}")

    async def delete(self, endpoint_id: int) -> None:
        """Remove an endpoint from the kernel, the identity backend and the disk; EndpointError where unknown."""
        endpoint = self.get(endpoint_id)
        if not endpoint.move(State.DISCONNECTING, "deleted"):
            raise EndpointError(f"endpoint {endpoint_id}: is {endpoint.state} and cannot be deleted now")
        await asyncio.shield(self._dismantle(endpoint))
        self.on_deleted(endpoint)

    async def _dismantle(self, endpoint: Endpoint) -> None:
        for address in endpoint.addresses:
            self._ipcache.delete(ip_network(address), Source.LOCAL)
        await self._realizer.detach(endpoint)
        if endpoint.identity:
            await self._release_identity(endpoint.identity)
        await asyncio.to_thread(self._store.remove, endpoint.id)
        self._endpoints.pop(endpoint.id, None)
        endpoint.state = State.DISCONNECTED
        if endpoint.identity:
            self._tell_policy(endpoint.identity)

    async def relabel(self, endpoint: Endpoint) -> bool:
        """Work out an endpoint's labels anew and follow a change of identity; False where nothing changed.

        The old identity is released only after the grace period, so that peers that still see it are not cut off.
        """
        labels = self._labels_of(endpoint.request)
        if labels == endpoint.labels or endpoint.state is not State.READY:
            return False
        endpoint.move(State.WAITING_FOR_IDENTITY, "labels changed")
        identity = await self._acquire_identity(labels)
        old, endpoint.labels, endpoint.identity = endpoint.identity, labels, identity.id
        await asyncio.to_thread(self._store.save, endpoint)
        self._regenerating(endpoint)
        self._repository.upsert_identities([identity])
        self._publish(endpoint)
        self._tell_policy(old)
        await self._realizer.change_identity(endpoint)
        endpoint.move(State.READY, f"identity {old} became {identity.id}")
        self._release_later(old)
        return True

    async def relabel_pods(self, pods: set[str]) -> None:
        """Relabel the endpoints of these pods (``namespace/name``)."""
        for endpoint in self.endpoints():
            if endpoint.pod in pods and endpoint.id in self._endpoints:
                await self.relabel(endpoint)

    async def restore(self, present: Mapping[str, int]) -> list[Endpoint]:
        """Take over the endpoints on disk. ``present`` maps the node's device names to their interface indexes.

        Returns those whose device is gone: they are removed and their addresses may be released.
        """
        await asyncio.to_thread(self._store.open)
        lost = []
        for endpoint in await asyncio.to_thread(self._store.load):
            request = endpoint.request
            if present.get(request.host_ifname) != request.host_ifindex:
                log.warning("endpoint %d (%s): its device is gone, it is removed", endpoint.id, endpoint.pod)
                lost.append(endpoint)
                await asyncio.to_thread(self._store.remove, endpoint.id)
                continue
            self._endpoints[endpoint.id] = endpoint
            endpoint.move(State.RESTORING, "restored from disk")
        for endpoint in self.endpoints():
            await self._restore_identity(endpoint)
        for endpoint in self.endpoints():
            self._regenerating(endpoint)
            await self._realizer.attach(endpoint)
            endpoint.move(State.READY, "restored")
        for endpoint in lost:
            await self._realizer.detach(endpoint)
        return lost

    async def _restore_identity(self, endpoint: Endpoint) -> None:
        identity = await self._acquire_identity(endpoint.labels)
        if identity.id != endpoint.identity:
            log.warning("endpoint %d: identity %d became %d", endpoint.id, endpoint.identity, identity.id)
            endpoint.identity = identity.id
            await asyncio.to_thread(self._store.save, endpoint)
        self._repository.upsert_identities([identity])
        self._publish(endpoint)

    async def stop(self) -> None:
        """End pending releases; endpoints stay as they are in the kernel."""
        for task in list(self._releases):
            task.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)

    def _labels_of(self, request: EndpointRequest) -> LabelSet:
        labels = self._workloads.identity_labels(request.pod_namespace, request.pod_name, request.labels)
        filtered = self._filter.apply(labels) if labels is not None else LabelSet()
        return filtered if len(filtered) else reserved_identity(INIT).labels

    def _named_ports(self, endpoint: Endpoint) -> dict[str, list[tuple[str, int]]]:
        pod = self._workloads.pod(endpoint.request.pod_namespace, endpoint.request.pod_name)
        return pod.ports if pod else {}

    def _regenerating(self, endpoint: Endpoint) -> None:
        endpoint.named_ports = self._named_ports(endpoint)
        endpoint.move(State.WAITING_TO_REGENERATE, f"identity {endpoint.identity}")
        endpoint.move(State.REGENERATING, "writing policy and datapath")

    def _publish(self, endpoint: Endpoint) -> None:
        """Tell ipcache and policy whose addresses these are; policy asks for ipBlocks that cover pods."""
        for address in endpoint.addresses:
            self._ipcache.upsert(ip_network(address), endpoint.identity, Source.LOCAL)
        self._tell_policy(endpoint.identity)

    def _tell_policy(self, identity: int) -> None:
        same = [endpoint for endpoint in self._endpoints.values() if endpoint.identity == identity]
        self._repository.set_addresses(identity, [ip_network(item) for end in same for item in end.addresses])
        for endpoint in same:
            self._repository.set_peer_ports(identity, self._named_ports(endpoint))

    async def _acquire_identity(self, labels: LabelSet) -> Identity:
        if labels == reserved_identity(INIT).labels:
            return reserved_identity(INIT)
        return await self._backend.allocate(labels)

    async def _release_identity(self, number: int) -> None:
        if not is_reserved(number):
            await self._backend.release(number)

    def _release_later(self, number: int) -> None:
        async def release() -> None:
            await asyncio.sleep(self._grace)
            await self._release_identity(number)
            await self._realizer.realize()

        task = asyncio.create_task(release(), name=f"release-identity-{number}")
        self._releases.add(task)
        task.add_done_callback(self._release_done)

    def _release_done(self, task: asyncio.Task[None]) -> None:
        self._releases.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed: %s", task.get_name(), task.exception())

    def _refuse_duplicate(self, request: EndpointRequest) -> None:
        if self.find(request.container_id, request.container_ifname) is not None:
            interface = f"{request.container_id}/{request.container_ifname}"
            raise EndpointExistsError(f"container interface {interface}: has an endpoint already")
        wanted = {address for address in (request.ipv4, request.ipv6) if address is not None}
        for endpoint in self._endpoints.values():
            if taken := wanted.intersection(endpoint.addresses):
                raise EndpointExistsError(f"address {taken.pop()}: belongs to endpoint {endpoint.id}")

    def _free_id(self) -> int:
        for offset in range(MAX_ENDPOINTS):
            candidate = (self._next_id - 1 + offset) % MAX_ENDPOINTS + 1
            if candidate not in self._endpoints:
                self._next_id = candidate + 1
                return candidate
        raise EndpointError(f"endpoint ids: all {MAX_ENDPOINTS} are in use")
