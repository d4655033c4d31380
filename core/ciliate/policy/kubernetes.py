"""Kubernetes NetworkPolicy into the rule model, as Kubernetes documents it (networking.k8s.io/v1).

Inventory 3.7 describes the seed system's translation; where Kubernetes' own conformance asks for more (ipBlock that
covers pods, ipBlock with ports on ingress, named ports, SCTP, endPort) it is done Kubernetes' way.
"""

from __future__ import annotations

from typing import Any

from ciliate.labels import CLUSTER as CLUSTER_LABEL
from ciliate.labels import NAMESPACE, NAMESPACE_LABELS_PREFIX, SOURCE_K8S
from ciliate.policy.bounds import joined_peers, joined_ports
from ciliate.policy.cilium import cidr_block
from ciliate.policy.model import Peer, PortItem, Rule, Section
from ciliate.policy.ports import kubernetes_port
from ciliate.policy.reader import ABSENT, Reader
from ciliate.policy.selector import EXISTS, Requirement, Selector, equals, selector

SPEC_FIELDS = ("podSelector", "ingress", "egress", "policyTypes")
METADATA_NAME = NAMESPACE_LABELS_PREFIX + "kubernetes.io/metadata.name"


class KubernetesParser:
    """Reads the spec of one NetworkPolicy."""

    def __init__(self, reader: Reader, namespace: str, policy_cluster: str = "") -> None:
        self.reader = reader
        self.namespace = namespace
        self.policy_cluster = policy_cluster

    def rules(self, obj: dict[str, Any]) -> list[Rule]:
        """The one rule of the object, or none after noting what is wrong."""
        fields = self.reader.mapping(obj.get("spec", ABSENT), "spec", SPEC_FIELDS)
        if fields is None:
            return []
        subject = self._subject(fields.get("podSelector"))
        ingress = self._sections(fields.get("ingress"), "spec.ingress", "from")
        egress = self._sections(fields.get("egress"), "spec.egress", "to")
        types = self._types(fields.get("policyTypes"), bool(fields.get("egress")))
        if subject is None:
            return []
        # a direction that the policy is about is isolated even where nothing is allowed in it
        return [Rule(subject, ingress if "Ingress" in types else None, egress if "Egress" in types else None)]

    def _subject(self, value: Any) -> Selector | None:
        if value is None:
            self.reader.problem("spec.podSelector", ABSENT, "expected a selector ({} selects every pod)")
            return None
        found = self.reader.selector(value, "spec.podSelector", SOURCE_K8S)
        if found is not None and self.policy_cluster:
            found = found.extended(equals(SOURCE_K8S, CLUSTER_LABEL, self.policy_cluster))
        if found is None:
            return None
        found = found.extended(self._own_namespace())
        self.reader.selectors.append(("spec.podSelector", found))
        return found

    def _own_namespace(self) -> Requirement:
        return equals(SOURCE_K8S, NAMESPACE, self.namespace)

    def _types(self, value: Any, egress_given: bool) -> set[str]:
        types = set()
        for item, path in self.reader.items(value, "spec.policyTypes"):
            if item in ("Ingress", "Egress"):
                types.add(item)
            else:
                self.reader.problem(path, item, "expected Ingress or Egress")
        if not value:
            return {"Ingress", "Egress"} if egress_given else {"Ingress"}
        return types

    def _sections(self, value: Any, path: str, side: str) -> tuple[Section, ...]:
        found = []
        for item, below in self.reader.items(value, path):
            # `- ` alone is null in YAML and an empty rule to Kubernetes: everyone, everything
            fields = self.reader.mapping({} if item is None else item, below, (side, "ports"))
            if fields is None:
                continue
            peers = self._peers(fields.get(side), f"{below}.{side}")
            ports = self._ports(fields.get("ports"), f"{below}.ports")
            found.append(Section(below, peers, ports))
        return tuple(found)

    def _ports(self, value: Any, path: str) -> tuple[PortItem, ...] | None:
        items = list(self.reader.items(value, path))
        found = [kubernetes_port(self.reader, item, below) for item, below in items]
        return joined_ports(item for item in found if item is not None) if items else None

    def _peers(self, value: Any, path: str) -> tuple[Peer, ...] | None:
        items = list(self.reader.items(value, path))
        if not items:
            return None
        found = [self._peer(item, below) for item, below in items]
        return joined_peers(peer for peer in found if peer is not None)

    def _peer(self, value: Any, path: str) -> Peer | None:
        fields = self.reader.mapping(value, path, ("podSelector", "namespaceSelector", "ipBlock"))
        if fields is None:
            return None
        given = {name for name, item in fields.items() if item is not None}
        if not given:
            self.reader.problem(path, value, "expected podSelector, namespaceSelector or ipBlock")
            return None
        if "ipBlock" in given:
            if len(given) > 1:
                self.reader.problem(path, ABSENT, "expected ipBlock without selectors beside it")
            return cidr_block(self.reader, fields["ipBlock"], f"{path}.ipBlock", pods=True)
        pods: Selector | None = Selector()
        spaces: Selector | None = Selector((self._own_namespace(),))
        if "podSelector" in given:
            pods = self.reader.selector(fields["podSelector"], f"{path}.podSelector", SOURCE_K8S)
        if "namespaceSelector" in given:
            spaces = self._namespaces(fields["namespaceSelector"], f"{path}.namespaceSelector")
        if pods is None or spaces is None:
            return None
        found = pods.extended(*spaces.requirements)
        self.reader.selectors.append((path, found))
        return found

    def _namespaces(self, value: Any, path: str) -> Selector | None:
        found = self.reader.selector(value, path, SOURCE_K8S, NAMESPACE_LABELS_PREFIX)
        if found is None:
            return None
        # every peer is a pod, so it has a namespace; that keeps out host, world and the like
        pod = Requirement(SOURCE_K8S, NAMESPACE, EXISTS)
        return selector((pod, *map(_by_name, found.requirements)))


def _by_name(item: Requirement) -> Requirement:
    """The API server labels every namespace with its own name: ask for the name itself, which each pod carries."""
    return item._replace(key=NAMESPACE) if item.key == METADATA_NAME else item
