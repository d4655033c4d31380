"""Clusters and policies at random, with every corner of the two APIs in them."""

from __future__ import annotations

import random
from typing import Any

KEYS = ("app", "tier", "app.kubernetes.io/name")
VALUES = ("a", "b", "")
SPACES = {"ns1": {"team": "red"}, "ns2": {"team": "blue", "env": "b"}, "ns3": None}
WORLD = ("198.51.100.1", "198.51.100.40", "203.0.113.9", "2001:db8::1", "2001:db8:1::1")
NODES = ("10.2.0.1", "fd00:2::1")
BLOCKS: dict[str, list[str]] = {
    "0.0.0.0/0": ["10.0.0.0/8", "203.0.113.0/24", "10.0.0.4/30"],
    "::/0": ["fd00::/64", "2001:db8::/48"],
    "10.0.0.0/29": ["10.0.0.2/31", "10.0.0.4/32"],
    "10.0.0.2/31": ["10.0.0.3/32"],
    "10.0.0.5/32": [],
    "10.2.0.0/16": ["10.2.0.0/31"],
    "fd00::/125": ["fd00::2/127"],
    "fd00::3/128": [],
    "fd00:2::1/128": [],
    "198.51.100.0/24": ["198.51.100.32/27"],
    "2001:db8::/32": ["2001:db8:1::/48"],
}
AROUND_PODS = ("0.0.0.0/0", "::/0", "10.0.0.0/29", "fd00::/125")
PORTS = (53, 79, 80, 81, 443, 8080, 8081, 65535)
RANGES = ((80, 81), (1, 1023), (8000, 8999), (8080, 65535))
NAMES = ("http", "dns", "alt")
NUMBERS = {
    "http": [("TCP", 80), ("TCP", 8080)],
    "dns": [("UDP", 53), ("TCP", 53)],
    "alt": [("TCP", 8081), ("SCTP", 80)],
}
ENTITIES = ("all", "world", "host", "cluster", "init", "none")


