"""Service routes: list, get, put one or many, delete; and the same as Kubernetes' objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from ciliate.agent.api import query
from ciliate.agent.api.problem import Problem, answer, wrong
from ciliate.service.model import ServiceSpec

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

MAX_ID = (1 << 32) - 1


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    services: list[ServiceSpec]


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/service", api.all)
    router.add_put("/v1/service", api.put_many)
    router.add_delete("/v1/service", api.delete_all)
    router.add_get("/v1/service/{id}", api.get)
    router.add_put("/v1/service/{id}", api.put)
    router.add_delete("/v1/service/{id}", api.delete)
    router.add_get("/v1/service-objects", api.objects)
    router.add_put("/v1/service-objects", api.put_objects)
    router.add_delete("/v1/service-objects", api.delete_objects)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def all(self, request: web.Request) -> web.Response:
        balancing = self._agent.balancing
        found = [balancing.describe(record.id) for record in balancing.manager.records()]
        return answer({"services": found})

    async def get(self, request: web.Request) -> web.Response:
        return answer(self._agent.balancing.describe(query.number(request)))

    async def put_many(self, request: web.Request) -> web.Response:
        batch = msgspec.convert(query.content(request), _Batch)
        done = await self._agent.balancing.manager.upsert(batch.services)
        created = sum(fresh for _, fresh in done)
        return answer({"created": created, "ids": [record.id for record, _ in done]})

    async def put(self, request: web.Request) -> web.Response:
        number = query.natural("id", request.match_info["id"], 1, MAX_ID)
        spec = msgspec.convert(query.content(request), ServiceSpec)
        if spec.id not in (0, number):
            raise wrong("id", spec.id, f"{number}, as in the path")
        spec = msgspec.structs.replace(spec, id=number)
        [(record, created)] = await self._agent.balancing.manager.upsert([spec], path="")
        return answer(self._agent.balancing.describe(record.id), 201 if created else 200)

    async def delete(self, request: web.Request) -> web.Response:
        number = query.number(request)
        await self._agent.balancing.manager.delete([number])
        return answer({"deleted": 1})

    async def delete_all(self, request: web.Request) -> web.Response:
        if not query.flag(request, "all"):
            raise wrong("all", request.query.get("all"), "all=true, as this deletes every service")
        balancing = self._agent.balancing
        await balancing.cluster.remove(balancing.cluster.objects.stored())
        return answer({"deleted": await balancing.manager.delete_all()})

    async def objects(self, request: web.Request) -> web.Response:
        return answer({"objects": ["/".join(key) for key in self._agent.balancing.cluster.objects.stored()]})

    async def put_objects(self, request: web.Request) -> web.Response:
        objects = query.body(request, "objects")
        if not isinstance(objects, list):
            raise wrong("objects", objects, "a list of manifests")
        count = await self._agent.put_service_objects(objects)
        return answer({"services": count, "left": self._agent.balancing.cluster.left_out(objects)})

    async def delete_objects(self, request: web.Request) -> web.Response:
        cluster = self._agent.balancing.cluster
        names = request.query.getall("name", [])
        if bool(names) == query.flag(request, "all"):
            raise wrong("all", request.query.get("all"), "either all=true or names as KIND/NAMESPACE/NAME")
        known = cluster.objects.stored()
        keys: list[Any] = [tuple(name.split("/")) for name in names] if names else known
        missing = [key for key in keys if key not in known]
        if missing:
            raise Problem(404, f"name: there is no {'/'.join(missing[0])}", field="name")
        return answer({"deleted": await self._agent.remove_service_objects(keys)})
