"""Synthetic clusters: identities and policy manifests, the same for the same numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

from ciliate.identity.numeric import CLUSTER_MIN, Identity
from ciliate.labels import CLUSTER, NAMESPACE, NAMESPACE_LABELS_PREFIX, SERVICE_ACCOUNT, LabelSet
from ciliate.manifest import Document

GROUP = 10
"""Identities that one peer selector selects."""
SPACES = 10
LOCAL_SPACE = "bench"
POOL = -1
"""Stands for every local endpoint where a rule's subject is asked."""
FIRST = CLUSTER_MIN
PREFIXES = 256
_SPACE_NAME = NAMESPACE_LABELS_PREFIX + "kubernetes.io/metadata.name"
_GOLDEN = 2654435769
"""2 to the power of 32 over the golden ratio: its multiples spread evenly, whatever the number of peers."""


class Cluster:
    """``identities`` of them in all, of which the first ``endpoints`` are this node's; the rest are peers by groups."""

    def __init__(self, endpoints: int, identities: int) -> None:
        self.endpoints = endpoints
        self.identities = identities
        self.groups = max((identities - endpoints) // GROUP, 1)

    def number(self, index: int) -> int:
        """The numeric identity of the ``index``-th one."""
        return FIRST + index

    def group(self, index: int) -> int:
        """The group of an identity that is not local."""
        return (index - self.endpoints) % self.groups

    def labels(self, index: int) -> tuple[str, dict[str, str]]:
        """Namespace and pod labels of an identity."""
        if index < self.endpoints:
            return LOCAL_SPACE, {"app": f"local-{index}", "pool": "local", "tier": "backend", "release": "stable"}
        group = self.group(index)
        own = {"app": f"app-{index}", "group": f"group-{group}", "tier": f"tier-{index % 3}", "release": "stable"}
        return _space(group), own

    def identity(self, index: int) -> Identity:
        """The identity with texts of its own, as they are when they come from the store."""
        space, own = self.labels(index)
        given = {**own, NAMESPACE: space, _SPACE_NAME: space, CLUSTER: "default", SERVICE_ACCOUNT: "default"}
        return Identity(self.number(index), LabelSet.parse(f"k8s:{key}={value}" for key, value in given.items()))

    def every_identity(self) -> Iterator[Identity]:
        """All of them, the local ones first."""
        return map(self.identity, range(self.identities))

    def rule(self, number: int, subject: int) -> dict[str, Any]:
        """One policy object. ``subject`` is a local endpoint's index or POOL.

        Of ten: six allow a group on a port, and one each has an In expression, a port range on egress, a prefix, and
        ports for anyone; one of the six is a Kubernetes NetworkPolicy.
        """
        kind = number % 10
        name = f"rule-{number}"
        chosen = {"pool": "local"} if subject == POOL else {"app": f"local-{subject}"}
        if kind == 5:
            return _kubernetes(name, chosen, self._peer(number), _port(number))
        body = {"endpointSelector": {"matchLabels": chosen}, **self._side(kind, number)}
        meta = {"name": name, "namespace": LOCAL_SPACE}
        return {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": meta, "spec": body}

    def _peer(self, number: int) -> int:
        return (number * _GOLDEN & 0xFFFFFFFF) * self.groups >> 32

    def _side(self, kind: int, number: int) -> dict[str, Any]:
        group, port = self._peer(number), _port(number)
        ports = [{"ports": [{"port": str(port), "protocol": "TCP"}]}]
        if kind == 6:
            return {"ingress": [{"fromEndpoints": [_either(group, self.groups)], "toPorts": ports}]}
        if kind == 7:
            block = [{"ports": [{"port": str(port & ~7), "endPort": port | 7, "protocol": "TCP"}]}]
            return {"egress": [{"toEndpoints": [_selects(group)], "toPorts": block}]}
        if kind == 8:
            return {"egress": [{"toCIDR": [f"198.18.{number // 10 % PREFIXES}.0/24"], "toPorts": ports}]}
        if kind == 9:
            return {"ingress": [{"toPorts": ports}]}
        return {"ingress": [{"fromEndpoints": [_selects(group)], "toPorts": ports}]}

    def rules(self, count: int, shared: bool = False) -> list[dict[str, Any]]:
        """Rules spread over the endpoints, or all of them for every endpoint where ``shared``."""
        return [self.rule(number, POOL if shared else number // 10 % self.endpoints) for number in range(count)]

    def pods(self) -> Iterator[dict[str, Any]]:
        """The identities as pods, each with an address, and their namespaces."""
        for name in (LOCAL_SPACE, *map(_space, range(SPACES))):
            yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        for index in range(self.identities):
            space, own = self.labels(index)
            yield {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": own["app"], "namespace": space, "labels": own},
                "spec": {"containers": [{"name": "main", "image": "x"}]},
                "status": {"podIP": f"10.{index >> 16 & 255}.{index >> 8 & 255}.{index & 255}"},
            }

    def pod(self, index: int) -> str:
        """``namespace/name`` of an identity's pod."""
        space, own = self.labels(index)
        return f"{space}/{own['app']}"

    def flows(self, count: int, rules: int) -> Iterator[dict[str, Any]]:
        """Flows: four of ten as a spread rule allows them, three between any peer and a local pod, and others."""
        chance = random.Random(count)
        peers = range(self.endpoints, self.identities)
        for kind in (number % 10 for number in range(count)):
            rule, one, two = chance.randrange(rules) // 10 * 10 + kind, chance.choice(peers), chance.choice(peers)
            local = self.pod(rule // 10 % self.endpoints)
            if kind < 4:
                member = self.endpoints + self._peer(rule) + self.groups * chance.randrange(GROUP)
                ends = (self.pod(member), local)
            elif kind < 7:
                ends = (self.pod(one), local)
            elif kind < 9:
                ends = (local, f"ip/198.18.{rule // 10 % PREFIXES}.1")
            else:
                ends = (self.pod(one), self.pod(two))
            yield {"from": ends[0], "to": ends[1], "port": _port(rule), "protocol": "TCP"}


def documents(objects: Iterable[dict[str, Any]]) -> list[Document]:
    """Objects as read from a file, with the line of every field."""
    found, line = [], 1
    for item in objects:
        lines: dict[str, int] = {}
        last = _note_lines(item, "", line, lines)
        found.append(Document(item, "policies.yaml", line, lines))
        line = last + 2
    return found


def _note_lines(value: Any, path: str, line: int, lines: dict[str, int]) -> int:
    if isinstance(value, dict):
        below = [(f"{path}.{key}" if path else key, item) for key, item in value.items()]
    else:
        below = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    for name, item in below:
        lines[name] = line
        line = _note_lines(item, name, line + 1, lines) if isinstance(item, (dict, list)) else line + 1
    return line


def _space(group: int) -> str:
    return f"team-{group % SPACES}"


def _port(number: int) -> int:
    # a group is named by every groups-th rule: consecutive ones must not all have the same port
    return 1024 + number % 6007


def _selects(group: int) -> dict[str, Any]:
    return {"matchLabels": {"group": f"group-{group}", f"k8s:{NAMESPACE}": _space(group)}}


def _either(group: int, groups: int) -> dict[str, Any]:
    other = (group + SPACES) % groups
    item = {"key": "group", "operator": "In", "values": sorted({f"group-{group}", f"group-{other}"})}
    return {"matchExpressions": [item], "matchLabels": {f"k8s:{NAMESPACE}": _space(group)}}


def _kubernetes(name: str, chosen: dict[str, str], group: int, port: int) -> dict[str, Any]:
    peer = {
        "podSelector": {"matchLabels": {"group": f"group-{group}"}},
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": _space(group)}},
    }
    spec = {
        "podSelector": {"matchLabels": chosen},
        "ingress": [{"from": [peer], "ports": [{"port": port, "protocol": "TCP"}]}],
    }
    meta = {"name": name, "namespace": LOCAL_SPACE}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec}
