"""Address routes: list, allocate, claim, release.

Addresses that a client takes belong to it until it gives them back or the agent starts again: a start releases what no
endpoint uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from ciliate.agent.api import query
from ciliate.agent.api.problem import Problem, answer, wrong
from ciliate.ipam import RESERVED_OWNERS, Address

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

FAMILIES = ("ipv4", "ipv6")


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/ipam", api.all)
    router.add_post("/v1/ipam", api.allocate)
    router.add_post("/v1/ipam/{ip}", api.claim)
    router.add_delete("/v1/ipam/{ip}", api.release)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def all(self, request: web.Request) -> web.Response:
        return answer({"addresses": self._agent.addresses()})

    async def allocate(self, request: web.Request) -> web.Response:
        owner, family = _owner(request), query.choice(request, "family", FAMILIES)
        config = self._agent.config
        for name, on in zip(FAMILIES, (config.enable_ipv4, config.enable_ipv6), strict=True):
            if family == name and not on:
                raise Problem(501, f"family: {name} is off on this node", field="family")
        given = await self._agent.ipam.allocate(owner, family != "ipv6", family != "ipv4")
        addresses = {"ipv4": given.ipv4, "ipv6": given.ipv6}
        shown = {name: str(address) if address else None for name, address in addresses.items()}
        return answer({"address": shown, "owner": owner}, 201)

    async def claim(self, request: web.Request) -> web.Response:
        address, owner = query.address(request), _owner(request)
        holder = self._agent.ipam.owners().get(address)
        if holder is not None:
            raise Problem(409, f"ip: {address} belongs to {holder}", field="ip")
        if not self._in_range(address):
            raise wrong("ip", str(address), "an address of the node's ranges")
        await self._agent.ipam.claim(owner, [*self._held(owner), address])
        return answer({"ip": str(address), "owner": owner})

    async def release(self, request: web.Request) -> web.Response:
        address = query.address(request)
        owner = self._agent.ipam.owners().get(address)
        if owner is None:
            raise Problem(404, f"ip: {address} is not allocated", field="ip")
        self._refuse_use(address, owner)
        rest = [item for item in self._held(owner) if item != address]
        await (self._agent.ipam.claim(owner, rest) if rest else self._agent.ipam.release(owner))
        return answer({"ip": str(address), "owner": owner})

    def _refuse_use(self, address: Address, owner: str) -> None:
        """An address that something has is never given to somebody else."""
        if owner in RESERVED_OWNERS:
            raise wrong("ip", str(address), f"no address of the node itself ({owner})")
        for endpoint in self._agent.endpoints.endpoints():
            if address in endpoint.addresses:
                raise wrong("ip", str(address), f"no address of an endpoint (it is that of endpoint {endpoint.id})")

    def _held(self, owner: str) -> list[Address]:
        return [address for address, name in self._agent.ipam.owners().items() if name == owner]

    def _in_range(self, address: Address) -> bool:
        config = self._agent.config
        return address in (config.ipv4_range if address.version == 4 else config.ipv6_range)


def _owner(request: web.Request) -> str:
    owner = request.query.get("owner", "")
    if not owner or owner in RESERVED_OWNERS:
        raise wrong("owner", owner, f"a name other than {', '.join(sorted(RESERVED_OWNERS))}")
    return owner
