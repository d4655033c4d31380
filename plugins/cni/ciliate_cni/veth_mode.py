"""What mode ``none`` does: addresses, device, endpoint; in that order, and back where a step fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from ciliate.cni.modes import Attachment, AttachmentStore, host_interface_name
from ciliate.cni.spec import (
    Address,
    CniError,
    CniResult,
    ErrorCode,
    Interface,
    Request,
    Route,
    result_addresses,
)
from ciliate.datapath import devices
from ciliate.datapath.errors import DatapathError
from ciliate.endpoint.manager import EndpointExistsError, EndpointManager
from ciliate.endpoint.model import Endpoint, EndpointRequest
from ciliate.ipam import Allocation, Ipam, IpamExhausted, attachment_owner
from ciliate.plugin import PluginContext
from ciliate_cni.inspect import container_addresses

log = logging.getLogger(__name__)
MODE = "none"
HOST_INTERFACE, CONTAINER_INTERFACE = 0, 1
"""Indexes into the result's interfaces."""


class VethMode:
    """Connects containers by veth pairs. One instance per agent."""

    def __init__(self, context: PluginContext) -> None:
        self._config = context.config
        self._ipam = context.services.get(Ipam)  # type: ignore[type-abstract]
        self._endpoints = context.services.get(EndpointManager)
        self._attachments = AttachmentStore(Path(context.state_dir) / "cni")

    async def start(self) -> None:
        """Nothing to prepare."""

    async def stop(self) -> None:
        """Containers stay connected."""

    async def add(self, request: Request) -> CniResult:
        """Connect a container. Raises CniError, or what a part raised; either way nothing stays behind."""
        if request.config.prev_result is not None:
            text = "prevResult: given, expected none: chaining-mode 'none' has to be the first plugin of its list"
            raise CniError(ErrorCode.INVALID_CONFIGURATION, text)
        if self._endpoints.find(*request.attachment) is not None:
            raise _already_connected(request)
        async with contextlib.AsyncExitStack() as undo:
            try:
                result = await self._connect(request, undo)
            except DatapathError as error:
                raise CniError(ErrorCode.DATAPATH_FAILURE, str(error)) from error
            # all is well: what is made stays
            undo.pop_all()
        return result

    async def _connect(self, request: Request, undo: contextlib.AsyncExitStack) -> CniResult:
        await self._remember(request, undo)
        allocation = await self._allocate(request, undo)
        device = await self._make_device(request, allocation, undo)
        endpoint = await self._create_endpoint(request, allocation, device)
        undo.push_async_callback(self._endpoints.delete, endpoint.id)
        return self._result(request, allocation, device)

    async def _remember(self, request: Request, undo: contextlib.AsyncExitStack) -> None:
        attachment = Attachment(request.config.name, *request.attachment, MODE)
        undo.push_async_callback(self._forget, *request.attachment)
        await asyncio.to_thread(self._attachments.save, attachment)

    async def _allocate(self, request: Request, undo: contextlib.AsyncExitStack) -> Allocation:
        owner = address_owner(request)
        try:
            allocation = await self._ipam.allocate(owner, self._config.enable_ipv4, self._config.enable_ipv6)
        except IpamExhausted as error:
            raise CniError(ErrorCode.ADDRESSES_USED_UP, f"no address is free: {error}") from error
        undo.push_async_callback(self._ipam.release, owner)
        return allocation

    async def _make_device(
        self, request: Request, allocation: Allocation, undo: contextlib.AsyncExitStack
    ) -> devices.Device:
        name = host_interface_name(*request.attachment)
        router = self._ipam.router
        mtu = request.config.mtu or self._config.mtu
        file = _namespace(request)
        # registered only once it is ours: where the name is taken, the device is somebody else's
        device = await asyncio.to_thread(devices.create_endpoint_device, name, file, request.ifname, mtu)
        undo.push_async_callback(asyncio.to_thread, devices.delete_device, name)
        await asyncio.to_thread(
            devices.configure_container,
            file,
            request.ifname,
            allocation.ipv4,
            allocation.ipv6,
            router.ipv4,
            router.ipv6,
            mtu,
        )
        return device

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
                    netns=os.fstat(_namespace(request)).st_ino,
                    mode=MODE,
                )
            )
        except EndpointExistsError as error:
            raise CniError(ErrorCode.ALREADY_CONNECTED, str(error)) from error

    def _result(self, request: Request, allocation: Allocation, device: devices.Device) -> CniResult:
        router = self._ipam.router
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
                Interface(device.host_ifname, device.host_mac.hex(":")),
                Interface(request.ifname, device.container_mac.hex(":"), sandbox=request.netns),
            ],
            ips=ips,
            routes=routes,
        )

    async def delete(self, request: Request) -> None:
        """Disconnect a container; every step succeeds where there is nothing left to do."""
        await self._disconnect(*request.attachment)

    async def _disconnect(self, container_id: str, ifname: str) -> None:
        endpoint = self._endpoints.find(container_id, ifname)
        if endpoint is not None:
            await self._endpoints.delete(endpoint.id)
        await asyncio.to_thread(devices.delete_device, host_interface_name(container_id, ifname))
        suffix = _owner_suffix(container_id, ifname)
        for owner in {owner for owner in self._ipam.owners().values() if owner.endswith(suffix)}:
            await self._ipam.release(owner)
        await self._forget(container_id, ifname)

    async def _forget(self, container_id: str, ifname: str) -> None:
        await asyncio.to_thread(self._attachments.remove, container_id, ifname)

    async def check(self, request: Request) -> None:
        """Compare the endpoint, the configuration's prevResult and what is really in the container."""
        endpoint = self._endpoints.find(*request.attachment)
        if endpoint is None:
            text = f"CNI_CONTAINERID: {request.container_id!r} has no endpoint for interface {request.ifname!r}"
            raise CniError(ErrorCode.UNKNOWN_CONTAINER, text)
        expected = {str(address) for address in endpoint.addresses}
        told = result_addresses(request.config.prev_result or {})
        if told != expected:
            text = f"prevResult.ips: {sorted(told)} given, the endpoint has {sorted(expected)}"
            raise CniError(ErrorCode.CHECK_FAILED, text)
        names = await asyncio.to_thread(devices.list_endpoint_devices)
        if endpoint.request.host_ifname not in names:
            raise CniError(ErrorCode.CHECK_FAILED, f"the node's device {endpoint.request.host_ifname} is gone")
        present = await asyncio.to_thread(container_addresses, _namespace(request), request.ifname)
        if missing := expected - present:
            text = f"interface {request.ifname}: addresses {sorted(missing)} are not in the container"
            raise CniError(ErrorCode.CHECK_FAILED, text)

    async def collect(self, network: str, valid: frozenset[tuple[str, str]]) -> None:
        """Disconnect every container of ``network`` that the runtime knows no more."""
        for item in await asyncio.to_thread(self._attachments.load):
            attachment = (item.container_id, item.ifname)
            if item.mode == MODE and item.network == network and attachment not in valid:
                log.warning("cni: garbage collection disconnects %s/%s", *attachment)
                await self._disconnect(*attachment)


def address_owner(request: Request) -> str:
    """Who an address belongs to: the pod for people, the attachment to be unique."""
    pod = f"{request.pod_namespace}/{request.pod_name}" if request.pod_name else ""
    return attachment_owner(pod, *request.attachment)


def _owner_suffix(container_id: str, ifname: str) -> str:
    return attachment_owner("", container_id, ifname).removeprefix("-")


def _namespace(request: Request) -> int:
    if request.netns_fd is None:
        raise CniError(ErrorCode.INVALID_ENVIRONMENT, "CNI_NETNS: not sent, expected an open network namespace")
    return request.netns_fd


def _already_connected(request: Request) -> CniError:
    text = (
        f"CNI_CONTAINERID: {request.container_id!r} has an endpoint for interface {request.ifname!r} already,"
        " expected a DEL before the next ADD"
    )
    return CniError(ErrorCode.ALREADY_CONNECTED, text)
