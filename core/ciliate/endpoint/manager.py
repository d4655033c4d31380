"""The endpoint manager: creates, relabels, restores and removes endpoints. One per agent, owned by its loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from ciliate.backoff import Backoff
from ciliate.endpoint import labelling, options
from ciliate.endpoint.cluster import Alone, Cluster
from ciliate.endpoint.events import WORKERS, EventQueue
from ciliate.endpoint.model import Endpoint, EndpointRequest
from ciliate.endpoint.realize import Realizer
from ciliate.endpoint.state import State
from ciliate.endpoint.store import EndpointStore
from ciliate.identity import HEALTH, INIT, Identity, is_reserved, reserved_identity
from ciliate.identity.backend import IdentityBackend
from ciliate.identity.filter import LabelFilter
from ciliate.ipcache import Ipcache, Source
from ciliate.labels import LabelSet
from ciliate.measure import REGENERATION
from ciliate.workload import NamedPorts, WorkloadRegistry, merge_ports

if TYPE_CHECKING:
    from ciliate.policy.repository import Repository

log = logging.getLogger(__name__)
MAX_ENDPOINTS = 65535
RETRY_BASE = 1.0
RETRY = Backoff(minimum=RETRY_BASE / 2, maximum=30.0)
"""Waits between attempts to make an endpoint follow an event; the attempts are counted by each endpoint."""
ENDING = (State.DISCONNECTING, State.DISCONNECTED)


class EndpointError(Exception):
    """An endpoint cannot be made or changed; the text names the field and what was expected."""


class EndpointMissingError(EndpointError):
    """There is no such endpoint."""


class EndpointExistsError(EndpointError):
    """There is an endpoint of this container interface, interface or address already."""


async def _nothing_before(endpoint: Endpoint) -> None:
    """What happens before an endpoint is connected where nobody asked for more."""


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
        self.label_filter = label_filter
        self._store = store
        self._grace = grace_period
        self._endpoints: dict[int, Endpoint] = {}
        self._attachments: dict[tuple[str, str], Endpoint] = {}
        self._addresses: dict[Any, Endpoint] = {}
        self.regenerations: Counter[str] = Counter()
        self._next_id = 1
        self._queues: dict[int, EventQueue] = {}
        self._workers = asyncio.Semaphore(WORKERS)
        self._previous: dict[int, list[int]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self.on_created: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_deleted: Callable[[Endpoint], None] = lambda endpoint: None
        self.before_use: Callable[[Endpoint], Awaitable[None]] = _nothing_before
        """Called before a new endpoint is connected; what it raises, the endpoint's creation raises."""
        self.before_external: Callable[[], Awaitable[None]] = _nothing
        """Awaited before an endpoint on another plugin's device: that plugin may have given the node addresses."""
        self.told: Cluster = Alone()
        realizer.endpoints = self._endpoints

    def endpoints(self) -> list[Endpoint]:
        """Every endpoint, by id."""
        return [self._endpoints[number] for number in sorted(self._endpoints)]

    def events(self) -> dict[str, int]:
        """How many events of endpoints wait and run."""
        queues = self._queues.values()
        return {
            "waiting": sum(len(queue.waiting) for queue in queues),
            "running": sum(queue.running for queue in queues),
        }

    def get(self, endpoint_id: int) -> Endpoint:
        """The endpoint of that id; EndpointMissingError where there is none."""
        try:
            return self._endpoints[endpoint_id]
        except KeyError:
            raise EndpointMissingError(f"id: endpoint {endpoint_id} does not exist") from None

    def find(self, container_id: str, ifname: str) -> Endpoint | None:
        """The endpoint of one container interface, or None."""
        return self._attachments.get((container_id, ifname))

    def holder(self, address: Any) -> Endpoint | None:
        """The endpoint that has an address, or None."""
        return self._addresses.get(address)

    def _enter(self, endpoint: Endpoint) -> None:
        self._endpoints[endpoint.id] = endpoint
        self._attachments[endpoint.request.container_id, endpoint.request.container_ifname] = endpoint
        self._addresses.update(dict.fromkeys(endpoint.addresses, endpoint))

    def _leave(self, endpoint: Endpoint) -> None:
        if self._endpoints.pop(endpoint.id, None) is None:
            return
        self._attachments.pop((endpoint.request.container_id, endpoint.request.container_ifname), None)
        for address in endpoint.addresses:
            self._addresses.pop(address, None)

    async def create(self, request: EndpointRequest) -> Endpoint:
        """Connect a new pod. When this returns its policy is enforced and its device is up.

        Raises EndpointExistsError for a container interface or address in use, EndpointError where ids are used up,
        and what the identity backend or the datapath raise; then nothing of it stays behind.
        """
        self._refuse_duplicate(request)
        endpoint = Endpoint(self._free_id(), request, LabelSet())
        self._enter(endpoint)
        async with self._queue(endpoint).turn():
            endpoint.move(State.WAITING_FOR_IDENTITY, "created")
            try:
                with REGENERATION.measured("total"):
                    await self._bring_up(endpoint)
            except BaseException:
                # also on cancellation: a pod whose runtime gave up must leave nothing
                await asyncio.shield(self._dismantle(endpoint))
                raise
        self.on_created(endpoint)
        return endpoint

    async def _bring_up(self, endpoint: Endpoint) -> None:
        endpoint.labels = self._labels_of(endpoint)
        identity = await self._acquire_identity(endpoint.labels)
        endpoint.identity = identity.id
        # while the disk takes the record the kernel is written; what a crash leaves in between goes at the next start
        saving = self._store.save(endpoint)
        try:
            self._regenerating(endpoint)
            self._repository.upsert_identities([identity])
            self._publish(endpoint)
            if endpoint.request.external:
                await self.before_external()
            await self.before_use(endpoint)
            await self._realizer.attach(endpoint)
        finally:
            await saving
        self.regenerations["success"] += 1
        endpoint.move(State.READY, f"ready with identity {identity.id}")

    async def delete(self, endpoint_id: int) -> list[str]:
        """Remove an endpoint from the kernel, the identity backend and the disk; EndpointMissingError where unknown.

        Raises what the datapath raises: the endpoint is still there then and can be deleted again. Returns what else
        could not be done. Whoever comes while it goes shares the outcome.
        """
        endpoint = self.get(endpoint_id)
        return await self._queue(endpoint).submit("delete", partial(self._delete, endpoint))

    async def _delete(self, endpoint: Endpoint) -> list[str]:
        if endpoint.state is State.DISCONNECTED:
            return []
        if endpoint.state is not State.DISCONNECTING:
            endpoint.move(State.DISCONNECTING, "deleted")
        problems = await self._dismantle(endpoint)
        self.on_deleted(endpoint)
        return problems

    async def _dismantle(self, endpoint: Endpoint) -> list[str]:
        self._cancel_retry(endpoint)
        for prefix in endpoint.prefixes:
            self._ipcache.delete(prefix, Source.LOCAL)
        self.told.withdraw(endpoint.addresses)
        await self._realizer.detach(endpoint)
        self._leave(endpoint)
        self._queues.pop(endpoint.id, None)
        problems = []
        steps: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
            (f"identity {number} could not be released", partial(self._release_identity, number))
            for number in [*self._previous.pop(endpoint.id, []), endpoint.identity]
            if number
        ]
        steps.append(("its record could not be removed", partial(self._store.remove, endpoint.id)))
        for text, step in steps:
            try:
                await step()
            except Exception as error:  # a store or disk of any kind; what is left is told, and the rest still done
                log.error("endpoint %d: %s: %s", endpoint.id, text, error)
                problems.append(f"endpoint {endpoint.id}: {text}: {error}")
        if endpoint.state not in ENDING:
            endpoint.move(State.DISCONNECTING, "could not be made")
        endpoint.move(State.DISCONNECTED, "disconnected")
        if endpoint.identity:
            self._tell_policy(endpoint.identity)
        return problems

    async def relabel(self, endpoint: Endpoint) -> bool:
        """Work out an endpoint's labels and ports anew and follow a change; False where nothing changed or it failed.

        The old identity is released only after the grace period, so that peers that still see it are not cut off.
        Where no new one can be had within that time the endpoint becomes ``init`` rather than keep its old rights.
        """
        return await self._queue(endpoint).submit("relabel", partial(self._relabel, endpoint))

    async def _relabel(self, endpoint: Endpoint) -> bool:
        if endpoint.state in ENDING or (endpoint.state is State.READY and not self._changed(endpoint)):
            return False
        return await self._attempt(endpoint, "relabel", self._follow)

    def _changed(self, endpoint: Endpoint) -> bool:
        labels, ports = self._labels_of(endpoint), self.named_ports(endpoint)
        return bool(endpoint.failures) or labels != endpoint.labels or ports != endpoint.named_ports

    async def regenerate(self, endpoint: Endpoint) -> bool:
        """Write an endpoint's policy, entries and filters anew; False where it failed (``last_error`` says why)."""
        return await self._queue(endpoint).submit("regenerate", partial(self._regenerate, endpoint))

    async def _regenerate(self, endpoint: Endpoint) -> bool:
        if endpoint.state in ENDING:
            raise EndpointMissingError(f"id: endpoint {endpoint.id} is {endpoint.state}")
        return await self._attempt(endpoint, "regenerate", partial(self._follow, rewrite=True))

    async def change_mac(self, endpoint: Endpoint, mac: bytes) -> bool:
        """Follow another MAC address of the pod's device; False where that failed, and is tried again."""
        if endpoint.request.mac == mac:
            return True
        endpoint.note(f"its device has MAC {mac.hex(':')} now")
        endpoint.request = msgspec.structs.replace(endpoint.request, mac=mac)
        return await self.regenerate(endpoint)

    async def configure(self, endpoint: Endpoint, changes: Mapping[str, str]) -> None:
        """Change options of one endpoint; OptionError refuses them. EndpointError: noted, but not in force yet."""
        own = options.changed(endpoint.options, changes)
        if own != endpoint.options:
            endpoint.options = own
            endpoint.note(f"options changed: {', '.join(f'{name}={value}' for name, value in changes.items())}")
        if not await self.regenerate(endpoint):
            raise EndpointError(f"endpoint {endpoint.id}: {endpoint.last_error}; it is retried")

    async def follow_node(self) -> None:
        """Write endpoints with options of their own anew: the node's changed, on which the rest of them depends."""
        await asyncio.gather(*(self.regenerate(endpoint) for endpoint in self.endpoints() if endpoint.options))

    async def change_labels(self, endpoint: Endpoint, add: LabelSet, delete: LabelSet) -> None:
        """Add and delete a user's labels. LabelChangeError refuses them; EndpointError: noted, but not in force yet."""
        labelling.change(endpoint, add, delete)
        endpoint.note(f"labels changed by a user: {labelling.summary(add, delete)}")
        await self.relabel(endpoint)
        if endpoint.state not in ENDING:
            await self._store.save(endpoint)
        if endpoint.failures:
            raise EndpointError(f"endpoint {endpoint.id}: labels are noted, {endpoint.last_error}; it is retried")

    def label_document(self, endpoint: Endpoint) -> dict[str, Any]:
        """An endpoint's labels as the API shows them."""
        return labelling.document(endpoint, self.label_filter)

    async def _attempt(self, endpoint: Endpoint, event: str, work: Callable[[Endpoint], Awaitable[None]]) -> bool:
        self._cancel_retry(endpoint)
        try:
            with REGENERATION.measured("total"):
                await work(endpoint)
        except Exception as error:  # store, disk and kernel refuse in many ways; it shows in the status and is retried
            self.regenerations["fail"] += 1
            self._retry_later(endpoint, event, f"{type(error).__name__}: {error}")
            return False
        self.regenerations["success"] += 1
        endpoint.failures, endpoint.last_error = 0, ""
        return True

    async def _follow(self, endpoint: Endpoint, rewrite: bool = False) -> None:
        """Labels, identity, policy, kernel: in this order. What fails on the way is done again by the next attempt."""
        labels, old = self._labels_of(endpoint), endpoint.identity
        pending: Exception | None = None
        if labels != endpoint.labels or endpoint.unresolved_since:
            pending = await self._resolve(endpoint, labels)
        try:
            await self._store.save(endpoint)
        except OSError as error:
            # a full disk must not keep old rights alive: the kernel follows, the record is written by the next attempt
            pending = pending or error
        self._regenerating(endpoint)
        self._publish(endpoint)
        await (self._realizer.attach(endpoint) if rewrite else self._realizer.change_identity(endpoint))
        text = f"identity {old} became {endpoint.identity}" if old != endpoint.identity else "regenerated"
        endpoint.move(State.READY, text)
        for number in self._previous.pop(endpoint.id, []):
            self._release_later(number)
        if pending is not None:
            raise pending

    async def _resolve(self, endpoint: Endpoint, labels: LabelSet) -> Exception | None:
        """Give an endpoint the identity of its labels, or ``init`` and the reason once the grace period is over."""
        if endpoint.state is not State.WAITING_FOR_IDENTITY:
            endpoint.move(State.WAITING_FOR_IDENTITY, "labels changed")
        endpoint.unresolved_since = endpoint.unresolved_since or time.monotonic()
        reason: Exception | None = None
        try:
            async with asyncio.timeout(max(self._grace_left(endpoint), RETRY_BASE)):
                identity = await self._acquire_identity(labels)
        except Exception as error:
            if self._grace_left(endpoint) > 0:
                raise
            identity, reason = reserved_identity(INIT), error
        else:
            endpoint.unresolved_since = 0.0
        old, endpoint.labels, endpoint.identity = endpoint.identity, labels, identity.id
        self._repository.upsert_identities([identity])
        self._previous.setdefault(endpoint.id, []).append(old)
        self._tell_policy(old)
        return reason

    def _grace_left(self, endpoint: Endpoint) -> float:
        return endpoint.unresolved_since + self._grace - time.monotonic()

    def _retry_later(self, endpoint: Endpoint, event: str, error: str) -> None:
        endpoint.failures += 1
        endpoint.last_error = f"{event} failed: {error}"
        endpoint.note(endpoint.last_error)
        delay = RETRY.duration(endpoint.failures)
        if endpoint.unresolved_since and endpoint.identity != INIT:
            delay = min(delay, max(self._grace_left(endpoint), 0.0))
        log.warning("endpoint %d: %s; next attempt in %.1f s", endpoint.id, endpoint.last_error, delay)
        again = self.relabel if event == "relabel" else self.regenerate
        loop = asyncio.get_running_loop()
        self._timers[endpoint.id] = loop.call_later(delay, lambda: self._keep(again(endpoint), f"retry-{event}"))

    def _cancel_retry(self, endpoint: Endpoint) -> None:
        timer = self._timers.pop(endpoint.id, None)
        if timer is not None:
            timer.cancel()

    def _queue(self, endpoint: Endpoint) -> EventQueue:
        return self._queues.setdefault(endpoint.id, EventQueue(self._workers))

    async def relabel_pods(self, pods: Collection[str]) -> None:
        """Relabel the endpoints of these pods (``namespace/name``)."""
        await asyncio.gather(*(self.relabel(endpoint) for endpoint in self.endpoints() if endpoint.pod in pods))

    def clashing(self, identities: Iterable[Identity]) -> list[Endpoint]:
        """Endpoints whose number stands for other labels in ``identities``: the store was lost, others were faster."""
        labels = {identity.id: identity.labels for identity in identities}
        return [item for item in self.endpoints() if labels.get(item.identity, item.labels) != item.labels]

    async def resolve_anew(self, endpoint: Endpoint) -> None:
        """Give an endpoint another identity, though its labels are the same."""
        endpoint.labels = LabelSet()
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
                await self._store.remove(endpoint.id)
                continue
            self._enter(endpoint)
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
        # pods may have been told between the last run's end and its last record
        before, endpoint.labels = endpoint.labels, self._labels_of(endpoint)
        hint = endpoint.identity if endpoint.labels == before else 0
        identity = await self._acquire_identity(endpoint.labels, hint)
        if identity.id != endpoint.identity:
            log.warning("endpoint %d: identity %d became %d", endpoint.id, endpoint.identity, identity.id)
            endpoint.identity = identity.id
            await self._store.save(endpoint)
        self._repository.upsert_identities([identity])
        self._publish(endpoint)

    async def stop(self) -> None:
        """End pending events and releases; endpoints stay as they are in the kernel."""
        for timer in self._timers.values():
            timer.cancel()
        await asyncio.gather(*(queue.stop() for queue in self._queues.values()))
        for task in list(self._releases):
            task.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)
        await asyncio.to_thread(self._store.close)

    def _labels_of(self, endpoint: Endpoint) -> LabelSet:
        request = endpoint.request
        known = self._workloads.pod(request.pod_namespace, request.pod_name) is not None
        told = self._workloads.identity_labels(request.pod_namespace, request.pod_name, request.labels)
        # of a pod that was forgotten the last word counts
        if told is not None and (known or not len(endpoint.orchestration)):
            endpoint.orchestration = told
        return labelling.identity_labels(endpoint, self.label_filter)

    def named_ports(self, endpoint: Endpoint) -> NamedPorts:
        """The named ports of the endpoint's pod."""
        pod = self._workloads.pod(endpoint.request.pod_namespace, endpoint.request.pod_name)
        return pod.ports if pod else {}

    def _regenerating(self, endpoint: Endpoint) -> None:
        endpoint.named_ports = self.named_ports(endpoint)
        if endpoint.state is not State.WAITING_TO_REGENERATE:
            endpoint.move(State.WAITING_TO_REGENERATE, f"identity {endpoint.identity}")
        endpoint.move(State.REGENERATING, "writing policy and datapath")

    def _publish(self, endpoint: Endpoint) -> None:
        """Tell ipcache and other nodes whose addresses these are, and policy what the pod's ports are called."""
        for prefix in endpoint.prefixes:
            self._ipcache.upsert(prefix, endpoint.identity, Source.LOCAL)
        self.told.publish(endpoint.addresses, endpoint.identity, endpoint.id, self.named_ports(endpoint))
        self._tell_policy(endpoint.identity)

    def tell_policy(self, identities: Iterable[int]) -> None:
        """Tell policy anew what the ports of these identities' pods are called: other nodes said more."""
        for identity in identities:
            self._tell_policy(identity)

    def _tell_policy(self, identity: int) -> None:
        same = [endpoint for endpoint in self._endpoints.values() if endpoint.identity == identity]
        ports = merge_ports([*(self.named_ports(endpoint) for endpoint in same), self.told.ports(identity)])
        if same or ports:
            self._repository.set_peer_ports(identity, ports)

    async def _acquire_identity(self, labels: LabelSet, hint: int = 0) -> Identity:
        for number in (INIT, HEALTH):
            if labels == reserved_identity(number).labels:
                return reserved_identity(number)
        return await (self._backend.allocate(labels, hint) if hint else self._backend.allocate(labels))

    async def _release_identity(self, number: int) -> None:
        if not is_reserved(number):
            await self._backend.release(number)

    def _release_later(self, number: int) -> None:
        async def release() -> None:
            await asyncio.sleep(self._grace)
            await self._release_identity(number)
            await self._realizer.realize()

        self._keep(release(), f"release-identity-{number}")

    def _keep(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._releases.add(task)
        task.add_done_callback(self._kept_done)

    def _kept_done(self, task: asyncio.Task[Any]) -> None:
        self._releases.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed: %s", task.get_name(), task.exception())

    def _refuse_duplicate(self, request: EndpointRequest) -> None:
        if self.find(request.container_id, request.container_ifname) is not None:
            interface = f"{request.container_id}/{request.container_ifname}"
            raise EndpointExistsError(f"container interface {interface}: has an endpoint already")
        for address in (request.ipv4, request.ipv6):
            holder = self._addresses.get(address) if address is not None else None
            if holder is not None:
                raise EndpointExistsError(f"address {address}: belongs to endpoint {holder.id}")

    def _free_id(self) -> int:
        for offset in range(MAX_ENDPOINTS):
            candidate = (self._next_id - 1 + offset) % MAX_ENDPOINTS + 1
            if candidate not in self._endpoints:
                self._next_id = candidate + 1
                return candidate
        raise EndpointError(f"endpoint ids: all {MAX_ENDPOINTS} are in use")
