"""Policies as strangers write them, and what they mean by the documentation alone: shares no code with the engine.

The cluster is plain manifests; ``World.allows`` reads them anew for every question, in the words of the two APIs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

Address = IPv4Address | IPv6Address
Labels = dict[tuple[str, str], str]
"""(source, key) -> value."""
SOURCES = ("any", "k8s", "reserved", "container", "cidr")
NAMESPACE = "io.kubernetes.pod.namespace"
SPACE_LABELS = "io.cilium.k8s.namespace.labels."


@dataclass
class End:
    """One end of a connection: ``kind`` is pod, host, world or init; ``plain`` are a pod's own labels."""

    kind: str
    address: Address | None = None
    namespace: str = ""
    plain: dict[str, str] = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)
    ports: list[tuple[str, str, int]] = field(default_factory=list)


def chosen(selector: dict[str, Any] | None, values: dict[str, str]) -> bool:
    """A Kubernetes label selector over plain labels."""
    selector = selector or {}
    for key, value in (selector.get("matchLabels") or {}).items():
        if values.get(key) != value:
            return False
    for item in selector.get("matchExpressions") or []:
        there, found = item["key"] in values, values.get(item["key"])
        wanted = item.get("values") or []
        good = {
            "In": there and found in wanted,
            "NotIn": not there or found not in wanted,
            "Exists": there,
            "DoesNotExist": not there,
        }
        if not good[item["operator"]]:
            return False
    return True


def named(selector: dict[str, Any], labels: Labels) -> bool:
    """A Cilium selector: keys may say a source, and without one mean any."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if value not in _values(key, labels):
            return False
    for item in selector.get("matchExpressions") or []:
        found, wanted = _values(item["key"], labels), set(item.get("values") or [])
        good = {
            "In": bool(found & wanted),
            "NotIn": not found & wanted,
            "Exists": bool(found),
            "DoesNotExist": not found,
        }
        if not good[item["operator"]]:
            return False
    return True


def _split(key: str) -> tuple[str, str]:
    source, colon, rest = key.partition(":")
    return (source, rest) if colon and source in SOURCES else ("any", key)


def _values(key: str, labels: Labels) -> set[str]:
    source, name = _split(key)
    return {value for (one, other), value in labels.items() if other == name and source in ("any", one)}


def _keys(selector: dict[str, Any]) -> list[tuple[str, str]]:
    items = [*(selector.get("matchLabels") or {}), *(x["key"] for x in selector.get("matchExpressions") or [])]
    return [_split(key) for key in items]


def _asked(selector: dict[str, Any]) -> dict[str, Any]:
    """The part of a selector that asks for labels, without what rules labels out."""
    items = selector.get("matchExpressions") or []
    return {**selector, "matchExpressions": [item for item in items if item["operator"] in ("In", "Exists")]}


def in_block(block: dict[str, Any], address: Address | None) -> bool:
    """Whether the block holds this very address; a whole family is said to hold one that nobody knows."""
    if address is None:
        return block["cidr"].endswith("/0") and not block.get("except")
    inside = address in ip_network(block["cidr"], strict=False)
    return inside and not any(address in ip_network(hole, strict=False) for hole in block.get("except") or [])


def on_port(item: dict[str, Any], protocols: list[str], proto: str, port: int, receiver: End) -> bool:
    """One item of ports: a number, a range, a name of the receiving pod's, or every port."""
    if proto not in protocols:
        return False
    wanted = item.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str) and not wanted.isdigit():
        return (wanted, proto, port) in receiver.ports
    return int(wanted) <= port <= (item.get("endPort") or int(wanted))


