"""What the chained modes do: find the device of an earlier plugin, put policy on it, leave the rest alone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from ciliate.cni import previous
from ciliate.cni.spec import CniError, ErrorCode, Request
from ciliate.datapath import devices, external, shaping
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.external import ContainerDevice
from ciliate.datapath.shaping import Limits
from ciliate.endpoint.manager import EndpointExistsError
from ciliate.endpoint.model import Endpoint, EndpointRequest
from ciliate.plugin import PluginContext
from ciliate_cni.common import Mode, namespace


class ChainedMode(Mode):
    """Enforces policy on veth devices of other plugins. One instance per name and agent."""

    def __init__(self, context: PluginContext, name: str) -> None:
        super().__init__(context, name)
        self._config = context.config

    async def add(self, request: Request) -> dict[str, Any]:
        """Put policy on a container's device; returns prevResult in the version asked for.

        Raises CniError, or what a part raised; either way nothing of ours stays behind.
        """
        told = previous.required(request)
        if request.config.mtu:
            text = f"mtu: {request.config.mtu} given, expected none: mode {self._name!r} leaves the device alone"
            raise CniError(ErrorCode.UNSUPPORTED_FIELD, text)
        self._refuse_second(request)
        answer = previous.hand_on(told, request.config.version)
        wanted = await self._endpoint_request(request, told)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._forget, *request.attachment)
            await asyncio.to_thread(self._remember, request)
            undo.push_async_callback(asyncio.to_thread, external.release, wanted.host_ifindex)
            undo.push_async_callback(self._unlimit, request, wanted.host_ifindex)
            await self._limit(request, wanted.host_ifindex)
            await self._create(wanted)
            # all is well: what is made stays
            undo.pop_all()
        return answer

    async def _endpoint_request(self, request: Request, told: dict[str, Any]) -> EndpointRequest:
        file = namespace(request)
        container = await asyncio.to_thread(external.container_device, file, request.ifname)
        if container is None:
            text = f"CNI_IFNAME: {request.ifname!r} is not in the container, expected the earlier plugin's device"
            raise CniError(ErrorCode.INVALID_ENVIRONMENT, text)
        device = await self._host_side(file, container)
        ipv4, ipv6 = self._addresses(told, container)
        return EndpointRequest(
            container_id=request.container_id,
            container_ifname=request.ifname,
            host_ifname=device.host_ifname,
            host_ifindex=device.host_ifindex,
            host_mac=device.host_mac,
            mac=device.container_mac,
            ipv4=ipv4,
            ipv6=ipv6,
            pod_namespace=request.pod_namespace,
            pod_name=request.pod_name,
            labels=request.config.labels,
            netns=os.fstat(file).st_ino,
            mode=self._name,
            external=True,
            limits=request.config.limits,
            link_local=container.link_local,
            through_stack=True,
        )

    async def _host_side(self, file: int, container: ContainerDevice) -> devices.Device:
        try:
            return await asyncio.to_thread(external.host_side, file, container)
        except DatapathError as error:
            if error.errno in (errno.EINVAL, errno.ENODEV):
                raise CniError(ErrorCode.UNSUPPORTED_FIELD, f"prevResult.interfaces: {error.strerror}") from error
            raise

    def _addresses(
        self, told: dict[str, Any], container: ContainerDevice
    ) -> tuple[IPv4Address | None, IPv6Address | None]:
        """At most one address per family that is on: those of prevResult, or the device's where it names none."""
        given = {item.ip for item in previous.container_addresses(told, container.ifname)}
        if missing := given - container.addresses:
            text = f"prevResult.ips: {sorted(map(str, missing))} given, interface {container.ifname} does not have it"
            raise CniError(ErrorCode.INVALID_CONFIGURATION, text)
        chosen = given or container.addresses
        fours = [item for item in chosen if isinstance(item, IPv4Address) and self._config.enable_ipv4]
        sixes = [item for item in chosen if isinstance(item, IPv6Address) and self._config.enable_ipv6]
        for family, found in (("IPv4", fours), ("IPv6", sixes)):
            if len(found) > 1:
                text = f"prevResult.ips: {sorted(map(str, found))} given, expected one {family} address per interface"
                raise CniError(ErrorCode.UNSUPPORTED_FIELD, text)
        if not fours and not sixes:
            text = f"prevResult.ips: none for {container.ifname}, expected an address of a family that is on"
            raise CniError(ErrorCode.INVALID_CONFIGURATION, text)
        return next(iter(fours), None), next(iter(sixes), None)

    async def delete(self, request: Request) -> None:
        """As every mode does; limits go, too, at the container's end as long as that is there."""
        endpoint = self._endpoints.find(*request.attachment)
        if endpoint is not None and endpoint.request.limits != Limits():
            file = request.netns_fd
            # the path of a container that is gone may lead to anything
            if file is not None and os.fstat(file).st_ino == endpoint.request.netns:
                await self._unlimit(request, endpoint.request.host_ifindex)
        await super().delete(request)

    async def _unlimit(self, request: Request, index: int) -> None:
        if request.netns_fd is not None:
            with contextlib.suppress(OSError):  # the device may be gone, and its queues with it
                await asyncio.to_thread(shaping.unlimit, index, request.netns_fd, request.ifname)

    async def _create(self, wanted: EndpointRequest) -> Endpoint:
        try:
            return await self._endpoints.create(wanted)
        except EndpointExistsError as error:
            raise CniError(ErrorCode.ALREADY_CONNECTED, str(error)) from error

    async def _disconnect(self, container_id: str, ifname: str) -> None:
        endpoint = self._endpoints.find(container_id, ifname)
        if endpoint is not None:
            await self._endpoints.delete(endpoint.id)
            await asyncio.to_thread(_release, endpoint)
        await self._forget(container_id, ifname)


def _release(endpoint: Endpoint) -> None:
    """Take our filters off, unless the device is gone and its index is another's by now."""
    request = endpoint.request
    if devices.list_devices().get(request.host_ifname) == request.host_ifindex:
        external.release(request.host_ifindex)
        if request.limits != Limits():
            shaping.unlimit(request.host_ifindex, None, request.container_ifname)
