"""From flows to probes: who sends what to whom, as pure data. Nothing here touches a namespace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import msgspec

from ciliate.lab import underlay, world
from ciliate.lab.services import LabService
from ciliate.lab.state import NODE, WORLD, LabPod
from ciliate.scenario.model import Flow, Peer, parse_peer

LAYER3_PORT = 49151
"""Where a flow without a port goes: a port that scenarios have no reason to name."""
FAMILIES = (4, 6)
POD_RANGES = (ip_network("10.200.0.0/16"), ip_network("fd00:c11:a7e::/96"))
PROBES_EACH = 4
"""Probes to a service for each of its backends."""
ECHO = {"ICMP": (None, 8), "ICMPv6": (None, 128)}


class SkippedError(Exception):
    """A flow that the lab cannot send yet; the text says why."""


class Place(msgspec.Struct, frozen=True):
    """One end of a flow: the helper there, and its address of each family. ``host``: it is a node."""

    helper: str
    addresses: tuple[str, ...]
    host: bool = False

    def address(self, family: int) -> str | None:
        """The address of a family, or None."""
        return next((text for text in self.addresses if ip_address(text).version == family), None)


class Probe(msgspec.Struct, frozen=True):
    """One packet or connection to send. ``flow`` is an index into the flows; ``source`` None lets the kernel choose."""

    flow: int
    family: int
    sender: str
    receiver: str
    protocol: str
    address: str
    port: int | None
    source: str | None
    behind: tuple[tuple[str, int], ...] | None = None
    """Of a service: who may answer, and on which port."""

    @property
    def receivers(self) -> tuple[str, ...]:
        """Who may answer."""
        return (self.receiver,) if self.behind is None else tuple(place for place, _ in self.behind)

    def reached(self, outcome: Mapping[str, Any]) -> bool:
        """Whether it got there. A service without backends refuses by itself, so of one only an answer counts."""
        return bool(outcome["reached"] and (self.behind is None or outcome["who"]))

    def request(self, number: int, timeout: float) -> dict[str, Any]:
        """The helper's command; ``number`` is unique among those under way (it becomes the echo's identifier)."""
        return {
            "id": number % 65536,
            "protocol": self.protocol,
            "address": self.address,
            "port": self.port,
            "source": self.source,
            "timeout": timeout,
        }


class Places:
    """Where each peer of a scenario is in a lab."""

    def __init__(
        self,
        pods: Mapping[str, LabPod],
        pod_addresses: Mapping[str, str],
        elsewhere: Mapping[str, str],
        services: Mapping[tuple[str, str], LabService] | None = None,
    ) -> None:
        """``pod_addresses`` are the manifests' own addresses with the pod that has each; ``elsewhere`` pods of other
        clusters, with the cluster."""
        self._services = services or {}
        self._pods = pods
        self._pod_addresses = pod_addresses
        self._elsewhere = elsewhere
        self._families: dict[str, set[int]] = {}
        for address, name in pod_addresses.items():
            self._families.setdefault(name, set()).add(6 if ":" in address else 4)

    def families(self, flow: Flow) -> tuple[int, ...]:
        """The address families in which a flow is sent: those that it names, and that its manifests give its pods."""
        wanted = (6,) if flow.protocol == "ICMPv6" else (4,) if flow.protocol == "ICMP" else FAMILIES
        wanted = wanted if flow.family is None else (flow.family,)
        told = [self._families[name] for peer in (flow.src, flow.dst) if (name := str(peer)) in self._families]
        return tuple(family for family in wanted if all(family in families for families in told))

    def find(self, peer: Peer, beside: Peer | None = None) -> Place:
        """The place of a peer; SkippedError where the lab has none.

        ``host`` is the node of the other end of the flow (``beside``), as is a host-network pod that names no node:
        to a pod of another node a node's processes are the world.
        """
        if peer.kind in ("pod", "workload"):
            return self._pod(str(peer), beside)
        if peer.kind == "ip" and peer.address is not None:
            return self._address(peer.address, beside)
        if peer.kind == "entity" and peer.name == "host":
            return self._host(beside)
        if peer.kind == "entity" and peer.name == "world":
            return Place(WORLD, world.WORLD_ADDRESSES)
        raise SkippedError(f"a lab has no {peer.kind} {peer.name!r} yet")

    def service(self, peer: Peer) -> tuple[tuple[str, ...], LabService] | None:
        """The addresses that a peer means of a service, and the service; None where it means none."""
        if peer.kind == "service":
            found = self._services.get((peer.namespace, peer.name))
            return (found.addresses, found) if found else None
        text = str(peer.address) if peer.kind == "ip" else ""
        found = next((item for item in self._services.values() if text in item.addresses), None)
        return ((text,), found) if found else None

    def node_port(self, flow: Flow) -> tuple[tuple[str, ...], LabService] | None:
        """The node's addresses, and what answers on this port of it; None where it is no service's."""
        key = (flow.protocol or "", flow.port or 0)
        found = next((item for item in self._services.values() if key in item.node_ports), None)
        if found is None or flow.dst.kind != "entity" or flow.dst.name != "host":
            return None
        return self._host(flow.src).addresses, LabService((), found.node_ports)

    def real(self, peer: Peer) -> Peer:
        """The pod behind an address that a manifest gives to a pod; any other peer as it is."""
        name = self._pod_addresses.get(str(peer.address)) if peer.kind == "ip" else None
        return parse_peer(name) if name is not None else peer

    def _host(self, beside: Peer | None) -> Place:
        pod = self._pods.get(str(self.real(beside))) if beside is not None else None
        node = pod.node if pod is not None and pod.node else NODE
        return Place(node, underlay.addresses(node), True)

    def _pod(self, name: str, beside: Peer | None) -> Place:
        if name in self._elsewhere:
            raise SkippedError(f"{name} is in cluster {self._elsewhere[name]!r}, and a lab has one cluster yet")
        pod = self._pods.get(name)
        if pod is None:
            raise SkippedError(f"{name} is no pod of the scenario")
        if pod.host_network:
            return Place(pod.node, tuple(pod.addresses), True) if pod.node else self._host(beside)
        return Place(name, tuple(pod.addresses))

    def _address(self, address: IPv4Address | IPv6Address, beside: Peer | None) -> Place:
        text = str(address)
        if text in self._pod_addresses:
            place = self._pod(self._pod_addresses[text], beside)
            same = tuple(item for item in place.addresses if (":" in item) == (":" in text))
            return msgspec.structs.replace(place, addresses=same)
        if any(address in network for network in POD_RANGES):
            raise SkippedError(f"{text} is in the range of the lab's own pods")
        return Place(WORLD, (text,))


def outside_addresses(flows: Iterable[Flow], places: Places) -> list[str]:
    """The addresses that the world has to have for these flows."""
    found: dict[str, None] = {}
    for flow in flows:
        for peer in (flow.src, flow.dst):
            if peer.kind == "ip" and peer.address is not None:
                try:
                    place = places.find(peer)
                except SkippedError:
                    continue
                if place.helper == WORLD:
                    found[str(peer.address)] = None
    return list(found)


def plan_flow(index: int, flow: Flow, places: Places) -> list[Probe]:
    """The probes of one flow, one per address family; SkippedError where the lab cannot send it."""
    if flow.request is not None:
        raise SkippedError("requests of layer 7 are not sent yet")
    protocol, port = _packet(flow)
    service = places.node_port(flow) or places.service(flow.dst)
    if service is not None:
        return _plan_service(index, flow, places.find(flow.src, flow.dst), *service)
    source, target = places.find(flow.src, flow.dst), places.find(flow.dst, flow.src)
    probes = []
    for family in places.families(flow):
        sender, receiver = source.address(family), target.address(family)
        if sender is not None and receiver is not None:
            # the node's address depends on the way, as it would for any of its processes
            own = None if source.host else sender
            probes.append(Probe(index, family, source.helper, target.helper, protocol, receiver, port, own))
    if not probes:
        raise SkippedError("its ends have no address family in common")
    return probes


def _plan_service(index: int, flow: Flow, source: Place, addresses: Iterable[str], service: LabService) -> list[Probe]:
    """Enough probes that every backend is likely to answer one: a service stands for all that is behind it."""
    if flow.port is None or flow.protocol is None:
        raise SkippedError("a service has ports, and the flow names none")
    behind = service.targets.get((flow.protocol, flow.port), ())
    probes = []
    for address in addresses:
        if flow.family is not None and flow.family != (6 if ":" in address else 4):
            continue
        own = source.address(6 if ":" in address else 4)
        if own is not None:
            probe = Probe(
                index,
                6 if ":" in address else 4,
                source.helper,
                "",
                flow.protocol,
                address,
                flow.port,
                None if source.host else own,
                behind,
            )
            probes += [probe] * (PROBES_EACH * len(behind) if len(behind) > 1 else 1)
    if not probes:
        raise SkippedError("its ends have no address family in common")
    return probes


def _packet(flow: Flow) -> tuple[str, int | None]:
    if flow.protocol in ECHO:
        if flow.port not in ECHO[flow.protocol]:
            raise SkippedError(f"{flow.protocol} messages of type {flow.port} are not sent yet, only echo requests")
        return "ICMP", None
    if flow.protocol is None:
        # layer 3 alone: an echo has no port that a rule could name
        return "ICMP", None
    if flow.protocol not in ("TCP", "UDP", "SCTP"):
        raise SkippedError(f"protocol {flow.protocol} is not sent yet")
    return flow.protocol, flow.port or LAYER3_PORT


def ports_to_serve(probes: Iterable[Probe]) -> dict[str, list[tuple[str, int]]]:
    """Helper -> the (protocol, port) pairs on which it has to answer."""
    wanted: dict[str, dict[tuple[str, int], None]] = {}
    for probe in probes:
        for place, port in probe.behind or ():
            wanted.setdefault(place, {})[probe.protocol, port] = None
        if probe.port is not None and probe.behind is None:
            wanted.setdefault(probe.receiver, {})[probe.protocol, probe.port] = None
    return {helper: list(ports) for helper, ports in wanted.items()}


def by_sender(probes: Sequence[Probe]) -> dict[str, list[int]]:
    """Helper -> indexes of the probes that it sends."""
    senders: dict[str, list[int]] = {}
    for number, probe in enumerate(probes):
        senders.setdefault(probe.sender, []).append(number)
    return senders
