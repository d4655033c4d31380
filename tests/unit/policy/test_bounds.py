"""Policies that would take too much: bounds come before the work, and who takes much takes it from nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from ciliate.datapath import MAX_ENTRIES
from ciliate.document import Document
from ciliate.identity.local import LocalIdentities
from ciliate.identity.numeric import Identity
from ciliate.labels import NAMESPACE, LabelSet
from ciliate.policy.repository import Repository


def network_policy(name: str, namespace: str, blocks: list[Any], ports: list[Any] | None = None) -> Document:
    peers = [{"ipBlock": block if isinstance(block, dict) else {"cidr": block}} for block in blocks]
    section = {"from": peers, **({} if ports is None else {"ports": ports})}
    meta = {"name": name, "namespace": namespace}
    head = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta}
    return Document({**head, "spec": {"podSelector": {}, "ingress": [section]}}, f"{name}.yaml", 1)


def hosts(count: int, network: str = "198.18", step: int = 2) -> list[str]:
    """Addresses with gaps between, which no wider prefix puts together."""
    return [f"{network}.{step * index // 256}.{step * index % 256}/32" for index in range(count)]


def gaps(count: int) -> list[dict[str, Any]]:
    """Ranges of ports with gaps between."""
    return [{"protocol": "TCP", "port": 1000 + 20 * index, "endPort": 1011 + 20 * index} for index in range(count)]


def repository_of(*namespaces: str) -> Repository:
    """A repository with an endpoint (1, 2, …) in each of the namespaces."""
    repository = Repository()
    for number, namespace in enumerate(namespaces, 1):
        labels = LabelSet.parse([f"k8s:app=a{number}", f"k8s:{NAMESPACE}={namespace}"])
        repository.upsert_identities([Identity(300 + number, labels)])
        repository.register_endpoint(number, 300 + number)
    return repository


def know_prefixes(repository: Repository) -> None:
    """Give prefixes their numbers, as the realizer does."""
    local = LocalIdentities()
    identities = [local.acquire(prefix) for prefix in sorted(repository.cidrs(), key=str)]
    repository.upsert_identities(identities)
    repository.add_places({local.number(prefix): prefix for prefix in repository.pod_cidrs()})


@pytest.mark.xfail(strict=True, reason="the limit is looked at after the expansion")
def test_a_product_of_blocks_and_ports_is_never_written_out() -> None:
    repository = repository_of("shop")
    repository.drain_changes()
    repository.import_documents([network_policy("wide", "shop", hosts(100), gaps(100))])
    know_prefixes(repository)
    deltas = repository.drain_changes()
    assert sum(len(delta.upserts) for delta in deltas) <= MAX_ENTRIES
