"""Policies that would take too much: bounds come before the work, and who takes much takes it from nobody else."""

from __future__ import annotations

from typing import Any

import pytest

from ciliate.datapath import MAX_ENTRIES
from ciliate.document import Document
from ciliate.identity.local import LocalIdentities
from ciliate.identity.numeric import Identity
from ciliate.labels import NAMESPACE, LabelSet
from ciliate.policy import bounds
from ciliate.policy import repository as repository_module
from ciliate.policy.importer import parse_documents
from ciliate.policy.mapstate import INGRESS, lookup
from ciliate.policy.problems import PolicyError
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
    register(repository, *namespaces)
    return repository


def register(repository: Repository, *namespaces: str) -> None:
    """Endpoints come."""
    for number, namespace in enumerate(namespaces, 1):
        labels = LabelSet.parse([f"k8s:app=a{number}", f"k8s:{NAMESPACE}={namespace}"])
        repository.upsert_identities([Identity(300 + number, labels)])
        repository.register_endpoint(number, 300 + number)


def know_prefixes(repository: Repository, local: LocalIdentities | None = None) -> None:
    """Give prefixes their numbers, as the realizer does."""
    local = local or LocalIdentities()
    identities = [local.acquire(prefix) for prefix in sorted(repository.cidrs(), key=str)]
    repository.upsert_identities(identities)
    repository.add_places({local.number(prefix): prefix for prefix in repository.pod_cidrs()})


def test_a_product_of_blocks_and_ports_is_never_written_out() -> None:
    repository = repository_of("shop")
    repository.drain_changes()
    repository.import_documents([network_policy("wide", "shop", hosts(100), gaps(100))])
    know_prefixes(repository)
    deltas = repository.drain_changes()
    assert sum(len(delta.upserts) for delta in deltas) <= MAX_ENTRIES


def test_blocks_and_ports_side_by_side_are_put_together() -> None:
    repository = repository_of("shop")
    ranges = [{"protocol": "TCP", "port": 1024 + 64 * part, "endPort": 1087 + 64 * part} for part in range(16)]
    repository.import_documents([network_policy("wide", "shop", hosts(256, step=1), ranges)])
    assert {str(prefix) for prefix in repository.wanted_cidrs()} == {"198.18.0.0/24"}
    know_prefixes(repository)
    keys = [key for key in repository.resolve(1).map_state if key.proto]
    assert {(key.port, key.prefix) for key in keys} == {(1024, 6)} and len(keys) == 2


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (network_policy("large", "shop", hosts(17000)), "names 17000 prefixes, expected at most 16384 of one object"),
        (
            network_policy("large", "other", [{"cidr": "0.0.0.0/0", "except": hosts(17000)}]),
            "names 17001 prefixes, expected at most 16384 of one object",
        ),
        (
            Document(
                {
                    **network_policy("large", "shop", []).object,
                    "spec": {"podSelector": {}, "ingress": [{"from": [], "ports": gaps(3000)}] * 12},
                },
                "large.yaml",
                1,
            ),
            "entries for each peer, expected at most 65536 of one object",
        ),
    ],
    ids=["blocks", "exceptions", "ports"],
)
def test_an_object_that_is_too_large_is_refused_and_after_a_restart_concerns_its_endpoints_alone(
    document: Document, expected: str
) -> None:
    namespace = document.object["metadata"]["namespace"]
    repository = repository_of("shop", "other")
    repository.drain_changes()
    with pytest.raises(PolicyError) as caught:
        repository.import_documents([document])
    (problem,) = caught.value.problems
    assert (problem.file, problem.field) == ("large.yaml", "spec") and expected in problem.expected
    assert repository.objects() == [] and repository.drain_changes() == []
    # as one of an earlier version is read from disk, before endpoints are back
    repository = Repository()
    repository.import_objects(parse_documents([document]), bounded=False)
    register(repository, "shop", "other")
    assert repository.wanted_cidrs() == set()
    states = {number: repository.resolve(number) for number in (1, 2)}
    concerned = 1 if namespace == "shop" else 2
    assert states[concerned].problem.startswith(f"NetworkPolicy {namespace}/large ")
    assert expected in states[concerned].problem
    # nothing is allowed where there is no older policy, and the other endpoint knows nothing of it
    assert states[concerned].enforce_ingress and not states[concerned].map_state
    assert not states[3 - concerned].problem and not states[3 - concerned].enforce_ingress
    repository.delete([item.ref for item in repository.objects()])
    assert not repository.resolve(concerned).problem and not repository.resolve(concerned).enforce_ingress


