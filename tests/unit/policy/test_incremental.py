"""Property: deltas, applied in order, give what a fresh resolution gives; and only what is concerned is touched."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.policy.generated import CIDRS as CIDRS_OF_BLOCKS
from tests.unit.policy.generated import HOLES, SPACES, VALUES, cilium_policies, k8s_policies, labels

from ciliate.identity.numeric import Identity
from ciliate.labels import LabelSet
from ciliate.manifest import Document
from ciliate.policy import bounds
from ciliate.policy.mapstate import INGRESS, PolicyEntry, PolicyKey, Verdict
from ciliate.policy.members import cidr_label
from ciliate.policy.model import Network
from ciliate.policy.problems import PolicyError
from ciliate.policy.repository import Repository
from ciliate.workload import pod_identity_labels

CIDRS = sorted({*CIDRS_OF_BLOCKS, *(hole for holes in HOLES.values() for hole in holes)})
PLACES = range(1 << 24, (1 << 24) + len(CIDRS))
State = dict[PolicyKey, PolicyEntry]


def _identity(number: int, space: str, own: dict[str, str]) -> Identity:
    return Identity(number, pod_identity_labels(own, space, SPACES.get(space)))


def _meaning(state: State) -> dict[PolicyKey, Verdict]:
    return {key: entry.verdict for key, entry in state.items()}


def _rename(policy: dict[str, Any], name: int) -> Document:
    return Document({**policy, "metadata": {**policy["metadata"], "name": f"p{name}"}})


pods = st.tuples(st.sampled_from(sorted(SPACES)), labels)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("import"), st.integers(0, 3), st.one_of(cilium_policies(), k8s_policies())),
        st.tuples(st.just("delete"), st.integers(0, 3), st.none()),
        st.tuples(st.just("identity"), st.integers(300, 306), pods),
        st.tuples(st.just("forget"), st.integers(300, 306), st.none()),
        st.tuples(st.just("prefix"), st.integers(0, 3), st.none()),
        st.tuples(st.sampled_from(["places", "no places"]), st.integers(0, 3), st.none()),
        st.tuples(st.just("ports"), st.integers(300, 306), st.sampled_from([{}, {"http": [("TCP", 8080)]}])),
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(pods, min_size=1, max_size=3), steps)
def test_deltas_add_up_to_a_fresh_resolution(local: list[Any], actions: list[Any]) -> None:
    repository, states = Repository(), {}
    for index, (space, own) in enumerate(local):
        repository.upsert_identities([_identity(500 + index, space, own)])
        repository.register_endpoint(index + 1, 500 + index, {"http": [("TCP", 80)]})
        states[index + 1] = dict(repository.resolve(index + 1).map_state)
    for action, number, detail in actions:
        _act(repository, action, number, detail)
        for delta in repository.drain_changes():
            for key in delta.deletes:
                states[delta.ep_id].pop(key, None)
            states[delta.ep_id].update(delta.upserts)
        for ep_id, state in states.items():
            assert state == repository.resolve(ep_id).map_state, (action, number)
    _compare_with_fresh(repository, local, states)


def _act(repository: Repository, action: str, number: int, detail: Any) -> None:
    if action == "import":
        repository.import_documents([_rename(detail, number)])
    elif action == "delete":
        repository.delete([item.ref for item in repository.objects() if item.name == f"p{number}"])
    elif action == "identity":
        repository.upsert_identities([_identity(number, *detail)])
    elif action == "forget":
        repository.remove_identities([number])
    elif action == "places":
        repository.add_places(_places(repository, number))
    elif action == "no places":
        repository.remove_places(_places(repository, number))
    elif action == "ports":
        repository.set_peer_ports(number, detail)
    else:
        prefixes = sorted(repository.cidrs(), key=str)[: number + 1]
        world = LabelSet.parse(["reserved:world"])
        repository.upsert_identities(
            Identity((1 << 24) + crc32(str(prefix).encode()) % 65536, world.union([cidr_label(prefix)]))
            for prefix in prefixes
        )


def _places(repository: Repository, number: int) -> dict[int, Network]:
    """Some of the prefixes that blocks name, each with a number of its own."""
    prefixes = sorted(repository.pod_cidrs(), key=str)[: number + 1]
    return {(1 << 24) + CIDRS.index(str(prefix)): prefix for prefix in prefixes}


def _compare_with_fresh(repository: Repository, local: list[Any], states: dict[int, State]) -> None:
    fresh = Repository()
    fresh.import_documents([item.document for item in repository.objects()])
    fresh.upsert_identities(Identity(member.id, member.labels) for member in repository.cache.members.values())
    places = repository.cache.places
    fresh.add_places({number: places.prefix(number) for number in PLACES if number in places})
    for number in repository.cache.members:
        fresh.set_peer_ports(number, repository.peer_names(number))
    for index in range(len(local)):
        fresh.register_endpoint(index + 1, 500 + index, {"http": [("TCP", 80)]})
        assert _meaning(fresh.resolve(index + 1).map_state) == _meaning(states[index + 1])


def _allow(name: str, app: str, peer: str, port: str = "80") -> Document:
    section = {
        "fromEndpoints": [{"matchLabels": {"app": peer}}],
        "toPorts": [{"ports": [{"port": port, "protocol": "TCP"}]}],
    }
    spec = {"endpointSelector": {"matchLabels": {"app": app}}, "ingress": [section]}
    return Document(
        {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": name}, "spec": spec},
        "policies.yaml",
        7,
        {"spec.ingress[0]": 12},
    )


def _three_endpoints() -> Repository:
    repository = Repository()
    for index, value in enumerate(VALUES):
        repository.upsert_identities([_identity(500 + index, "default", {"app": value})])
        repository.register_endpoint(index + 1, 500 + index)
    repository.drain_changes()
    return repository


def test_a_rule_touches_only_the_endpoints_that_it_selects() -> None:
    repository = _three_endpoints()
    rebuilt = repository.counters.policies_rebuilt
    result = repository.import_documents([_allow("one", "a", "b")])
    assert result.affected == 1
    assert [delta.ep_id for delta in repository.drain_changes()] == [1]
    assert repository.counters.policies_rebuilt == rebuilt + 1


def test_an_identity_is_a_delta_of_its_own_entries() -> None:
    repository = _three_endpoints()
    repository.import_documents([_allow("one", "a", "x"), _allow("two", "b", "y")])
    repository.drain_changes()
    rebuilt = repository.counters.policies_rebuilt
    repository.upsert_identities([_identity(900, "default", {"app": "x"})])
    (delta,) = repository.drain_changes()
    assert delta.ep_id == 1
    assert list(delta.upserts) == [PolicyKey(INGRESS, 900, 6, 80, 16)]
    assert repository.counters.policies_rebuilt == rebuilt
    repository.remove_identities([900])
    (delta,) = repository.drain_changes()
    assert delta.deletes == {PolicyKey(INGRESS, 900, 6, 80, 16)}


def test_the_same_import_again_changes_nothing() -> None:
    repository = _three_endpoints()
    first = repository.import_documents([_allow("one", "a", "b")])
    repository.drain_changes()
    second = repository.import_documents([_allow("one", "a", "b")])
    assert (second.added, second.replaced, second.unchanged, second.revision) == (0, 0, 1, first.revision)
    assert repository.drain_changes() == []


def test_rule_numbers_outlive_a_replacement_that_leaves_them_alone() -> None:
    repository = _three_endpoints()
    repository.import_documents([_allow("one", "a", "b")])
    before = {entry.rule for entry in repository.resolve(1).map_state.values()} - {0}
    changed = _allow("one", "a", "b")
    changed.object["spec"]["egress"] = [{}]
    repository.import_documents([changed])
    after = {entry.rule for entry in repository.resolve(1).map_state.values()} - {0}
    assert before == after
    origin = repository.rule(before.pop())
    assert origin is not None
    assert str(origin) == "CiliumNetworkPolicy default/one spec.ingress[0] (policies.yaml:12)"


def test_endpoints_of_one_identity_share_one_resolution() -> None:
    repository = _three_endpoints()
    repository.register_endpoint(10, 500)
    repository.register_endpoint(11, 500)
    rebuilt = repository.counters.policies_rebuilt
    repository.import_documents([_allow("one", "a", "b")])
    assert sorted(delta.ep_id for delta in repository.drain_changes()) == [1, 10, 11]
    assert repository.counters.policies_rebuilt == rebuilt + 1


def test_changing_identity_of_an_endpoint_moves_it() -> None:
    repository = _three_endpoints()
    repository.import_documents([_allow("one", "b", "c")])
    repository.drain_changes()
    repository.register_endpoint(1, 501)
    assert repository.resolve(1).enforce_ingress
    assert repository.unregister_endpoint(1)
    assert not repository.unregister_endpoint(1)


def test_blocks_that_name_more_prefixes_than_a_node_can_tell_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_PREFIXES", 3)
    repository = _three_endpoints()

    def blocks(name: str, *cidrs: str) -> Document:
        meta, peers = {"name": name}, [{"ipBlock": {"cidr": cidr}} for cidr in cidrs]
        spec = {"podSelector": {}, "ingress": [{"from": peers}]}
        head = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta}
        return Document({**head, "spec": spec}, "blocks.yaml", 5)

    repository.import_documents([blocks("one", "10.0.0.0/16", "10.2.0.0/16")])
    repository.drain_changes()
    with pytest.raises(PolicyError, match=r"blocks.yaml:5: NetworkPolicy default/two.* expected at most 3"):
        repository.import_documents([blocks("two", "10.4.0.0/16", "10.6.0.0/16")])
    assert repository.drain_changes() == [] and len(repository.pod_cidrs()) == 2
    repository.import_documents([blocks("two", "10.2.0.0/16", "10.4.0.0/16")])
    assert len(repository.pod_cidrs()) == 3
