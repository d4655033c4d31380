"""Health, configuration, workloads, plugins, metrics, debugging information."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiohttp import web

from ciliate.agent import debuginfo
from ciliate.agent.api import query
from ciliate.agent.api.problem import Problem, answer, wrong
from ciliate.agent.status import full_status
from ciliate.datapath.reasons import DIRECTIONS, reason_text
from ciliate.listeners import user_of

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/healthz", api.healthz)
    router.add_get("/v1/config", api.config)
    router.add_patch("/v1/config", api.patch_config)
    router.add_get("/v1/workloads", api.workloads)
    router.add_put("/v1/workloads", api.put_workloads)
    router.add_delete("/v1/workloads", api.delete_workloads)
    router.add_get("/v1/plugins", api.plugins)
    router.add_post("/v1/plugins/switch", api.switch_plugin)
    router.add_get("/v1/templates", api.templates)
    router.add_get("/v1/metrics", api.metrics)
    router.add_get("/v1/metrics/datapath", api.datapath_metrics)
    router.add_get("/v1/debuginfo", api.debuginfo)
    router.add_get("/metrics", api.prometheus)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def healthz(self, request: web.Request) -> web.Response:
        if query.flag(request, "detail"):
            return answer(await full_status(self._agent))
        status = self._agent.status()
        state = status["state"]
        return answer({"state": state, "node": status["node"]}, 200 if state != "failure" else 503)

    async def config(self, request: web.Request) -> web.Response:
        secrets = query.flag(request, "secrets")
        if secrets and not _is_root(request):
            raise Problem(403, "secrets: asked for by a user who is not root, expected root", field="secrets")
        return answer(self._agent.configuration(secrets))

    async def patch_config(self, request: web.Request) -> web.Response:
        options = query.body(request, "options")
        if not isinstance(options, dict):
            raise wrong("options", options, "a map of options")
        await self._agent.configure(options)
        return answer(self._agent.configuration())

    async def workloads(self, request: web.Request) -> web.Response:
        return answer(self._agent.workloads.export())

    async def put_workloads(self, request: web.Request) -> web.Response:
        objects = query.body(request, "objects")
        if not isinstance(objects, list):
            raise wrong("objects", objects, "a list of manifests")
        changed = await self._agent.put_workloads(objects)
        return answer({"changed": sorted(changed)})

    async def delete_workloads(self, request: web.Request) -> web.Response:
        await self._agent.clear_workloads()
        return answer({})

    async def plugins(self, request: web.Request) -> web.Response:
        return answer(self._agent.plugins.active())

    async def switch_plugin(self, request: web.Request) -> web.Response:
        kind, name = query.texts(request, "kind", "name")
        options = query.content(request).get("options", {})
        if not isinstance(options, dict):
            raise wrong("options", options, "options of the provider by name")
        await self._agent.switch_plugin(kind, name, options)
        return answer(self._agent.plugins.active())

    async def templates(self, request: web.Request) -> web.Response:
        return answer(await self._agent.datapath.templates())

    async def prometheus(self, request: web.Request) -> web.Response:
        return await self._agent.metrics.handle(request)

    async def metrics(self, request: web.Request) -> web.Response:
        return answer(await self._agent.metrics.samples())

    async def datapath_metrics(self, request: web.Request) -> web.Response:
        return answer(await datapath_metrics(self._agent))

    async def debuginfo(self, request: web.Request) -> web.Response:
        return answer(await debuginfo.collect(self._agent))


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


def _is_root(request: web.Request) -> bool:
    """Whether the client is root's; those of the socket's group are not."""
    connection = request.transport.get_extra_info("socket") if request.transport is not None else None
    return connection is not None and user_of(connection) == 0