def test_a_namespace_has_its_share_of_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "NAMESPACE_PREFIXES", 10)
    repository = repository_of("shop", "other")
    repository.import_documents([network_policy("one", "shop", hosts(6))])
    with pytest.raises(PolicyError, match="makes 12 prefixes of namespace shop, expected at most 10"):
        repository.import_documents([network_policy("two", "shop", hosts(6, "198.19"))])
    # the same prefixes, a replacement and another namespace are within it
    repository.import_documents([network_policy("two", "shop", hosts(6))])
    repository.import_documents([network_policy("one", "shop", hosts(4, "198.19"))])
    repository.import_documents([network_policy("one", "other", hosts(10, "203.0"))])
    shares = [(share.namespace, share.prefixes, share.largest) for share in repository.shares.shares()]
    assert sorted(shares) == [("other", 10, "NetworkPolicy other/one"), ("shop", 10, "NetworkPolicy shop/two")]


def test_what_a_new_endpoint_would_add_beyond_its_share_concerns_that_endpoint_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "NAMESPACE_PREFIXES", 10)
    repository = repository_of("shop", "shop")
    select = {"podSelector": {"matchLabels": {"app": "a1"}}}
    first, second = network_policy("one", "shop", hosts(8)), network_policy("two", "shop", hosts(8, "198.19"))
    first.object["spec"].update(select)
    second.object["spec"].update(podSelector={"matchLabels": {"app": "late"}})
    repository.import_documents([first, second])
    assert len(repository.wanted_cidrs()) == 8
    repository.upsert_identities([Identity(400, LabelSet.parse(["k8s:app=late", f"k8s:{NAMESPACE}=shop"]))])
    repository.register_endpoint(3, 400)
    late = repository.resolve(3)
    assert "NetworkPolicy shop/two makes 16 prefixes of namespace shop" in late.problem
    assert late.enforce_ingress and not late.map_state and not repository.resolve(1).problem
    assert len(repository.wanted_cidrs()) == 8
    # it has its policy as soon as there is room
    repository.delete([item.ref for item in repository.objects() if item.name == "one"])
    assert [delta.ep_id for delta in repository.drain_changes() if delta.whole] == [3]
    assert not repository.resolve(3).problem and len(repository.wanted_cidrs()) == 8


def test_prefixes_that_would_crowd_out_the_policies_of_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository_module, "MAX_ENTRIES", 50)
    repository = repository_of("shop", "other")
    repository.import_documents([network_policy("open", "shop", [{"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}])])
    know_prefixes(repository)
    repository.drain_changes()
    with pytest.raises(PolicyError, match=r"60 entries in the policy of identity 301 \(namespace shop\)"):
        repository.import_documents([network_policy("many", "other", hosts(30))])
    # those that the others do not mean take nothing of theirs
    repository.import_documents([network_policy("many", "other", hosts(30, "10.1"))])
    repository.import_documents([network_policy("many", "other", hosts(20))])


def test_a_crowded_policy_says_what_its_rules_say() -> None:
    repository = repository_of("shop")
    repository.import_documents([network_policy("wide", "shop", hosts(100), gaps(100))])
    know_prefixes(repository)
    (delta,) = repository.drain_changes()
    assert delta.whole and delta.size > MAX_ENTRIES and not delta.upserts
    number = next(number for number, member in repository.cache.members.items() if member.prefixes)
    state = repository.resolve(1).map_state
    assert lookup(state, INGRESS, number, 6, 1005) is not None and lookup(state, INGRESS, number, 6, 1015) is None
    # one that has room again is told as a whole, and then by deltas
    repository.import_documents([network_policy("wide", "shop", hosts(2), gaps(2))])
    (delta,) = repository.drain_changes()
    assert delta.whole and delta.size <= MAX_ENTRIES
    repository.import_documents([network_policy("wide", "shop", hosts(2), gaps(1))])
    (delta,) = repository.drain_changes()
    assert not delta.whole and delta.deletes


def test_rules_that_are_too_much_together_leave_the_older_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    repository, local = repository_of("shop"), LocalIdentities()
    repository.import_documents([network_policy("first", "shop", ["198.51.100.0/24"], gaps(1))])
    know_prefixes(repository, local)
    repository.drain_changes()
    before = repository.resolve(1).map_state
    monkeypatch.setattr(bounds, "MAX_PIECES", 100)
    repository.import_documents(
        [network_policy(f"more{part}", "shop", hosts(2, f"198.{part}"), gaps(10)) for part in range(9)]
    )
    know_prefixes(repository, local)
    (delta,) = repository.drain_changes()
    after = repository.resolve(1)
    assert delta.whole and "there may be 100" in after.problem and after.map_state == before
