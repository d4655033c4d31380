"""What modes ``none`` and ``portmap`` do: addresses, device, endpoint; in that order, and back where a step fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator

from ciliate.cni.modes import host_interface_name
from ciliate.cni.spec import Address, CniError, CniResult, ErrorCode, Interface, Request, Route
from ciliate.datapath import devices
from ciliate.endpoint.manager import EndpointExistsError
from ciliate.endpoint.model import Endpoint, EndpointRequest
from ciliate.ipam import Allocation, Ipam, IpamConflict, IpamError, IpamExhausted, attachment_owner, reserve
from ciliate.mtu import NodeMtu
from ciliate.plugin import PluginContext
from ciliate_cni.common import Mode, namespace

THROUGH_STACK = frozenset({"portmap"})
"""Modes whose endpoints are reached through the node's stack, also from pods of the same node."""
MAKERS = 4
"""Devices that are made at once: the kernel makes one after the other, and more threads are in each other's way."""
HOST_INTERFACE, CONTAINER_INTERFACE = 0, 1
"""Indexes into the result's interfaces."""


class VethMode(Mode):
    """Connects containers by veth pairs. One instance per name and agent."""

    def __init__(self, context: PluginContext, name: str = "none") -> None:
        super().__init__(context, name)
        self._config = context.config
        self._ipam = context.services.get(Ipam)  # type: ignore[type-abstract]
        self._mtu = context.services.get(NodeMtu)
        self._makers = asyncio.Semaphore(MAKERS)

    async def add(self, request: Request) -> CniResult:
        """Connect a container. Raises CniError, or what a part raised; either way nothing stays behind."""
        if request.config.prev_result is not None:
            text = f"prevResult: given, expected none: chaining-mode {self._name!r} has to be first in its list"
            raise CniError(ErrorCode.INVALID_CONFIGURATION, text)
        self._refuse_second(request)
        async with contextlib.AsyncExitStack() as undo:
            result = await self._connect(request, undo)
            # all is well: what is made stays
            undo.pop_all()
        return result

    async def _connect(self, request: Request, undo: contextlib.AsyncExitStack) -> CniResult:
        undo.push_async_callback(self._forget, *request.attachment)
        owner, config = address_owner(request), self._config
        with _address_errors():
            allocation, durable = await reserve(self._ipam, owner, config.enable_ipv4, config.enable_ipv6)
        # the disk takes the addresses while the kernel makes the rest
        saving = asyncio.ensure_future(durable)
        undo.push_async_callback(self._give_back, owner, saving)
        device = await self._make_device(request, allocation, undo)
        await self._limit(request, device.host_ifindex)
        endpoint = await self._create_endpoint(request, allocation, device)
        undo.push_async_callback(self._endpoints.delete, endpoint.id)
        with _address_errors():
            await saving
        return self._result(request, allocation, device)

    async def _give_back(self, owner: str, saving: asyncio.Future[None]) -> None:
        await asyncio.wait([saving])
        if saving.cancelled() or saving.exception() is None:
            await self._ipam.release(owner)

    async def _make_device(
        self, request: Request, allocation: Allocation, undo: contextlib.AsyncExitStack
    ) -> devices.Device:
        name = host_interface_name(*request.attachment)
        mtu = self._size(request)
        file = namespace(request)
        router = self._ipam.router
        wanted = devices.Wanted(allocation.ipv4, allocation.ipv6, router.ipv4, router.ipv6)

        def make() -> devices.Device:
            self._remember(request)
            return devices.connect_container(name, file, request.ifname, mtu, wanted)

        async with self._makers:
            # shielded, so that it is known whether the device is ours; where the name is taken it is somebody else's
            device = await _finished(devices.in_own_thread(make), name)
        undo.push_async_callback(asyncio.to_thread, devices.delete_device, name)
        return device

    def _through_stack(self, request: Request) -> bool:
        """Whether packets to it meet more than our programs: mapped ports, or the queue of a limit."""
        config = request.config
        return self._name in THROUGH_STACK or config.port_mappings or bool(config.limits.ingress_rate)

    def _size(self, request: Request) -> int:
        return request.config.mtu or self._mtu.current.route

    async def _create_endpoint(self, request: Request, allocation: Allocation, device: devices.Device) -> Endpoint:
        try:
            return await self._endpoints.create(
                EndpointRequest(
                    container_id=request.container_id,
                    container_ifname=request.ifname,
                    host_ifname=device.host_ifname,
                    host_ifindex=device.host_ifindex,
                    host_mac=device.host_mac,
                    mac=device.container_mac,
                    ipv4=allocation.ipv4,
                    ipv6=allocation.ipv6,
                    pod_namespace=request.pod_namespace,
                    pod_name=request.pod_name,
                    labels=request.config.labels,
                    netns=os.fstat(namespace(request)).st_ino,
                    mode=self._name,
                    through_stack=self._through_stack(request),
                    limits=request.config.limits,
                )
            )
        except EndpointExistsError as error:
            raise CniError(ErrorCode.ALREADY_CONNECTED, str(error)) from error

    def _result(self, request: Request, allocation: Allocation, device: devices.Device) -> CniResult:
        router, size = self._ipam.router, self._size(request)
        ips, routes = [], []
        for address, gateway, prefix, default in (
            (allocation.ipv4, router.ipv4, 32, "0.0.0.0/0"),
            (allocation.ipv6, router.ipv6, 128, "::/0"),
        ):
            if address is not None:
                ips.append(Address(f"{address}/{prefix}", str(gateway), CONTAINER_INTERFACE))
                routes.append(Route(default, str(gateway)))
        return CniResult(
            interfaces=[
                Interface(device.host_ifname, device.host_mac.hex(":"), mtu=size),
                Interface(request.ifname, device.container_mac.hex(":"), mtu=size, sandbox=request.netns),
            ],
            ips=ips,
            routes=routes,
        )

    async def status(self, request: Request) -> None:
        """Raise CniError where no address is left for another container."""
        used, capacity = len(set(self._ipam.owners().values())), self._ipam.capacity()
        if used >= capacity:
            raise CniError(ErrorCode.UNAVAILABLE, f"no address is free: {used} of {capacity} owners have theirs")

    async def _disconnect(self, container_id: str, ifname: str) -> None:
        endpoint = self._endpoints.find(container_id, ifname)
        if endpoint is not None:
            await self._endpoints.delete(endpoint.id)
        await asyncio.to_thread(devices.delete_device, host_interface_name(container_id, ifname))
        suffix = _owner_suffix(container_id, ifname)
        for owner in {owner for owner in self._ipam.owners().values() if owner.endswith(suffix)}:
            await self._ipam.release(owner)
        await self._forget(container_id, ifname)


@contextlib.contextmanager
def _address_errors() -> Iterator[None]:
    try:
        yield
    except IpamExhausted as error:
        raise CniError(ErrorCode.ADDRESSES_USED_UP, f"no address is free: {error}") from error
    except IpamConflict as error:
        raise CniError(ErrorCode.ALREADY_CONNECTED, str(error)) from error
    except IpamError as error:
        raise CniError(ErrorCode.IO_FAILURE, str(error)) from error


def address_owner(request: Request) -> str:
    """Who an address belongs to: the pod for people, the attachment to be unique."""
    pod = f"{request.pod_namespace}/{request.pod_name}" if request.pod_name else ""
    return attachment_owner(pod, *request.attachment)


def _owner_suffix(container_id: str, ifname: str) -> str:
    return attachment_owner("", container_id, ifname).removeprefix("-")


async def _finished(making: asyncio.Future[devices.Device], name: str) -> devices.Device:
    """The device once it is made; where the request is cancelled meanwhile it is removed again."""
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            await making
            await asyncio.to_thread(devices.delete_device, name)
        raise
