"""Map routes: which maps there are, how full they are, what is in one."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from ciliate.agent.api import query
from ciliate.agent.api.problem import Problem, answer
from ciliate.datapath import mapview

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

LIMIT = 10000
MOST = 1 << 24
"""Entries of the largest map that there can be."""
_NAME = re.compile(r"[a-z0-9_]{1,64}")
IPCACHE = "ciliate_ipcache"


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/map", api.all)
    router.add_get("/v1/map/{name}", api.get)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def all(self, request: web.Request) -> web.Response:
        found = await asyncio.to_thread(mapview.summaries, self._agent.datapath.pins)
        return answer({"maps": [msgspec.to_builtins(item) for item in found]})

    async def get(self, request: web.Request) -> web.Response:
        name, limit = request.match_info["name"], query.positive(request, "limit", LIMIT, MOST)
        name = name if name.startswith("ciliate_") else f"ciliate_{name}"
        pins = self._agent.datapath.pins
        found = await asyncio.to_thread(mapview.read, pins, name, limit) if _NAME.fullmatch(name) else None
        if found is None:
            raise Problem(404, f"name: there is no map {name!r}; GET /v1/map lists them", field="name")
        summary, entries = found
        cache = self._compared(entries) if name == IPCACHE else [_plain(entry, "ok") for entry in entries]
        return answer({**msgspec.to_builtins(summary), "cache": cache, "truncated": len(entries) >= limit})

    def _compared(self, entries: list[mapview.MapEntry]) -> list[dict[str, str]]:
        """The kernel's ipcache beside what the agent wants in it."""
        wanted = dict(mapview.ipcache_row(key, value) for key, value in self._agent.ipcache.entries().items())
        rows = [_plain(entry, _action(entry.value, wanted.pop(entry.key, None))) for entry in entries]
        missing = [_plain(mapview.MapEntry(key, value), "insert") for key, value in wanted.items()]
        return [*rows, *missing] if len(entries) < LIMIT else rows


def _action(value: str, wanted: str | None) -> str:
    if wanted is None:
        return "delete"
    return "ok" if value == wanted else f"update to {wanted}"


def _plain(entry: mapview.MapEntry, action: str) -> dict[str, Any]:
    return {"key": entry.key, "value": entry.value, "desired-action": action}
