"""Follows MAC addresses that others give to pods' devices, such as the plugin `tuning` behind us in a list.

On a device pair of ours a MAC gives no right, so the datapath follows. On another plugin's link it says who somebody
is; there the pod stays cut off, and its endpoint says why.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from ciliate import tasks
from ciliate.datapath import macwatch
from ciliate.endpoint.state import State

if TYPE_CHECKING:
    from ciliate.endpoint.manager import EndpointManager
    from ciliate.endpoint.model import Endpoint

log = logging.getLogger(__name__)
_OVER = (State.DISCONNECTING, State.DISCONNECTED)


class Macs:
    """One task that asks after every endpoint of which something was heard."""

    def __init__(self, endpoints: EndpointManager) -> None:
        self._endpoints = endpoints
        self._watch = macwatch.MacWatch(self._heard)
        self._pending: set[int] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen, and compare all once: they may have changed while no agent ran."""
        self._watch.start()
        self._heard(0, b"")
        self._task = tasks.start(self._run(), "macs")

    async def stop(self) -> None:
        """Listen no more."""
        self._watch.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _heard(self, index: int, mac: bytes) -> None:
        for endpoint in self._endpoints.endpoints():
            request = endpoint.request
            if request.reserved or (index and (request.host_ifindex != index or request.mac == mac)):
                if request.host_ifindex == index and endpoint.device_problem:
                    self._pending.add(endpoint.id)
                continue
            self._pending.add(endpoint.id)
        if self._pending:
            self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                number = self._pending.pop()
                endpoint = next((item for item in self._endpoints.endpoints() if item.id == number), None)
                try:
                    if endpoint is not None and endpoint.state not in _OVER:
                        await self._follow(endpoint)
                except OSError as error:
                    log.error("endpoint %d: the MAC address of its device cannot be followed: %s", number, error)

    async def _follow(self, endpoint: Endpoint) -> None:
        request = endpoint.request
        mac = await asyncio.to_thread(macwatch.other_end, request.host_ifindex)
        if not mac or mac == request.mac:
            endpoint.device_problem = ""
            return
        if not request.external:
            await self._endpoints.change_mac(endpoint, mac)
            return
        found = f"{request.container_ifname} has MAC {mac.hex(':')}, expected {request.mac.hex(':')}"
        advice = "a plugin that changes it (tuning) has its place before ciliate-cni"
        problem = f"{found}: what it sends is dropped; {advice}"
        if problem != endpoint.device_problem:
            endpoint.device_problem = problem
            endpoint.note(problem)
            log.warning("endpoint %d (%s): %s", endpoint.id, endpoint.pod, problem)