class Stranger(random.Random):
    """Writes clusters."""

    def some(self, make: Any, low: int, high: int) -> list[Any]:
        """Between ``low`` and ``high`` of what ``make`` gives."""
        return [make() for _ in range(self.randint(low, high))]

    def absent(self, fields: dict[str, Any], name: str, value: Any, empty: Any = None) -> None:
        """Say ``value``, or say nothing in one of three ways."""
        way = self.random()
        if way < 0.7:
            fields[name] = value
        elif way < 0.85:
            fields[name] = empty if self.random() < 0.5 else None

    def packet(self, names: list[tuple[str, str, int]]) -> tuple[str, int]:
        """Protocol and port of a packet to a pod with these named ports: often one of them."""
        if names and self.random() < 0.5:
            return self.choice(names)[1:]
        return self.choice(["TCP", "UDP", "SCTP"]), self.choice(PORTS)

    def own_labels(self) -> dict[str, str]:
        return {key: self.choice(VALUES) for key in KEYS if self.random() < 0.5}

    def selector(self, prefixes: tuple[str, ...] = ("",), keys: tuple[str, ...] = KEYS) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.random() < 0.5:
            labels = {self.choice(prefixes) + self.choice(keys): self.choice(VALUES) for _ in range(self.randint(0, 2))}
            found["matchLabels"] = labels
        if self.random() < 0.35:
            operator = self.choice(["In", "NotIn", "Exists", "DoesNotExist"])
            item: dict[str, Any] = {"key": self.choice(prefixes) + self.choice(keys), "operator": operator}
            if operator in ("In", "NotIn"):
                item["values"] = self.sample(VALUES, self.randint(1, 2))
            elif self.random() < 0.3:
                item["values"] = self.choice([None, []])
            found["matchExpressions"] = [item]
        elif self.random() < 0.2:
            found["matchExpressions"] = self.choice([None, []])
        return found

    def subject(self, prefixes: tuple[str, ...]) -> dict[str, Any]:
        return {} if self.random() < 0.4 else self.selector(prefixes)

    def block(self) -> dict[str, Any]:
        cidr = self.choice(list(BLOCKS)) if self.random() < 0.5 else self.choice(AROUND_PODS)
        found: dict[str, Any] = {"cidr": cidr}
        holes = BLOCKS[cidr]
        self.absent(found, "except", self.sample(holes, self.randint(0, len(holes))), [])
        return found

    # Kubernetes

    def kubernetes_port(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.random() < 0.6:
            found["protocol"] = self.choice(["TCP", "UDP", "SCTP"])
        kind = self.randrange(4)
        if kind == 0:
            return self.named_port()
        elif kind == 1:
            found["port"], found["endPort"] = self.choice(RANGES)
        elif kind == 2:
            found["port"] = self.choice(PORTS)
        return found

    def named_port(self) -> dict[str, Any]:
        name = self.choice(NAMES)
        return {"port": name, "protocol": self.choice(NUMBERS[name])[0]}

    def kubernetes_peer(self) -> dict[str, Any]:
        kind = self.randrange(5)
        if kind < 2:
            return {"ipBlock": self.block()}
        peer: dict[str, Any] = {}
        if kind in (2, 4):
            peer["podSelector"] = self.selector()
        if kind in (3, 4):
            peer["namespaceSelector"] = self.choice(
                [{}, self.selector(keys=("team", "env")), {"matchLabels": {"kubernetes.io/metadata.name": "ns2"}}]
            )
        return peer

    def kubernetes(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"podSelector": self.subject(("",))}
        for side, ends in (("ingress", "from"), ("egress", "to")):
            rules: list[Any] = []
            for _ in range(self.randint(0, 2)):
                rule: dict[str, Any] = {}
                if self.random() < 0.25:
                    ports = self.some(self.named_port, 1, 2)
                    rules.append({ends: [{"ipBlock": self.block()}], "ports": ports})
                    continue
                self.absent(rule, ends, self.some(self.kubernetes_peer, 1, 3), [])
                self.absent(rule, "ports", self.some(self.kubernetes_port, 1, 2), [])
                rules.append(rule or self.choice([{}, None]))
            self.absent(spec, side, rules, [])
        types = self.choice([["Ingress"], ["Egress"], ["Ingress", "Egress"]])
        self.absent(spec, "policyTypes", types, [])
        return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": spec}

    # Cilium

    def cilium_port(self) -> dict[str, Any]:
        kind, found = self.randrange(3), {}
        if kind == 0:
            found = {"port": self.choice(NAMES)}
        elif kind == 1:
            first, last = self.choice(RANGES)
            found = {"port": str(first), "endPort": last}
        else:
            found = {"port": str(self.choice(PORTS))}
        if self.random() < 0.7:
            found["protocol"] = self.choice(["TCP", "UDP", "SCTP", "ANY"])
        return found

    def cilium_selector(self) -> dict[str, Any]:
        kind = self.randrange(7)
        if kind == 0:
            return {"matchLabels": {"reserved:" + self.choice(["host", "world", "init"]): ""}}
        found = self.selector(("", "k8s:", "any:"))
        if kind == 1:
            key = self.choice(["", "k8s:", "any:"]) + "io.kubernetes.pod.namespace"
            labels = found.get("matchLabels") or {}
            found["matchLabels"] = {**labels, key: self.choice(list(SPACES))}
        elif kind == 2:
            labels = found.get("matchLabels") or {}
            team = {"k8s:io.cilium.k8s.namespace.labels.team": self.choice(["red", "blue"])}
            found["matchLabels"] = {**labels, **team}
        elif kind == 3:
            account = {"io.cilium.k8s.policy.serviceaccount": self.choice(["default", "robot"])}
            found["matchLabels"] = {**(found.get("matchLabels") or {}), **account}
        return found

    def service(self) -> dict[str, Any]:
        space = self.choice([{}, {"namespace": "ns1"}, {"namespace": "ns2"}])
        if self.random() < 0.5:
            return {"k8sService": {"serviceName": self.choice(["out", "other"]), **space}}
        return {"k8sServiceSelector": {"selector": {"matchLabels": {"svc": self.choice(["out", "other"])}}, **space}}

    def section(self, side: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        kind = self.randrange(7)
        if kind < 2:
            found[side + "Endpoints"] = self.some(self.cilium_selector, 0, 2)
        elif kind == 2:
            found[side + "Entities"] = self.some(lambda: self.choice(ENTITIES), 1, 2)
        elif kind == 3:
            found[side + "CIDRSet"] = self.some(self.block, 1, 2)
        elif kind == 4:
            found[side + "CIDR"] = self.some(lambda: self.choice(list(BLOCKS)), 1, 2)
        elif kind == 5 and side == "to":
            found["toServices"] = self.some(self.service, 1, 2)
        if self.random() < 0.12:
            found[side + "Requires"] = [self.selector(("", "k8s:"))]
        if self.random() < 0.5:
            self.absent(found, "toPorts", [{"ports": self.some(self.cilium_port, 1, 2)}], [])
        return found

    def cilium_rule(self) -> dict[str, Any]:
        init = self.random() < 0.1
        subject = {"matchLabels": {"reserved:init": ""}} if init else self.subject(("", "k8s:"))
        rule: dict[str, Any] = {"endpointSelector": subject}
        for side, end in (("ingress", "from"), ("egress", "to")):
            if self.random() < 0.7:
                self.absent(rule, side, [self.section(end) for _ in range(self.randint(1, 3))], [])
        return rule

    def cilium(self) -> dict[str, Any]:
        rules = self.some(self.cilium_rule, 1, 2)
        body = {"spec": rules[0]} if len(rules) == 1 else {"specs": rules}
        return {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", **body}

    # clusters

    def pod(self, number: int, space: str, labels: dict[str, str], account: str) -> dict[str, Any]:
        ports = [
            dict(zip(("protocol", "containerPort"), self.choice(NUMBERS[name]), strict=True), name=name)
            for name in NAMES
            if self.random() < 0.6
        ]
        spec: dict[str, Any] = {"containers": [{"name": "main", "image": "x", "ports": ports}]}
        if account:
            spec["serviceAccountName"] = account
        if self.random() < 0.05:
            spec["hostNetwork"] = True
        texts = [text for text in (f"10.0.0.{number}", f"fd00::{number}") if self.random() < 0.8]
        if spec.get("hostNetwork"):
            texts = list(NODES)
        pod = {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": f"p{number}", "namespace": space}, "spec": spec}
        pod["metadata"]["labels"] = labels  # type: ignore[index]
        if texts:
            pod["status"] = {"podIP": texts[0], "podIPs": [{"ip": text} for text in texts]}
        return pod

    def cluster(self) -> list[dict[str, Any]]:
        """Namespaces, pods, a node, services and policies. Several pods have the same labels."""
        found: list[dict[str, Any]] = [
            {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name, "labels": labels}}
            for name, labels in SPACES.items()
        ]
        kinds = [
            (self.choice(list(SPACES)), self.own_labels(), self.choice(["", "", "robot"]))
            for _ in range(self.randint(1, 3))
        ]
        found += [self.pod(number, *self.choice(kinds)) for number in range(1, self.randint(3, 7))]
        addresses = [{"type": "InternalIP", "address": text} for text in NODES]
        found.append(
            {"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n"}, "status": {"addresses": addresses}}
        )
        for space, name, backends in (
            ("ns1", "out", ["198.51.100.1", "2001:db8::1", "10.0.0.1"]),
            ("ns2", "other", ["203.0.113.9"]),
        ):
            meta = {"name": name, "namespace": space, "labels": {"svc": name}}
            ports = [{"port": 80}]
            found.append({"kind": "Service", "apiVersion": "v1", "metadata": meta, "spec": {"ports": ports}})
            subsets = [{"addresses": [{"ip": text} for text in backends], "ports": ports}]
            found.append({"kind": "Endpoints", "apiVersion": "v1", "metadata": meta, "subsets": subsets})
        policies = self.some(lambda: self.kubernetes() if self.random() < 0.6 else self.cilium(), 1, 4)
        for number, policy in enumerate(policies):
            policy["metadata"] = {"name": f"policy{number}", "namespace": self.choice(kinds)[0]}
        return [*found, *policies]
