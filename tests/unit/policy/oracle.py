"""A slow oracle: reads raw policy objects as the documentation reads, and shares no code with the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any


@dataclass(frozen=True)
class Party:
    """A pod (``namespace`` set), the node, or an address of the world."""

    kind: str
    namespace: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    address: str = ""
    namespace_labels: tuple[tuple[str, str], ...] = ()
    ports: dict[str, tuple[str, int]] = field(default_factory=dict, compare=False)


def _expression(labels: dict[str, str], item: dict[str, Any]) -> bool:
    key, operator, values = item["key"], item["operator"], item.get("values", [])
    return {
        "In": labels.get(key) in values,
        "NotIn": labels.get(key) not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }[operator]


def plain(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return all(labels.get(k) == v for k, v in wanted.items()) and all(
        _expression(labels, item) for item in selector.get("matchExpressions", [])
    )


def _in_block(block: dict[str, Any], address: str) -> bool:
    if not address:
        return block["cidr"].endswith("/0") and not block.get("except")
    at = ip_address(address)
    return at in ip_network(block["cidr"]) and not any(at in ip_network(hole) for hole in block.get("except", []))


def _port(item: dict[str, Any], proto: str, port: int, destination: Party, protocols: list[str]) -> bool:
    if proto not in protocols:
        return False
    wanted = item.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str) and not wanted.isdigit():
        return destination.ports.get(wanted) == (proto, port)
    return int(wanted) <= port <= item.get("endPort", int(wanted))


# Kubernetes


def _k8s_peer(peer: dict[str, Any], who: Party, namespace: str) -> bool:
    if "ipBlock" in peer:
        return _in_block(peer["ipBlock"], who.address)
    if who.kind != "pod":
        return False
    if "namespaceSelector" in peer:
        spaces = {**dict(who.namespace_labels), "kubernetes.io/metadata.name": who.namespace}
        if not plain(peer["namespaceSelector"], spaces):
            return False
    elif who.namespace != namespace:
        return False
    return plain(peer.get("podSelector", {}), dict(who.labels))


def _k8s(policy: dict[str, Any], own: Party, peer: Party, egress: bool, proto: str, port: int) -> bool | None:
    spec, namespace = policy["spec"], policy["metadata"]["namespace"]
    if own.namespace != namespace or not plain(spec["podSelector"], dict(own.labels)):
        return None
    types = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    if ("Egress" if egress else "Ingress") not in types:
        return None
    side, ends = ("egress", "to") if egress else ("ingress", "from")
    destination = peer if egress else own
    for rule in spec.get(side) or []:
        peers, ports = rule.get(ends) or [], rule.get("ports") or []
        if peers and not any(_k8s_peer(item, peer, namespace) for item in peers):
            continue
        if not ports or any(_port(item, proto, port, destination, [item.get("protocol", "TCP")]) for item in ports):
            return True
    return False


# Cilium


def _endpoint(selector: dict[str, Any], who: Party, namespace: str) -> bool:
    keys = [*selector.get("matchLabels", {}), *(item["key"] for item in selector.get("matchExpressions", []))]
    if any(key.startswith("reserved:") for key in keys):
        return f"reserved:{who.kind}" in keys
    labels = dict(who.labels)
    if who.kind == "pod":
        labels["k8s:io.kubernetes.pod.namespace"] = who.namespace
    if "k8s:io.kubernetes.pod.namespace" not in keys and who.namespace != namespace:
        return False
    return plain(selector, labels)


def _entity(name: str, who: Party) -> bool:
    inside = who.kind in ("pod", "host")
    return {"all": True, "world": who.kind == "world", "host": who.kind == "host", "cluster": inside, "none": False}[
        name
    ]


def _cilium_peers(rule: dict[str, Any], prefix: str, who: Party, namespace: str) -> bool | None:
    """None: the rule names no layer-3 peer."""
    found = None
    for item in rule.get(prefix + "Endpoints") or []:
        found = bool(found) or _endpoint(item, who, namespace)
    for item in rule.get(prefix + "Entities") or []:
        found = bool(found) or _entity(item, who)
    blocks = [{"cidr": cidr} for cidr in rule.get(prefix + "CIDR") or []] + (rule.get(prefix + "CIDRSet") or [])
    for item in blocks:
        found = bool(found) or (who.kind == "world" and _in_block(item, who.address))
    return found


def _cilium_ports(rule: dict[str, Any], proto: str, port: int, destination: Party) -> bool:
    for ports in rule["toPorts"]:
        for item in ports.get("ports", []):
            wanted = item.get("protocol", "ANY")
            if _port(item, proto, port, destination, ["TCP", "UDP"] if wanted == "ANY" else [wanted]):
                return True
    return False


def _cilium_sections(policy: dict[str, Any], own: Party, egress: bool) -> list[dict[str, Any]]:
    namespace, found = policy["metadata"]["namespace"], []
    for rule in [policy.get("spec"), *(policy.get("specs") or [])]:
        if rule and own.namespace == namespace and plain(rule["endpointSelector"], dict(own.labels)):
            found.extend(rule.get("egress" if egress else "ingress") or [])
    return found


def allowed(policies: list[dict[str, Any]], src: Party, dst: Party, egress: bool, proto: str, port: int) -> bool:
    """Whether the policies of the source (egress) or of the destination let a connection begin."""
    own, peer = (src, dst) if egress else (dst, src)
    if own.kind != "pod":
        return True
    isolated = permitted = False
    met = True
    for policy in policies:
        if policy["kind"] == "NetworkPolicy":
            answer = _k8s(policy, own, peer, egress, proto, port)
            isolated, permitted = isolated or answer is not None, permitted or bool(answer)
            continue
        prefix, namespace = ("to" if egress else "from"), policy["metadata"]["namespace"]
        for rule in _cilium_sections(policy, own, egress):
            isolated = True
            met = met and all(_endpoint(item, peer, namespace) for item in rule.get(prefix + "Requires") or [])
            peers = _cilium_peers(rule, prefix, peer, namespace)
            if rule.get("toPorts"):
                permitted = permitted or (
                    peers is not False and _cilium_ports(rule, proto, port, peer if egress else own)
                )
            else:
                permitted = permitted or bool(peers)
    if not isolated or (peer.kind == "host" and not egress):
        return True
    return permitted and met
