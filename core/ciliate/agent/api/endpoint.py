"""Endpoint routes: list, get, labels, configuration, log, health, regenerate, disconnect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from ciliate.agent.api import query
from ciliate.agent.api.problem import Problem, answer, wrong
from ciliate.endpoint import options
from ciliate.labels import LabelSet

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/endpoint", api.all)
    router.add_get("/v1/endpoint/{id}", api.get)
    router.add_patch("/v1/endpoint/{id}", api.patch)
    router.add_delete("/v1/endpoint/{id}", api.delete)
    router.add_get("/v1/endpoint/{id}/config", api.config)
    router.add_patch("/v1/endpoint/{id}/config", api.patch_config)
    router.add_get("/v1/endpoint/{id}/labels", api.labels)
    router.add_patch("/v1/endpoint/{id}/labels", api.patch_labels)
    router.add_get("/v1/endpoint/{id}/log", api.log)
    router.add_get("/v1/endpoint/{id}/healthz", api.healthz)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def all(self, request: web.Request) -> web.Response:
        wanted = query.labels(request)
        found = [item for item in self._agent.endpoints.endpoints() if query.carries(item.labels, wanted)]
        if wanted and not found:
            raise Problem(404, f"labels: no endpoint has {', '.join(map(str, wanted))}", field="labels")
        return answer([self._document(item) for item in found])

    async def get(self, request: web.Request) -> web.Response:
        return answer(self._document(self._endpoint(request)))

    async def patch(self, request: web.Request) -> web.Response:
        """The part of an EndpointChangeRequest that may change: the user's labels, as a whole."""
        endpoint = self._endpoint(request)
        wanted = query.label_set("labels", query.body(request, "labels"))
        gone = LabelSet(label for label in endpoint.user_labels if label not in wanted)
        await self._agent.endpoints.change_labels(endpoint, wanted, gone)
        return answer(self._document(endpoint))

    async def delete(self, request: web.Request) -> web.Response:
        problems = await self._agent.endpoints.delete(self._endpoint(request).id)
        return answer({"problems": problems}, 206 if problems else 200)

    async def config(self, request: web.Request) -> web.Response:
        return answer(self._configuration(self._endpoint(request)))

    async def patch_config(self, request: web.Request) -> web.Response:
        """Options of this endpoint alone; a change of none writes its policy and datapath anew."""
        endpoint, changes = self._endpoint(request), query.content(request).get("options", {})
        if not isinstance(changes, dict):
            raise wrong("options", changes, "a map of options")
        await self._agent.endpoints.configure(endpoint, changes)
        return answer(self._configuration(endpoint))

    async def labels(self, request: web.Request) -> web.Response:
        return answer(self._agent.endpoints.label_document(self._endpoint(request)))

    async def patch_labels(self, request: web.Request) -> web.Response:
        """Either ``user`` (all of the user's labels) or ``add`` and ``delete``."""
        endpoint, change = self._endpoint(request), query.content(request)
        if not change or ("user" in change and len(change) > 1):
            raise wrong("body", sorted(change), "either the member user or the members add and delete")
        add = query.label_set("add", change.get("add", []))
        delete = query.label_set("delete", change.get("delete", []))
        if "user" in change:
            add = query.label_set("user", change["user"])
            delete = LabelSet(label for label in endpoint.user_labels if label not in add)
        await self._agent.endpoints.change_labels(endpoint, add, delete)
        return answer(self._agent.endpoints.label_document(endpoint))

    async def log(self, request: web.Request) -> web.Response:
        return answer([msgspec.to_builtins(entry) for entry in self._endpoint(request).log])

    async def healthz(self, request: web.Request) -> web.Response:
        return answer(self._endpoint(request).health(self._agent.repository.revision))

    def _endpoint(self, request: web.Request) -> Endpoint:
        return query.endpoint(request, self._agent)

    def _document(self, endpoint: Endpoint) -> dict[str, Any]:
        document = endpoint.document()
        document["status"]["health"] = endpoint.health(self._agent.repository.revision)
        return document

    def _configuration(self, endpoint: Endpoint) -> dict[str, Any]:
        config, status = self._agent.config, endpoint.document()["status"]
        realized = {
            "PolicyEnforcement": status["policy"]["policy-enabled"],
            **options.effective(endpoint.options, config.monitor_aggregation),
        }
        immutable = {
            "Conntrack": "Enabled",
            "IPv4": "Enabled" if endpoint.request.ipv4 else "Disabled",
            "IPv6": "Enabled" if endpoint.request.ipv6 else "Disabled",
            "Loader": config.datapath_loader,
            "ChainingMode": endpoint.request.mode,
        }
        return {"realized": {"options": realized}, "own": endpoint.options, "immutable": immutable}
