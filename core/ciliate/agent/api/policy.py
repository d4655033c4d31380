"""Policy routes: import, list, delete, wait."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from ciliate.agent.api import query
from ciliate.agent.api.problem import Problem, answer
from ciliate.agent.describe import OWN_PODS
from ciliate.datapath.layout import PolicyCounters
from ciliate.datapath.reasons import DIRECTIONS, protocol_name
from ciliate.document import Document
from ciliate.labels import Label
from ciliate.policy.cautions import cautions
from ciliate.policy.importer import PolicyObject, left_alone, need_policies, only, sort_out
from ciliate.policy.mapstate import PolicyKey

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

LONGEST_WAIT = 86400.0
"""Seconds."""


class _Import(msgspec.Struct, forbid_unknown_fields=True):
    documents: list[Document]


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/policy", api.get)
    router.add_put("/v1/policy", api.put)
    router.add_delete("/v1/policy", api.delete)
    router.add_get("/v1/policy/wait", api.wait)
    router.add_get("/v1/policy/counters", api.counters)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def get(self, request: web.Request) -> web.Response:
        repository = self._agent.repository
        names, wanted = request.query.getall("name", []), query.labels(request, "label")
        if names and wanted:
            raise Problem(400, "label: expected either names or labels", field="label")
        policies = [
            _listed(item, paths) for item, paths in repository.labelled(wanted) if not names or _named(item, names)
        ]
        if (names or wanted) and not policies:
            raise Problem(404, _none(names, wanted))
        return answer({"revision": repository.revision, "policies": policies})

    async def put(self, request: web.Request) -> web.Response:
        given = msgspec.convert(query.content(request), _Import)
        concerned, left = sort_out(given.documents)
        need_policies(concerned, left)
        result = await self._agent.policies.import_documents(concerned)
        return answer(
            {
                "revision": result.revision,
                "added": result.added,
                "replaced": result.replaced,
                "unchanged": result.unchanged,
                "refused": self._refused(),
                "warnings": await self._warnings(concerned),
                "left": [
                    f"{item.place}: {item.object}" if item.place else item.object for item in map(left_alone, left)
                ],
            }
        )

    async def _warnings(self, documents: list[Document]) -> list[str]:
        """What is allowed to be said but can hardly be meant."""
        given = {id(document) for document in documents}
        stored = [item for item in self._agent.repository.objects() if id(item.document) in given]
        filtered, proxies = self._agent.endpoints.label_filter, self._agent.repository.proxies
        # thousands of policies ask for the same few labels
        keeps, fixed = cache(filtered.keeps), filtered.fixed_names

        def told() -> list[str]:
            return [problem.text for item in stored for problem in cautions(item, keeps, proxies, fixed)]

        return await asyncio.to_thread(told)

    def _refused(self) -> list[dict[str, Any]]:
        """Endpoints whose policy does not fit, with the reason; they keep an older one."""
        return [
            {"endpoint": endpoint.id, "pod": endpoint.pod, "reason": endpoint.policy_problem}
            for endpoint in self._agent.endpoints.endpoints()
            if endpoint.policy_problem
        ]

    async def delete(self, request: web.Request) -> web.Response:
        names, wanted = request.query.getall("name", []), query.labels(request, "label")
        everything = query.flag(request, "all")
        if bool(names) + bool(wanted) + everything != 1:
            raise Problem(400, "all: expected one of all=true, name=NAMESPACE/NAME and label=[SOURCE:]KEY[=VALUE]")
        policies = self._agent.policies
        if wanted:
            deleted, revision = await policies.delete_labelled(wanted)
        else:
            deleted, revision = await policies.delete(lambda stored: everything or _named(stored, names))
        if not everything and not deleted:
            raise Problem(404, _none(names, wanted))
        return answer({"revision": revision, "deleted": deleted, "refused": self._refused()})

    async def counters(self, request: web.Request) -> web.Response:
        text = request.query.get("endpoint")
        endpoints = self._agent.endpoints
        chosen = [endpoints.get(query.natural("endpoint", text))] if text is not None else endpoints.endpoints()
        rows = []
        for endpoint in chosen:
            for key, found in (await self._agent.datapath.policy_counters(endpoint.id)).items():
                rows.append({"endpoint": endpoint.id, "pod": endpoint.pod, **self._counter(key, found)})
        return answer(rows)

    def _counter(self, key: PolicyKey, found: PolicyCounters) -> dict[str, Any]:
        rule = self._agent.repository.rule(found.entry.rule)
        last = key.port + (1 << (16 - key.prefix)) - 1
        place = self._agent.repository.cache.places.prefix(key.place)
        return {
            "direction": DIRECTIONS[key.direction],
            "identity": key.identity,
            "place": str(place or key.place) if key.place else "any",
            "protocol": protocol_name(key.proto) if key.proto else "any",
            "port": "any" if not key.prefix else str(key.port) if key.prefix == 16 else f"{key.port}-{last}",
            "verdict": found.entry.verdict.name.lower(),
            "rule": str(rule) if rule else OWN_PODS,
            "packets": found.packets,
            "bytes": found.bytes,
        }

    async def wait(self, request: web.Request) -> web.Response:
        revision = query.natural("revision", request.query.get("revision", "0"))
        timeout = query.seconds(request, "timeout", 30.0, LONGEST_WAIT)
        try:
            async with asyncio.timeout(timeout):
                await self._agent.wait_revision(revision)
        except TimeoutError:
            why = "".join(f"; endpoint {item['endpoint']}: {item['reason']}" for item in self._refused())
            text = f"revision {revision}: not realised by every endpoint within {timeout} s{why}"
            raise Problem(503, text) from None
        return answer({"revision": self._agent.repository.revision})


def _named(stored: Any, names: list[str]) -> bool:
    return stored.name in names or f"{stored.namespace}/{stored.name}" in names


def _none(names: list[str], wanted: list[Label]) -> str:
    if names:
        return f"name: no policy is called {', '.join(names)}"
    return f"label: no rule has {', '.join(map(str, wanted))}"


def _listed(stored: PolicyObject, paths: list[str]) -> dict[str, Any]:
    """An object with the rules at these fields."""
    whole = len(paths) == len(stored.rules)
    return {
        "kind": stored.kind,
        "namespace": stored.namespace,
        "name": stored.name,
        "rules": len(paths),
        "origin": f"{stored.document.file}:{stored.document.line}",
        "object": stored.document.object if whole else only(stored.document, paths).object,
    }
