"""Node routes: the nodes of the cluster as this one knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from ciliate.agent.api.problem import Problem, answer
from ciliate.kvstore import KvstoreError

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/node", api.all)
    router.add_get("/v1/node/{name}", api.get)
    router.add_delete("/v1/node/{name}", api.delete)
    router.add_get("/v1/health", api.health)
    router.add_put("/v1/health/probe", api.probe)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def all(self, request: web.Request) -> web.Response:
        return answer(self._agent.membership.describe())

    async def get(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        for node in self._agent.membership.describe():
            if node["name"] == name:
                return answer(node)
        raise _unknown(name)

    async def health(self, request: web.Request) -> web.Response:
        return answer(self._agent.health.describe())

    async def probe(self, request: web.Request) -> web.Response:
        await self._agent.health.probe()
        return answer(self._agent.health.describe())

    async def delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name == self._agent.config.node_name:
            raise Problem(409, f"name: {name!r} is this node; ask the agent of another one", field="name")
        try:
            count = await self._agent.membership.remove(name)
        except KeyError:
            raise _unknown(name) from None
        except KvstoreError as error:
            raise Problem(503, f"the store: {error}") from error
        return answer({"addresses": count})


def _unknown(name: str) -> Problem:
    return Problem(404, f"name: node {name!r} is not known; GET /v1/node lists those that are", field="name")
