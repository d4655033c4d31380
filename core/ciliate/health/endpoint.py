"""A node's health endpoint: a pod of the node's own, with identity health, that answers other nodes' probes.

It has a network namespace but no process in it: the agent holds the namespace, the kernel answers ICMP, and the agent
listens on a socket that was made in there. So it goes with the agent, and is made anew by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING

from ciliate.cni.modes import host_interface_name
from ciliate.datapath import devices
from ciliate.datapath.netlink import enter, new_namespace
from ciliate.endpoint.model import EndpointRequest
from ciliate.health import PORT, hello
from ciliate.identity import HEALTH
from ciliate.ipam import HEALTH as OWNER
from ciliate.ipam import Address
from ciliate.listeners import Door, Share

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

log = logging.getLogger(__name__)
ATTACHMENT = ("node-health", "eth0")
DEVICE = host_interface_name(*ATTACHMENT)
MODE = "health"


class HealthEndpoint:
    """The endpoint of one running agent. ``start`` and ``stop`` may be called again and again."""

    def __init__(self, agent: Agent, bounds: Share) -> None:
        self._agent = agent
        self._bounds = bounds
        self._namespace = -1
        self._servers: list[Door] = []
        self.addresses: list[Address] = []

    async def start(self) -> None:
        """Make it; what the datapath, the disk and sockets raise leaves nothing behind."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        await self.forget_old()
        agent, router = self._agent, self._agent.ipam.router
        held = sorted((item for item, owner in agent.ipam.owners().items() if owner == OWNER), key=lambda a: a.version)
        four, six = (next((item for item in held if item.version == version), None) for version in (4, 6))
        self._namespace = await devices.in_own_thread(new_namespace)
        wanted = devices.Wanted(four, six, router.ipv4, router.ipv6)  # type: ignore[arg-type]
        namespace, size = self._namespace, agent.mtu.current.route
        device = await devices.in_own_thread(
            lambda: devices.connect_container(DEVICE, namespace, ATTACHMENT[1], size, wanted)
        )
        request = EndpointRequest(
            container_id=ATTACHMENT[0],
            container_ifname=ATTACHMENT[1],
            host_ifname=device.host_ifname,
            host_ifindex=device.host_ifindex,
            host_mac=device.host_mac,
            mac=device.container_mac,
            ipv4=wanted.ipv4,
            ipv6=wanted.ipv6,
            netns=os.fstat(namespace).st_ino,
            mode=MODE,
            reserved=HEALTH,
        )
        await agent.endpoints.create(request)
        for listener in await devices.in_own_thread(lambda: _listen(namespace, held)):
            self._servers.append(await hello.serve(listener, self._bounds))
        self.addresses = held
        log.info("health endpoint at %s", ", ".join(map(str, held)))

    async def forget_old(self) -> None:
        """Remove what an earlier agent's health endpoint left; its namespace has gone with that agent."""
        old = self._agent.endpoints.find(*ATTACHMENT)
        if old is not None:
            await self._agent.endpoints.delete(old.id)
        await asyncio.to_thread(devices.delete_device, DEVICE)

    async def stop(self) -> None:
        """Remove it."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        await self.forget_old()
        self.addresses = []
        if self._namespace >= 0:
            os.close(self._namespace)
            self._namespace = -1


def _listen(namespace: int, addresses: list[Address]) -> list[socket.socket]:
    enter(namespace)
    return [hello.listening(address, PORT) for address in addresses]
