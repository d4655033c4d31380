"""Health, endpoints, identities, addresses, workloads, plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from ciliate.agent.api.problem import Problem, answer, body
from ciliate.datapath.reasons import DIRECTIONS, reason_text
from ciliate.identity import RESERVED, reserved_identity

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint
    from ciliate.identity import Identity


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/healthz", api.healthz)
    router.add_get("/v1/config", api.config)
    router.add_patch("/v1/config", api.patch_config)
    router.add_get("/v1/endpoint", api.endpoints)
    router.add_get("/v1/endpoint/{id}", api.endpoint)
    router.add_get("/v1/endpoint/{id}/log", api.endpoint_log)
    router.add_get("/v1/identity", api.identities)
    router.add_get("/v1/identity/{id}", api.identity)
    router.add_get("/v1/ipam", api.ipam)
    router.add_get("/v1/workloads", api.workloads)
    router.add_put("/v1/workloads", api.put_workloads)
    router.add_delete("/v1/workloads", api.delete_workloads)
    router.add_get("/v1/plugins", api.plugins)
    router.add_post("/v1/plugins/switch", api.switch_plugin)
    router.add_get("/v1/templates", api.templates)
    router.add_get("/v1/metrics", api.metrics)
    router.add_get("/metrics", api.prometheus)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def healthz(self, request: web.Request) -> web.Response:
        status = self._agent.status()
        if request.query.get("detail"):
            return answer(status)
        state = status["state"]
        return answer({"state": state, "node": status["node"]}, 200 if state != "failure" else 503)

    async def config(self, request: web.Request) -> web.Response:
        return answer(self._agent.configuration())

    async def patch_config(self, request: web.Request) -> web.Response:
        options = await body(request, "options")
        if not isinstance(options, dict):
            raise Problem(400, f"options: {type(options).__name__} given, expected a map of options")
        await self._agent.configure(options)
        return answer(self._agent.configuration())

    async def endpoints(self, request: web.Request) -> web.Response:
        return answer([endpoint.document() for endpoint in self._agent.endpoints.endpoints()])

    async def endpoint(self, request: web.Request) -> web.Response:
        return answer(self._endpoint(request).document())

    async def endpoint_log(self, request: web.Request) -> web.Response:
        return answer([msgspec.to_builtins(entry) for entry in self._endpoint(request).log])

    def _endpoint(self, request: web.Request) -> Endpoint:
        return self._agent.endpoints.get(_number(request))

    async def identities(self, request: web.Request) -> web.Response:
        known = [reserved_identity(number) for number in RESERVED]
        known += sorted(self._agent.identities(), key=lambda identity: identity.id)
        return answer([_identity(identity) for identity in known])

    async def identity(self, request: web.Request) -> web.Response:
        number = _number(request)
        identity = self._agent.identity(number)
        if identity is None:
            raise Problem(404, f"identity {number}: not known to this node")
        return answer(_identity(identity))

    async def ipam(self, request: web.Request) -> web.Response:
        return answer({"addresses": self._agent.addresses()})

    async def workloads(self, request: web.Request) -> web.Response:
        return answer(self._agent.workloads.export())

    async def put_workloads(self, request: web.Request) -> web.Response:
        objects = await body(request, "objects")
        if not isinstance(objects, list):
            raise Problem(400, f"objects: {type(objects).__name__} given, expected a list of manifests")
        changed = await self._agent.put_workloads(objects)
        return answer({"changed": sorted(changed)})

    async def delete_workloads(self, request: web.Request) -> web.Response:
        await self._agent.clear_workloads()
        return answer({})

    async def plugins(self, request: web.Request) -> web.Response:
        return answer(self._agent.plugins.active())

    async def switch_plugin(self, request: web.Request) -> web.Response:
        kind, name = await body(request, "kind"), await body(request, "name")
        await self._agent.switch_plugin(str(kind), str(name))
        return answer(self._agent.plugins.active())

    async def templates(self, request: web.Request) -> web.Response:
        return answer(await self._agent.datapath.templates())

    async def prometheus(self, request: web.Request) -> web.Response:
        return await self._agent.metrics.handle(request)

    async def metrics(self, request: web.Request) -> web.Response:
        return answer(await datapath_metrics(self._agent))


async def datapath_metrics(agent: Agent) -> list[dict[str, Any]]:
    """Packets and bytes by drop reason (0: forwarded) and direction."""
    totals = await agent.datapath.metrics()
    return [
        {
            "reason": reason,
            "text": reason_text(reason),
            "direction": DIRECTIONS[direction],
            "packets": packets,
            "bytes": size,
        }
        for (reason, direction), (packets, size) in sorted(totals.items())
    ]


def _identity(identity: Identity) -> dict[str, Any]:
    return {"id": identity.id, "labels": identity.labels.strings()}


def _number(request: web.Request) -> int:
    text = request.match_info["id"]
    if not text.isdigit():
        raise Problem(400, f"id: {text!r} given, expected a number")
    return int(text)
