"""`GET /v1/policy/resolve`: why a flow is allowed or denied, by the policies in force."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web

from ciliate.agent.api.problem import Problem, answer
from ciliate.labels import LabelSet
from ciliate.policy.porttable import NamedPorts
from ciliate.policy.trace import trace

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint

PROTOCOLS = {"TCP": ["TCP"], "UDP": ["UDP"], "SCTP": ["SCTP"], "ANY": ["TCP", "UDP"]}
EXPECTED = "expected pod:NAMESPACE/NAME, endpoint:ID, identity:ID or labels:SOURCE:KEY=VALUE,…"


class _End(NamedTuple):
    labels: LabelSet
    names: NamedPorts


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/policy/resolve", api.resolve)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def resolve(self, request: web.Request) -> web.Response:
        source, destination = self._end(request, "from"), self._end(request, "to")
        asked: list[tuple[str, int] | tuple[None, None]] = [
            item for text in request.query.getall("port", []) for item in _port(text)
        ]
        traces = [self._trace(source, destination, *item) for item in asked or [(None, None)]]
        allowed = all(item["verdict"] == "allow" for item in traces)
        return answer({"verdict": "allow" if allowed else "deny", "traces": traces})

    def _trace(self, source: _End, destination: _End, protocol: str | None, port: int | None) -> dict[str, Any]:
        repository = self._agent.repository
        found = trace(repository, source.labels, destination.labels, protocol, port, destination.names)
        origin = repository.rule(found.rule)
        return {
            "protocol": protocol,
            "port": port,
            "verdict": found.verdict,
            "rule": str(origin) if origin else None,
            "lines": found.lines,
        }

    def _end(self, request: web.Request, name: str) -> _End:
        kind, _, value = request.query.get(name, "").partition(":")
        if kind == "pod":
            return self._of_endpoint(self._pod(name, value))
        if kind == "endpoint":
            return self._of_endpoint(self._agent.endpoints.get(_number(name, value)))
        if kind == "identity":
            identity = self._agent.identity(_number(name, value))
            if identity is None:
                raise Problem(404, f"{name}: identity {value} is not known to this node")
            return _End(identity.labels, {})
        if kind == "labels" and value:
            return _End(self._labels(name, value), {})
        raise Problem(400, f"{name}: {request.query.get(name, '')!r} given, {EXPECTED}")

    def _of_endpoint(self, endpoint: Endpoint) -> _End:
        return _End(endpoint.labels, self._agent.endpoints.named_ports(endpoint))

    def _pod(self, field: str, name: str) -> Endpoint:
        wanted = name if "/" in name else f"default/{name}"
        for endpoint in self._agent.endpoints.endpoints():
            if endpoint.pod == wanted:
                return endpoint
        raise Problem(404, f"{field}: no pod {wanted} on this node")

    def _labels(self, field: str, text: str) -> LabelSet:
        parts = [part if ":" in part.partition("=")[0] else f"k8s:{part}" for part in text.split(",") if part]
        try:
            return LabelSet.parse(parts)
        except ValueError as error:
            raise Problem(400, f"{field}: {error}") from error


def _number(field: str, text: str) -> int:
    if not text.isdigit():
        raise Problem(400, f"{field}: {text!r} given, expected a number")
    return int(text)


def _port(text: str) -> list[tuple[str, int]]:
    number, _, protocol = text.partition("/")
    protocols = PROTOCOLS.get(protocol.upper() or "ANY")
    if not number.isdigit() or not 0 < int(number) < 65536 or protocols is None:
        raise Problem(400, f"port: {text!r} given, expected 1 to 65535 and /{', /'.join(PROTOCOLS)} or nothing")
    return [(name, int(number)) for name in protocols]
