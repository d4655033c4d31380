"""Identity routes: list by labels, get, those of this node's endpoints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ciliate.agent.api import query
from ciliate.agent.api.problem import Problem, answer
from ciliate.identity import RESERVED, Identity, reserved_identity

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes. The one without a parameter comes first, as the first that fits counts."""
    api = _Handlers(agent)
    router.add_get("/v1/identity", api.all)
    router.add_get("/v1/identity/endpoints", api.endpoints)
    router.add_get("/v1/identity/{id}", api.get)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def all(self, request: web.Request) -> web.Response:
        wanted = query.labels(request)
        known = [reserved_identity(number) for number in RESERVED]
        known += sorted(self._agent.identities(), key=lambda identity: identity.id)
        found = [identity for identity in known if query.carries(identity.labels, wanted)]
        if wanted and not found:
            raise Problem(404, f"labels: no identity has {', '.join(map(str, wanted))}", field="labels")
        return answer([_identity(identity) for identity in found])

    async def get(self, request: web.Request) -> web.Response:
        number = query.number(request)
        identity = self._agent.identity(number)
        if identity is None:
            raise Problem(404, f"id: identity {number} is not known to this node", field="id")
        return answer(_identity(identity))

    async def endpoints(self, request: web.Request) -> web.Response:
        counts = Counter(endpoint.identity for endpoint in self._agent.endpoints.endpoints() if endpoint.identity)
        found = [(self._agent.identity(number), count) for number, count in sorted(counts.items())]
        return answer([{"identity": _identity(item), "refCount": count} for item, count in found if item is not None])


def _identity(identity: Identity) -> dict[str, Any]:
    return {"id": identity.id, "labels": identity.labels.strings()}
