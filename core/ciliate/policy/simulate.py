"""What would happen to a flow: answered from the policy engine alone, with the reason.

It uses the same resolution as the agent, so that an answer cannot disagree with the datapath. Replies of an allowed
connection are always allowed; a flow here is a connection's first packet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from ipaddress import ip_network
from typing import Any

import msgspec

from ciliate.document import Document
from ciliate.identity.numeric import HEALTH, HOST, INIT, UNMANAGED, Identity
from ciliate.labels import SOURCE_RESERVED, Label, LabelSet
from ciliate.policy.isolation import isolating
from ciliate.policy.l7rules import L7Request, allows, normal_name
from ciliate.policy.mapstate import EGRESS, INGRESS, Verdict
from ciliate.policy.members import SOURCE_FQDN, cidr_label
from ciliate.policy.model import PROTOCOLS, Network
from ciliate.policy.places import NOWHERE
from ciliate.policy.porttable import PROXY_VISIBLE, NamedPorts, parsers_of
from ciliate.policy.problems import PolicyError, Problem
from ciliate.policy.repository import PolicySettings, Repository
from ciliate.policy.resolve import NO_NAMES, DirectionPolicy, names_key
from ciliate.policy.world import Address, ClusterService, Pod, World, covering
from ciliate.scenario.model import ALLOW, DENY, Flow, Names, Peer, parse_flow

_FIRST_IDENTITY = 1 << 20
_SOME_PORT = 1
"""Where a proxy is said to listen."""
UNKNOWN_PLACE = 1
"""The place of pods and nodes whose address is not told."""
_ENTITIES = {"host": HOST, "health": HEALTH, "unmanaged": UNMANAGED, "init": INIT}
_ECHO = {"ICMP": 8, "ICMPv6": 128}
_SIDES = ("ingress", "egress")
_PODS = ("pod", "workload")


class Result(msgspec.Struct, frozen=True):
    """``verdict`` is allow or deny; ``why`` names the rule, its object, file and line.

    ``assumed``: the layer-7 parsers that the answer counts on without knowing whether a proxy serves them.
    """

    verdict: str
    why: str
    assumed: tuple[str, ...] = ()


class _End(msgspec.Struct, frozen=True):
    """One end of a flow after look-up: what it is to its peer, and whose policy it obeys (endpoint id, 0 none)."""

    title: str
    identity: int
    endpoint: int = 0
    pod: Pod | None = None
    place: int = NOWHERE
    unnamed: int = 0
    """What it is while nobody knows that an address belongs to its DNS name."""


class Simulation:
    """A cluster and its policies, ready to be asked. ``objects`` are manifests, as dictionaries or Documents.

    ``names`` says which addresses DNS names have, and which of them somebody asked for before.

    Raises PolicyError with every mistake in any of them.
    """

    def __init__(
        self,
        objects: Iterable[Mapping[str, Any] | Document],
        enforcement: str = "default",
        cluster: str = "default",
        allow_localhost: bool = True,
        names: Names | None = None,
        proxies: Collection[str] | None = None,
    ) -> None:
        """``proxies``: the layer-7 parsers that are served; None: every one is taken to be, and answers say so."""
        documents = [item if isinstance(item, Document) else Document(dict(item)) for item in objects]
        self.world = World(documents, cluster)
        self._names = names or Names()
        self.proxies = proxies
        settings = PolicySettings(
            enforcement=enforcement,
            allow_localhost=allow_localhost,
            cluster=cluster,
            proxies=tuple((name, _SOME_PORT) for name in sorted(proxies or ())),
        )
        self.repository = Repository(settings)
        problems = list(self.world.problems)
        try:
            self.repository.import_documents(self.world.policies, "simulation")
        except PolicyError as error:
            problems.extend(error.problems)
        if problems:
            raise PolicyError(problems)
        self.repository.set_services(self.world.external_services())
        prefixes: list[Network | None] = [None, *sorted(self.repository.pod_cidrs(), key=str)]
        self.repository.add_places(dict(enumerate(prefixes, UNKNOWN_PLACE)))
        self._numbers: dict[object, int] = {}
        self._endpoints: dict[str, int] = {}
        self._ends: dict[tuple[Peer, int], _End] = {}
        self._isolations: dict[tuple[int, int], str] = {}
        self._prepare()

    def _prepare(self) -> None:
        """Make every identity that is known beforehand, so that later questions change nothing."""
        for key, pod in self.world.pods.items():
            if not pod.host_network:
                ep_id = self._endpoints[key] = len(self._endpoints) + 1
                self.repository.register_endpoint(ep_id, self._identity(pod.labels, NO_NAMES), pod.ports)
        for pod in self.world.pods.values():
            version = pod.addresses[0].version if pod.addresses else 4
            self._end(peer_of(pod), version)

    def _identity(self, labels: LabelSet, names: NamedPorts) -> int:
        key = (labels, names_key(names))
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = _FIRST_IDENTITY + len(self._numbers)
            self.repository.upsert_identities([Identity(number, labels)])
            if names:
                self.repository.set_peer_ports(number, names)
        return number

    # ends of a flow

    def family(self, flow: Flow) -> int:
        """The address family that a flow would take: 4 or 6."""
        if flow.family is not None:
            return flow.family
        for peer in (flow.src, flow.dst):
            if peer.address is not None:
                return peer.address.version
        if flow.protocol == "ICMPv6":
            return 6
        for peer in (flow.src, flow.dst):
            pod = self.world.pods.get(str(peer)) if peer.kind in _PODS else None
            known = pod.addresses if pod is not None else self._records(peer)
            if known and all(address.version == 6 for address in known):
                return 6
        return 4

    def _records(self, peer: Peer) -> tuple[Address, ...]:
        """The addresses of a DNS name, as far as they are told."""
        return self._names.records.get(normal_name(peer.name), ()) if peer.kind == "fqdn" else ()

    def _end(self, peer: Peer, family: int) -> _End:
        end = self._ends.get((peer, family))
        if end is None:
            end = self._ends[peer, family] = self._find_end(peer, family)
        return end

    def _find_end(self, peer: Peer, family: int) -> _End:
        if peer.kind in _PODS:
            pod = self.world.pods.get(str(peer))
            if pod is None:
                known = ", ".join(sorted(self.world.pods)) or "none"
                raise _error(str(peer), f"there is no such {peer.kind} in the scenario; there are: {known}")
            return self._pod_end(pod, family)
        if peer.address is not None:
            return self._address_end(peer.address)
        if peer.kind == "fqdn":
            return self._named_end(str(peer), (Label(SOURCE_RESERVED, "world"), self._whole(family)), [peer.name])
        return self._entity_end(peer, family)

    def _entity_end(self, peer: Peer, family: int) -> _End:
        number = _ENTITIES.get(peer.name)
        if number is None:
            # some address of the world that no policy names
            labels = (Label(SOURCE_RESERVED, "world"), self._whole(family))
            return _End(str(peer), self._identity(LabelSet(labels), NO_NAMES))
        if number != INIT:
            return _End(str(peer), number, place=UNKNOWN_PLACE)
        ep_id = self._endpoints.setdefault("init", len(self._endpoints) + 1)
        self.repository.register_endpoint(ep_id, INIT)
        return _End(str(peer), INIT, ep_id, place=UNKNOWN_PLACE)

    def _whole(self, family: int) -> Label:
        return cidr_label(ip_network("0.0.0.0/0" if family == 4 else "::/0"))

    def _address_end(self, address: Address) -> _End:
        pod = self.world.by_address.get(address)
        if pod is not None:
            return self._pod_end(pod, address.version)
        if address in self.world.hosts:
            return _End(f"ip/{address} (a node)", HOST, place=self._place(address))
        return self._world_end(f"ip/{address}", address, ())

    def _world_end(self, title: str, address: Address, asked: Iterable[str]) -> _End:
        """An address of the world. Policies by name know it by the names that were asked for and have it."""
        names = {*asked, *(name for name in self._names.seen if address in self._names.records[name])}
        labels = [Label(SOURCE_RESERVED, "world"), *map(cidr_label, covering(address))]
        return self._named_end(title, labels, names)

    def _named_end(self, title: str, labels: Iterable[Label], names: Iterable[str]) -> _End:
        """An end of the world with its names, which are known as long as a proxy for DNS sees the answers."""
        plain = LabelSet(labels)
        served = self.proxies is None or "dns" in self.proxies
        learned = [Label(SOURCE_FQDN, name) for name in names] if served else []
        unnamed = self._identity(plain, NO_NAMES)
        if not learned:
            return _End(title, unnamed)
        return _End(title, self._identity(LabelSet([*plain, *learned]), NO_NAMES), unnamed=unnamed)

    def _pod_end(self, pod: Pod, family: int) -> _End:
        title = str(peer_of(pod))
        address = pod.address(family) or next(iter(pod.addresses), None)
        place = self._place(address)
        if pod.host_network:
            return _End(f"{title} (host network)", HOST, place=place)
        return _End(title, self._identity(pod.labels, pod.ports), self._endpoints[title], pod, place)

    def _place(self, address: Address | None) -> int:
        """Where a pod or node is, to ipBlocks."""
        return UNKNOWN_PLACE if address is None else self.repository.place_of(address)

    # verdicts

    def verdict(self, flow: Flow | Mapping[str, Any]) -> Result:
        """Decide a flow. A service stands for all its endpoints: allow means that each of them may be reached.

        Raises PolicyError where the flow is malformed or names what the cluster does not have.
        """
        if not isinstance(flow, Flow):
            flow = parse_flow(flow)
        if flow.src.kind == "service":
            raise _error(str(flow.src), "a service opens no connections, expected another kind of peer")
        service = self._service(flow.dst)
        if service is not None:
            return self._service_verdict(flow, service)
        for peer in (flow.src, flow.dst):
            self._check_family(flow, peer)
        if self._records(flow.dst):
            return self._name_verdict(flow)
        return self._verdict(flow, flow.dst, flow.port)

    def _check_family(self, flow: Flow, peer: Peer) -> None:
        pod = self.world.pods.get(str(peer)) if peer.kind in _PODS else None
        if flow.family is not None and pod is not None and pod.addresses and pod.address(flow.family) is None:
            raise _error(
                str(peer), f"expected a {peer.kind} with an IPv{flow.family} address, as the flow has that family"
            )

    def _name_verdict(self, flow: Flow) -> Result:
        """A name stands for each of its addresses of the flow's family: whoever asked for it may get any."""
        family, name = self.family(flow), normal_name(flow.dst.name)
        addresses = [address for address in self._records(flow.dst) if address.version == family]
        if not addresses:
            raise _error(str(flow.dst), f"expected a name with an IPv{family} address in spec.dns.records")
        results = []
        for address in addresses:
            peer = Peer("ip", address=address)
            if address not in self.world.by_address and address not in self.world.hosts:
                peer = Peer("fqdn", name, address=address)
                self._ends[peer, family] = self._world_end(f"fqdn/{name} ({address})", address, [name])
            results.append(self._verdict(flow, peer, flow.port))
        return _all_of(results)

    def _verdict(self, flow: Flow, target: Peer, port: int | None) -> Result:
        family = target.address.version if target.address is not None else self.family(flow)
        src, dst = self._end(flow.src, family), self._end(target, family)
        if src.pod is not None and src.pod is dst.pod and flow.direction is None:
            return Result(ALLOW, "a pod may always reach itself: such traffic does not leave it")
        reasons = []
        assumed: list[str] = []
        for direction in (EGRESS, INGRESS):
            if flow.direction in (None, _SIDES[direction]):
                own, peer = (src, dst) if direction == EGRESS else (dst, src)
                result = self._side(own, peer, direction, flow, port)
                if result.verdict == DENY:
                    return result
                reasons.append(result.why)
                assumed += result.assumed
        return Result(ALLOW, "; ".join(reasons), tuple(dict.fromkeys(assumed)))

    def _side(self, own: _End, peer: _End, direction: int, flow: Flow, port: int | None) -> Result:
        name = _SIDES[direction]
        if not own.endpoint:
            return Result(ALLOW, f"{name}: {own.title} is no pod with policies")
        sides = self.repository.shared_policy(own.endpoint).sides
        assert sides is not None  # shared_policy resolves
        side = sides[direction]
        if not side.enforce:
            return Result(ALLOW, f"{name}: no policy isolates {own.title}")
        protocol = PROTOCOLS[flow.protocol] if flow.protocol else 0
        number = _ECHO.get(flow.protocol or "", port) if port is None else port
        found = side.find(peer.identity, protocol, number, peer.place)
        if found is None:
            return Result(DENY, f"{name}: nothing allows it, and {self._isolated(own, side)}")
        key, table = found
        entry = table.entries[key]
        decision = table.decisions.get(key)
        rule = self._rule(entry.rule)
        if entry.verdict is Verdict.ALLOW:
            return Result(ALLOW, f"{name}: allowed by {rule}", self._by_name(side, peer, protocol, number))
        if entry.verdict is Verdict.DENY:
            return Result(DENY, f"{name}: {decision.conflict if decision else 'denied'}, see {rule}")
        missing = () if entry.proxy_port else tuple(parsers_of(decision))
        if missing and self.proxies is not None:
            why = "; ".join(map(self.repository.proxies.why_not, missing))
            return Result(DENY, f"{name}: {why}: dropped (191), see {rule}")
        if decision is None or flow.request is None or decision.l7 == (PROXY_VISIBLE,):
            return Result(ALLOW, f"{name}: allowed to reach the proxy by {rule}", missing)
        return self._request(name, flow.request, decision.l7, rule, missing)

    def _by_name(self, side: DirectionPolicy, peer: _End, protocol: int, port: int | None) -> tuple[str, ...]:
        """The parser that has to see DNS answers, where only the name of the peer makes it an allowed one."""
        if self.proxies is not None or not peer.unnamed:
            return ()
        return () if side.find(peer.unnamed, protocol, port) is not None else ("dns",)

    def _request(
        self, name: str, request: L7Request, rules: Iterable[Any], rule: str, assumed: tuple[str, ...]
    ) -> Result:
        if any(allows(item, request) for item in rules):
            return Result(ALLOW, f"{name}: request allowed at layer 7 by {rule}", assumed)
        return Result(DENY, f"{name}: request denied at layer 7, see {rule}")

    def _rule(self, number: int) -> str:
        if number == 0:
            return "the rule that a node may reach its own pods"
        return str(self.repository.rule(number))

    def _isolated(self, own: _End, side: DirectionPolicy) -> str:
        """Which policies isolate an endpoint in one direction."""
        key = (own.endpoint, side.direction)
        text = self._isolations.get(key)
        if text is None:
            names = isolating(self.repository, self.repository.shared_policy(own.endpoint), side.direction)
            by = ", ".join(names) or "the enforcement mode"
            text = self._isolations[key] = f"{own.title} is isolated by {by}"
        return text

    # services

    def _service(self, peer: Peer) -> ClusterService | None:
        if peer.kind == "service":
            found = self.world.services.get((peer.namespace, peer.name))
            if found is None:
                names = ", ".join(sorted("/".join(key) for key in self.world.services)) or "none"
                raise _error(str(peer), f"there is no such service in the scenario; there are: {names}")
            return found
        return self.world.by_cluster_address.get(peer.address) if peer.address is not None else None

    def _service_verdict(self, flow: Flow, service: ClusterService) -> Result:
        targets = list(self._targets(flow, service))
        if not targets:
            wanted = f" for {flow.port}/{flow.protocol}" if flow.port else ""
            return Result(DENY, f"service {service.namespace}/{service.name} has no endpoint{wanted}")
        results = [self._verdict(flow, peer, port) for peer, port in targets]
        return _all_of(results)

    def _targets(self, flow: Flow, service: ClusterService) -> Iterable[tuple[Peer, int | None]]:
        """The endpoints behind a service and the port on each: policy looks behind the translation."""
        ports = [item for item in service.ports if (item.port, item.protocol) == (flow.port, flow.protocol)]
        for pod in self.world.selected_pods(service) if service.selector else ():
            peer = peer_of(pod)
            if flow.port is None:
                yield peer, None
            for item in ports:
                numbers = [item.target] if isinstance(item.target, int) else _numbers(pod, item.target, item.protocol)
                yield from ((peer, number) for number in numbers)
        for backend in self.world.backends.get((service.namespace, service.name), ()):
            pod_there = self.world.by_address.get(backend.address)
            if service.selector and pod_there is not None:
                continue  # named already by the selector
            peer = Peer("ip", address=backend.address)
            if flow.port is None:
                yield peer, None
            for item in ports:
                number = backend.ports.get((item.name, item.protocol))
                if number is not None:
                    yield peer, number


def peer_of(pod: Pod) -> Peer:
    """How a flow names a pod, or a workload that is in no namespace."""
    return Peer("pod", pod.name, pod.namespace) if pod.namespace else Peer("workload", pod.name)


def _all_of(results: list[Result]) -> Result:
    """Allow where each of them does, with what any of them counts on."""
    denied = next((result for result in results if result.verdict == DENY), None)
    if denied is not None:
        return denied
    assumed = dict.fromkeys(name for result in results for name in result.assumed)
    return msgspec.structs.replace(results[0], assumed=tuple(assumed))


def _numbers(pod: Pod, name: str, protocol: str) -> list[int]:
    return [number for found, number in pod.ports.get(name, []) if found == protocol]


def _error(value: str, expected: str) -> PolicyError:
    return PolicyError([Problem("", 0, "flow", value, "", expected)])
