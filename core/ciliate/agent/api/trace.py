"""`GET /v1/policy/resolve`: why a flow is allowed or denied, by the policies in force."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ciliate.agent.api import query
from ciliate.agent.api.problem import Problem, answer
from ciliate.labels import LabelSet
from ciliate.policy.model import PROTOCOLS
from ciliate.policy.ports import valid_port_name
from ciliate.policy.porttable import NamedPorts
from ciliate.policy.trace import End, Explanation, Side, by_family, trace

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint

EXPECTED = "expected pod:NAMESPACE/NAME, endpoint:ID, identity:ID or labels:SOURCE:KEY=VALUE,…"
ANY = ("TCP", "UDP")
ICMP_ECHO = {"ICMP": 8, "ICMPv6": 128}
ICMP_FAMILY: Mapping[str | None, int] = {"ICMP": 4, "ICMPv6": 6}
NAMES = {name.upper(): name for name in PROTOCOLS}
Asked = tuple[str | None, int | None]


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""
    api = _Handlers(agent)
    router.add_get("/v1/policy/resolve", api.resolve)


class _Handlers:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def resolve(self, request: web.Request) -> web.Response:
        source, destination = self._end(request, "from"), self._end(request, "to")
        names = destination.names or self._agent.repository.peer_names(destination.identity)
        asked = [item for text in request.query.getall("port", []) for item in _port(text, names)]
        verbose = query.flag(request, "verbose")
        ends = by_family(self._agent.repository, source, destination) or {4: (source, destination)}
        traces = [trace for item in asked or [(None, None)] for trace in self._traces(ends, item, verbose)]
        allowed = all(item["verdict"] == "allow" for item in traces)
        return answer({"verdict": "allow" if allowed else "deny", "traces": traces})

    def _traces(self, ends: Mapping[int, tuple[End, End]], asked: Asked, verbose: bool) -> list[dict[str, Any]]:
        """One answer, or one for each address family where ipBlocks make a difference."""
        protocol, port = asked
        if protocol in ICMP_FAMILY and ICMP_FAMILY[protocol] in ends:
            ends = {ICMP_FAMILY[protocol]: ends[ICMP_FAMILY[protocol]]}
        found = {family: trace(self._agent.repository, *pair, protocol, port, verbose) for family, pair in ends.items()}
        verdicts = [[(side.verdict, side.why) for side in one.sides] for one in found.values()]
        if all(item == verdicts[0] for item in verdicts):
            return [self._document(None, asked, next(iter(found.values())))]
        return [self._document(family, asked, one) for family, one in found.items()]

    def _document(self, family: int | None, asked: Asked, found: Explanation) -> dict[str, Any]:
        origin = self._agent.repository.rule(found.rule)
        return {
            "family": family,
            "protocol": asked[0],
            "port": asked[1],
            "verdict": found.verdict,
            "rule": str(origin) if origin else None,
            "sides": [_side(side) for side in found.sides],
            "lines": [f"IPv{family}", *found.lines] if family else found.lines,
        }

    def _end(self, request: web.Request, name: str) -> End:
        kind, _, value = request.query.get(name, "").partition(":")
        if kind == "pod":
            return self._of_endpoint(self._pod(name, value))
        if kind == "endpoint":
            return self._of_endpoint(self._agent.endpoints.get(query.natural(name, value)))
        if kind == "identity":
            identity = self._agent.identity(query.natural(name, value))
            if identity is None:
                raise Problem(404, f"{name}: identity {value} is not known to this node")
            return End(identity.labels, identity.id, title=f"identity {identity.id}")
        if kind == "labels" and value:
            return End(self._labels(name, value))
        raise Problem(400, f"{name}: {request.query.get(name, '')!r} given, {EXPECTED}")

    def _of_endpoint(self, endpoint: Endpoint) -> End:
        names = self._agent.endpoints.named_ports(endpoint)
        title = f"{endpoint.pod} (endpoint {endpoint.id}, identity {endpoint.identity})".strip()
        behind = f", which still has an older policy: {endpoint.policy_problem}" if endpoint.policy_problem else ""
        return End(endpoint.labels, endpoint.identity, names, title + behind, addresses=tuple(endpoint.addresses))

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


def _port(text: str, names: NamedPorts) -> list[Asked]:
    """The questions behind a port: a number or a name of the destination's, TCP and UDP where no protocol is said."""
    port, _, given = text.partition("/")
    protocol = NAMES.get((given or port).upper())
    if protocol in ICMP_ECHO and port.upper() in ("", protocol.upper()):
        return [(protocol, ICMP_ECHO[protocol])]
    protocols = ANY if given.upper() in ("", "ANY") else (protocol,) if protocol else ()
    if not protocols:
        raise Problem(400, f"port: {text!r} given, expected /{', /'.join(PROTOCOLS)}, /ANY or nothing behind the port")
    if valid_port_name(port):
        return _named(text, port, protocols, names)
    low, high = (0, 255) if protocol in ICMP_ECHO else (1, 65535)
    if not (port.isascii() and port.isdigit() and len(port) < 6) or not low <= int(port) <= high:
        raise Problem(400, f"port: {text!r} given, expected {low} to {high} or a port's name, and /PROTOCOL or nothing")
    return [(name, int(port)) for name in protocols]


def _named(text: str, port: str, protocols: tuple[str, ...], names: NamedPorts) -> list[Asked]:
    found: list[Asked] = [(name, number) for name, number in names.get(port, ()) if name in protocols]
    if not found:
        known = ", ".join(f"{name}/{item}" for name, items in names.items() for item, _ in items) or "none"
        raise Problem(400, f"port: {text!r} given, expected a number or a named port of the destination: {known}")
    return found


def _side(side: Side) -> dict[str, Any]:
    rule = side.rule
    origin = None
    if rule is not None:
        origin = {name: getattr(rule, name) for name in ("kind", "namespace", "name", "path", "file", "line")}
    return {
        "direction": side.direction,
        "enforced": side.enforced,
        "verdict": side.verdict,
        "why": side.why,
        "rule": origin,
    }
