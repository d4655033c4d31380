"""What every chaining mode of this package needs: attachments on disk, the errors they share, the checks of CHECK."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from ciliate.cni import previous
from ciliate.cni.modes import Attachment, AttachmentStore
from ciliate.cni.spec import CniError, ErrorCode, Request
from ciliate.datapath import devices, external, shaping
from ciliate.datapath.external import ContainerDevice
from ciliate.datapath.shaping import Limits
from ciliate.endpoint.manager import EndpointManager
from ciliate.endpoint.model import Endpoint
from ciliate.plugin import PluginContext

log = logging.getLogger(__name__)


class Mode:
    """The part of a chaining mode that does not depend on who made the device."""

    def __init__(self, context: PluginContext, name: str) -> None:
        self._name = name
        self._endpoints = context.services.get(EndpointManager)
        self._attachments = AttachmentStore(Path(context.state_dir) / "cni")

    async def start(self) -> None:
        """Nothing to prepare."""

    async def stop(self) -> None:
        """Containers stay connected."""

    async def delete(self, request: Request) -> None:
        """Disconnect a container; every step succeeds where there is nothing left to do."""
        await self._disconnect(*request.attachment)

    async def _disconnect(self, container_id: str, ifname: str) -> None:
        raise NotImplementedError

    async def collect(self, network: str, valid: frozenset[tuple[str, str]]) -> None:
        """Disconnect every container of ``network`` that the runtime knows no more, as far as possible."""
        failures = []
        for item in await asyncio.to_thread(self._attachments.load):
            attachment = (item.container_id, item.ifname)
            if item.mode == self._name and item.network == network and attachment not in valid:
                log.warning("cni: garbage collection disconnects %s/%s", *attachment)
                try:
                    await self._disconnect(*attachment)
                except Exception as error:
                    log.error("cni: garbage collection of %s/%s: %s", *attachment, error)
                    failures.append(error)
        if failures:
            raise failures[0]

    async def _limit(self, request: Request, index: int) -> None:
        """Put the limits that the runtime gave on the device pair; DatapathError, and none of them, where refused."""
        if request.config.limits != Limits():
            arguments = index, namespace(request), request.ifname, request.config.limits
            await asyncio.to_thread(shaping.limit, *arguments)

    def _remember(self, request: Request) -> None:
        """Note on disk that the attachment is there. Blocking."""
        self._attachments.save(Attachment(request.config.name, *request.attachment, self._name))

    async def _forget(self, container_id: str, ifname: str) -> None:
        await asyncio.to_thread(self._attachments.remove, container_id, ifname)

    def _refuse_second(self, request: Request) -> None:
        if self._endpoints.find(*request.attachment) is not None:
            text = (
                f"CNI_CONTAINERID: {request.container_id!r} has an endpoint for interface {request.ifname!r} already,"
                " expected a DEL before the next ADD"
            )
            raise CniError(ErrorCode.ALREADY_CONNECTED, text)

    async def check(self, request: Request) -> None:
        """Compare the endpoint, the configuration's prevResult and what is really there."""
        endpoint = self._endpoints.find(*request.attachment)
        if endpoint is None:
            text = f"CNI_CONTAINERID: {request.container_id!r} has no endpoint for interface {request.ifname!r}"
            raise CniError(ErrorCode.UNKNOWN_CONTAINER, text)
        told = previous.required(request)
        addresses = {str(item.ip) for item in previous.container_addresses(told, request.ifname)}
        expected = {str(address) for address in endpoint.addresses}
        if addresses != expected:
            raise _differs(f"prevResult.ips: {sorted(addresses)} given, the endpoint has {sorted(expected)}")
        await asyncio.to_thread(_check_node, endpoint)
        device = await asyncio.to_thread(external.container_device, namespace(request), request.ifname)
        if device is not None and not endpoint.request.external:
            await self._endpoints.change_mac(endpoint, device.mac)
        _check_container(request, endpoint, device)
        limits = endpoint.request.limits
        if limits != Limits():
            arguments = endpoint.request.host_ifindex, namespace(request), request.ifname, limits
            if text := await asyncio.to_thread(shaping.missing, *arguments):
                raise _differs(text)


def _check_node(endpoint: Endpoint) -> None:
    name = endpoint.request.host_ifname
    if devices.list_devices().get(name) != endpoint.request.host_ifindex:
        raise _differs(f"the node's device {name} is gone")
    filters = devices.attached(endpoint.request.host_ifindex)
    for egress, direction in ((False, "ingress"), (True, "egress")):
        if filters.get(egress) != endpoint.id:
            raise _differs(f"the node's device {name}: its {direction} filter is not that of endpoint {endpoint.id}")


def _check_container(request: Request, endpoint: Endpoint, device: ContainerDevice | None) -> None:
    ifname = f"interface {request.ifname}"
    if device is None or device.peer != endpoint.request.host_ifindex:
        raise _differs(f"{ifname}: is not in the container as the other end of {endpoint.request.host_ifname}")
    if not device.up:
        raise _differs(f"{ifname}: is down")
    if device.mac != endpoint.request.mac:
        raise _differs(f"{ifname}: has MAC {device.mac.hex(':')}, expected {endpoint.request.mac.hex(':')}")
    if missing := set(endpoint.addresses) - device.addresses:
        raise _differs(f"{ifname}: addresses {sorted(map(str, missing))} are not in the container")
    present = device.routes | {(destination, "") for destination, _ in device.routes}
    if gone := [route for route in previous.routes(previous.required(request)) if route not in present]:
        raise _differs(f"prevResult.routes: {gone[0][0]} via {gone[0][1] or 'the link'} is not in the container")


def _differs(text: str) -> CniError:
    return CniError(ErrorCode.CHECK_FAILED, text)


def namespace(request: Request) -> int:
    """The request's open network namespace; CniError where the runtime sent none."""
    if request.netns_fd is None:
        raise CniError(ErrorCode.INVALID_ENVIRONMENT, "CNI_NETNS: not sent, expected an open network namespace")
    return request.netns_fd
