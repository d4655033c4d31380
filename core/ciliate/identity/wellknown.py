"""Identities that every node knows from the start, without a store (inventory PO-L04).

What a cluster needs before it has a store, or to get one: name servers, the store's own pods, operators. Their pods
are told by exact label sets, so that none of them waits for an allocation. A pod with any further label is an ordinary
one.

Label sets as in the seed system's published table of well-known identities. Since Kubernetes 1.21 every namespace
carries its own name as a label, which is part of its pods' identities: numbers 108 to 115 are the same pods in such
namespaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ciliate.identity.backend import IdentityBackend, Observer
from ciliate.identity.numeric import WELL_KNOWN_MIN, Identity
from ciliate.labels import CLUSTER, NAMESPACE, NAMESPACE_LABELS_PREFIX, SERVICE_ACCOUNT, LabelSet

DNS_NAMESPACE = "kube-system"
OWN_NAME = NAMESPACE_LABELS_PREFIX + "kubernetes.io/metadata.name"
_OPERATOR = "io.cilium/app"
_EKS = "eks.amazonaws.com/component"


class _Known(NamedTuple):
    account: str
    labels: dict[str, str]
    namespace: str = ""
    """Empty: the namespace of the cluster's networking pods."""


_TABLE = (
    # etcd-operator, cilium-kvstore, kube-dns, eks-kube-dns
    _Known("cilium-etcd-sa", {_OPERATOR: "etcd-operator"}),
    _Known("default", {_OPERATOR: "etcd-operator", "app": "etcd", "etcd_cluster": "cilium-etcd"}),
    _Known("kube-dns", {"k8s-app": "kube-dns"}, DNS_NAMESPACE),
    _Known("kube-dns", {"k8s-app": "kube-dns", _EKS: "kube-dns"}, DNS_NAMESPACE),
    # core-dns, cilium-operator, eks-core-dns, cilium-etcd-operator
    _Known("coredns", {"k8s-app": "kube-dns"}, DNS_NAMESPACE),
    _Known("cilium-operator", {_OPERATOR: "operator", "name": "cilium-operator"}),
    _Known("coredns", {"k8s-app": "kube-dns", _EKS: "coredns"}, DNS_NAMESPACE),
    _Known("cilium-etcd-operator", {_OPERATOR: "etcd-operator", "name": "cilium-etcd-operator"}),
)
"""In the order of their numbers."""


def well_known(cluster: str, namespace: str) -> list[Identity]:
    """Every well-known identity of a cluster whose networking pods are in ``namespace``."""
    plain = [_labels(item, cluster, namespace) for item in _TABLE]
    own = [{**labels, OWN_NAME: labels[NAMESPACE]} for labels in plain]
    numbered = enumerate([*plain, *own], WELL_KNOWN_MIN)
    return [Identity(number, LabelSet.from_mapping(labels)) for number, labels in numbered]


def _labels(item: _Known, cluster: str, namespace: str) -> dict[str, str]:
    generated = {NAMESPACE: item.namespace or namespace, SERVICE_ACCOUNT: item.account, CLUSTER: cluster}
    return {**item.labels, **generated}


class Assigned:
    """`ciliate.identity.backend.IdentityBackend` that answers for identities whose numbers were never to be agreed on.

    Everything else is the business of the ``backend`` behind it, which never hears of these.
    """

    def __init__(self, backend: IdentityBackend, identities: Iterable[Identity]) -> None:
        self._backend = backend
        self.assigned = {identity.id: identity for identity in identities}
        self._by_labels = {identity.labels: identity for identity in self.assigned.values()}

    async def start(self) -> None:
        """Nothing: whoever made the backend starts it."""

    async def stop(self) -> None:
        """Nothing: whoever made the backend stops it."""

    async def allocate(self, labels: LabelSet, hint: int = 0) -> Identity:
        """The identity of ``labels``; those that are assigned at once."""
        known = self._by_labels.get(labels)
        return known if known is not None else await self._backend.allocate(labels, hint)

    async def release(self, identity_id: int) -> None:
        """One reference less."""
        if identity_id not in self.assigned:
            await self._backend.release(identity_id)

    async def settle(self) -> None:
        """As the backend does."""
        await self._backend.settle()

    def get(self, identity_id: int) -> Identity | None:
        """An identity by number."""
        return self.assigned.get(identity_id) or self._backend.get(identity_id)

    def identities(self) -> Mapping[int, Identity]:
        """Every identity, assigned ones first."""
        return _Both(self.assigned, self._backend.identities())

    async def collect(self, grace: float = 0.0) -> int:
        """As the backend does; what is assigned is never collected."""
        return await self._backend.collect(grace)

    def subscribe(self, observer: Observer) -> None:
        """Tell ``observer`` of every change; what is assigned never changes."""
        self._backend.subscribe(observer)


class _Both(Mapping[int, Identity]):
    """Two mappings without a common key as one, without a copy."""

    def __init__(self, first: Mapping[int, Identity], second: Mapping[int, Identity]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, key: int) -> Identity:
        return self._first[key] if key in self._first else self._second[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._first or key in self._second

    def __iter__(self) -> Iterator[int]:
        yield from self._first
        yield from self._second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)