class World:
    """The cluster of some manifests."""

    def __init__(self, manifests: list[dict[str, Any]]) -> None:
        self.policies = [item for item in manifests if item["kind"].endswith("NetworkPolicy")]
        self.spaces = {
            item["metadata"]["name"]: item["metadata"].get("labels") or {}
            for item in manifests
            if item["kind"] == "Namespace"
        }
        self.services = {
            (item["metadata"]["namespace"], item["metadata"]["name"]): item
            for item in manifests
            if item["kind"] == "Service"
        }
        self.backends = {
            (item["metadata"]["namespace"], item["metadata"]["name"]): [
                address["ip"] for subset in item.get("subsets") or [] for address in subset["addresses"]
            ]
            for item in manifests
            if item["kind"] == "Endpoints"
        }

    def pod(self, manifest: dict[str, Any], address: Address | None) -> End:
        """A pod by its manifest, at one of its addresses."""
        meta, spec = manifest["metadata"], manifest["spec"]
        space, plain = meta["namespace"], meta.get("labels") or {}
        if spec.get("hostNetwork"):
            return End("host", address, labels={("reserved", "host"): ""})
        spaces = {**self.spaces.get(space, {}), "kubernetes.io/metadata.name": space}
        found = {("k8s", key): value for key, value in plain.items()}
        found |= {("k8s", SPACE_LABELS + key): value for key, value in spaces.items()}
        found |= {("k8s", NAMESPACE): space, ("k8s", "io.cilium.k8s.policy.cluster"): "default"}
        found[("k8s", "io.cilium.k8s.policy.serviceaccount")] = spec.get("serviceAccountName") or "default"
        ports = [
            (port["name"], port.get("protocol") or "TCP", port["containerPort"])
            for container in spec["containers"]
            for port in container.get("ports") or []
        ]
        return End("pod", address, space, plain, found, ports)

    def allows(self, own: End, peer: End, egress: bool, proto: str, port: int) -> bool:
        """Whether the policies of one end let the connection begin (``own`` is the sender where ``egress``)."""
        if own.kind not in ("pod", "init"):
            return True
        isolated, allowed, required = own.kind == "init", False, True
        receiver = peer if egress else own
        for policy in self.policies:
            if policy["kind"] == "NetworkPolicy":
                answer = self._kubernetes(policy, own, peer, egress, proto, port, receiver)
                isolated, allowed = isolated or answer is not None, allowed or bool(answer)
                continue
            for rule in [policy.get("spec"), *(policy.get("specs") or [])]:
                space = policy["metadata"]["namespace"]
                if not rule or not self._subject(rule["endpointSelector"], own, space):
                    continue
                init = ("reserved", "init") in _keys(rule["endpointSelector"])
                for section in rule.get("egress" if egress else "ingress") or []:
                    isolated = True
                    required &= all(
                        self._peer(item, peer, space, init)
                        for item in section.get("toRequires" if egress else "fromRequires") or []
                    )
                    allowed |= self._section(section, peer, egress, space, init, (proto, port, receiver))
        if not isolated or (peer.kind == "host" and not egress):
            return True
        return allowed and required

    # Kubernetes

    def _kubernetes(
        self, policy: dict[str, Any], own: End, peer: End, egress: bool, proto: str, port: int, receiver: End
    ) -> bool | None:
        """None: the policy is not about this pod and direction."""
        spec, space = policy["spec"], policy["metadata"]["namespace"]
        if own.kind != "pod" or own.namespace != space or not chosen(spec["podSelector"], own.plain):
            return None
        types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
        if ("Egress" if egress else "Ingress") not in types:
            return None
        for rule in spec.get("egress" if egress else "ingress") or []:
            peers, ports = (rule or {}).get("to" if egress else "from"), (rule or {}).get("ports")
            who = not peers or any(self._kubernetes_peer(item, peer, space) for item in peers)
            what = not ports or any(
                on_port(item, [item.get("protocol") or "TCP"], proto, port, receiver) for item in ports
            )
            if who and what:
                return True
        return False

    def _kubernetes_peer(self, item: dict[str, Any], peer: End, space: str) -> bool:
        if item.get("ipBlock") is not None:
            return in_block(item["ipBlock"], peer.address)
        if peer.kind != "pod":
            return False
        if item.get("namespaceSelector") is None:
            return peer.namespace == space and chosen(item["podSelector"], peer.plain)
        labels = {**self.spaces.get(peer.namespace, {}), "kubernetes.io/metadata.name": peer.namespace}
        return chosen(item["namespaceSelector"], labels) and chosen(item.get("podSelector"), peer.plain)

    # Cilium

    def _subject(self, selector: dict[str, Any], own: End, space: str) -> bool:
        if own.kind == "init":
            return ("reserved", "init") in _keys(selector) and named(selector, {("reserved", "init"): ""})
        return own.namespace == space and named(selector, own.labels)

    def _peer(self, selector: dict[str, Any], peer: End, space: str, init: bool) -> bool:
        """A policy's selectors stay in its namespace, unless they say a namespace or speak of reserved labels.

        They mean pods, unless they ask for a reserved label.
        """
        free = init or any(
            source == "reserved" or (source in ("any", "k8s") and (key == NAMESPACE or key.startswith(SPACE_LABELS)))
            for source, key in _keys(selector)
        )
        pod = ("k8s", NAMESPACE) in peer.labels or "reserved" in {source for source, _ in _keys(_asked(selector))}
        return pod and named(selector, peer.labels) and (free or peer.labels.get(("k8s", NAMESPACE)) == space)

    def _section(
        self, section: dict[str, Any], peer: End, egress: bool, space: str, init: bool, packet: tuple[str, int, End]
    ) -> bool:
        peers = self._peers(section, peer, "to" if egress else "from", space, init)
        if section.get("toPorts"):
            proto, port, receiver = packet
            items = [item for ports in section["toPorts"] for item in ports.get("ports") or []]
            protocols = [item.get("protocol") or "ANY" for item in items]
            return peers is not False and any(
                on_port(item, ["TCP", "UDP"] if name == "ANY" else [name], proto, port, receiver)
                for item, name in zip(items, protocols, strict=True)
            )
        return bool(peers)

    def _peers(self, section: dict[str, Any], peer: End, side: str, space: str, init: bool) -> bool | None:
        """None: the section names nobody."""
        answers: list[bool] = []
        answers += [self._peer(item, peer, space, init) for item in section.get(side + "Endpoints") or []]
        answers += [_entity(item, peer) for item in section.get(side + "Entities") or []]
        blocks = [{"cidr": item} for item in section.get(side + "CIDR") or []]
        blocks += section.get(side + "CIDRSet") or []
        answers += [peer.kind == "world" and in_block(item, peer.address) for item in blocks]
        answers += [self._service(item, peer, space) for item in section.get(side + "Services") or []]
        return any(answers) if answers else None

    def _service(self, item: dict[str, Any], peer: End, space: str) -> bool:
        """Services without selector stand for their endpoints' addresses outside of the cluster."""
        one, several = item.get("k8sService"), item.get("k8sServiceSelector")
        space = (one or several or {}).get("namespace") or space
        for (namespace, name), service in self.services.items():
            if service["spec"].get("selector") or namespace != space:
                continue
            labels = {("k8s", key): value for key, value in (service["metadata"].get("labels") or {}).items()}
            meant = name == one["serviceName"] if one else named(several["selector"], labels)  # type: ignore[index]
            if meant and peer.kind == "world" and str(peer.address) in self.backends.get((namespace, name), []):
                return True
        return False


def _entity(name: str, peer: End) -> bool:
    kinds = {
        "all": ("pod", "host", "world", "init"),
        "cluster": ("pod", "host", "init"),
        "world": ("world",),
        "host": ("host",),
        "init": ("init",),
        "none": (),
    }
    return peer.kind in kinds[name]


def addresses_of(manifest: dict[str, Any]) -> list[Address]:
    """The addresses of a pod, as its status tells them."""
    return [ip_address(item["ip"]) for item in (manifest.get("status") or {}).get("podIPs") or []]
