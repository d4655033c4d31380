"""Identities whose numbers are given: well-known label sets, and what an administrator fixed. Tier unit."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from ciliate.config import ConfigError, load_config
from ciliate.endpoint import labelling
from ciliate.identity import CLUSTER_MIN, FIXED_MAX, FIXED_MIN, WELL_KNOWN_MAX, WELL_KNOWN_MIN, Identity, is_assigned
from ciliate.identity.backend import IdentityError, Observer
from ciliate.identity.filter import LabelFilter
from ciliate.identity.fixed import FixedIdentities, FixedIdentity, parse_mapping
from ciliate.identity.wellknown import Assigned, well_known
from ciliate.labels import LabelSet
from ciliate.node.records import ACCEPTED
from ciliate.policy.repository import Repository
from ciliate.workload import WorkloadRegistry
from ciliate_kvstore.identity_backend import _decode

CLUSTER, NAMESPACE = "east", "networking"


def told(
    labels: Mapping[str, str],
    namespace: str,
    account: str = "default",
    *,
    cluster: str = CLUSTER,
    of_namespace: Mapping[str, str] | None = None,
) -> LabelSet:
    """The unfiltered labels of a pod, as an orchestrator tells of it."""
    workloads = WorkloadRegistry(cluster)
    pod = {
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": namespace, "labels": labels},
        "spec": {"serviceAccountName": account},
    }
    name = {"kind": "Namespace", "metadata": {"name": namespace, "labels": of_namespace or {}}}
    workloads.upsert([pod, name])
    found = workloads.identity_labels(namespace, "p")
    assert found is not None
    return found


PODS = [
    (100, {"io.cilium/app": "etcd-operator"}, NAMESPACE, "cilium-etcd-sa"),
    (101, {"app": "etcd", "etcd_cluster": "cilium-etcd", "io.cilium/app": "etcd-operator"}, NAMESPACE, "default"),
    (102, {"k8s-app": "kube-dns"}, "kube-system", "kube-dns"),
    (103, {"k8s-app": "kube-dns", "eks.amazonaws.com/component": "kube-dns"}, "kube-system", "kube-dns"),
    (104, {"k8s-app": "kube-dns"}, "kube-system", "coredns"),
    (105, {"io.cilium/app": "operator", "name": "cilium-operator"}, NAMESPACE, "cilium-operator"),
    (106, {"k8s-app": "kube-dns", "eks.amazonaws.com/component": "coredns"}, "kube-system", "coredns"),
    (107, {"io.cilium/app": "etcd-operator", "name": "cilium-etcd-operator"}, NAMESPACE, "cilium-etcd-operator"),
]


class Away:
    """A backend whose store is away: it has no number for anybody, and must not be asked to give one back."""

    def __init__(self) -> None:
        self.known = {300: Identity(300, LabelSet.parse(["k8s:app=known"]))}
        self.observers: list[Observer] = []

    async def allocate(self, labels: LabelSet, hint: int = 0) -> Identity:
        raise IdentityError(f"{labels.key}: the store is away")

    async def release(self, identity_id: int) -> None:
        if identity_id not in self.known:
            raise AssertionError(f"{identity_id} was given back to the store")
        del self.known[identity_id]

    def get(self, identity_id: int) -> Identity | None:
        return self.known.get(identity_id)

    def identities(self) -> Mapping[int, Identity]:
        return self.known

    def subscribe(self, observer: Observer) -> None:
        self.observers.append(observer)


def assigned(mapping: str = "") -> tuple[Assigned, Away, LabelFilter]:
    fixed, away = FixedIdentities(parse_mapping(mapping), CLUSTER), Away()
    return Assigned(away, [*well_known(CLUSTER, NAMESPACE), *fixed.identities()]), away, LabelFilter("", fixed)


@pytest.mark.parametrize("named", [False, True], ids=["plain", "namespaces with their own names"])
@pytest.mark.parametrize(("number", "labels", "namespace", "account"), PODS, ids=[str(item[0]) for item in PODS])
async def test_a_pod_with_exactly_these_labels_needs_no_store(
    number: int, labels: dict[str, str], namespace: str, account: str, named: bool
) -> None:
    backend, _, label_filter = assigned()
    own = {"kubernetes.io/metadata.name": namespace} if named else {}
    # what the filter takes out is no difference
    pod = told({**labels, "pod-template-hash": "55d8f8b9cd"}, namespace, account, of_namespace=own)
    found = await backend.allocate(label_filter.apply(pod))
    assert found.id == number + 8 * named
    assert is_assigned(found.id) and found.id in ACCEPTED
    assert backend.get(found.id) == backend.identities()[found.id] == found
    await backend.release(found.id)
    assert backend.get(found.id) == found


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"k8s-app": "kube-dns", "version": "2"}},
        {"labels": {"k8s-app": "coredns"}},
        {"namespace": "default"},
        {"account": "default"},
        {"cluster": "west"},
        {"of_namespace": {"team": "a"}},
        {"of_namespace": {"kubernetes.io/metadata.name": "kube-system", "team": "a"}},
        {"of_namespace": {"kubernetes.io/metadata.name": "default"}},
    ],
    ids=str,
)
async def test_with_anything_else_it_is_an_ordinary_pod(change: dict) -> None:
    backend, _, label_filter = assigned()
    pod = told(**{"labels": {"k8s-app": "kube-dns"}, "namespace": "kube-system", "account": "coredns", **change})
    with pytest.raises(IdentityError, match="store is away"):
        await backend.allocate(label_filter.apply(pod))


async def test_the_rest_is_the_backends() -> None:
    backend, away, _ = assigned("128=vault")
    assert len(backend.identities()) == len(list(backend.identities())) == 16 + 1 + 1
    assert {300, 100, 115, 128} <= set(backend.identities())
    assert 300 in backend.identities() and 301 not in backend.identities()
    assert backend.get(300) == away.known[300] and backend.get(301) is None
    heard: list[object] = []
    backend.subscribe(lambda added, removed: heard.append((added, removed)))
    away.observers[0]([], [300])
    assert heard == [([], [300])]
    await backend.release(300)
    assert backend.get(300) is None


MAPPING = "128=vault, 130=kube-system/dns"
CLAIMS = [
    ("vault", "default", {}, 128),
    ("vault", "other", {"app": "anything", "version": "7"}, 128),
    ("dns", "kube-system", {"app": "anything"}, 130),
    ("dns", "default", {}, None),
    ("nobody", "default", {}, None),
    ("", "default", {}, None),
    ("host", "default", {}, None),
]


@pytest.mark.parametrize(("name", "namespace", "labels", "number"), CLAIMS)
@pytest.mark.parametrize("text", ["", "app"], ids=["all labels", "white list"])
async def test_a_claim_counts_where_the_administrator_says_so(
    text: str, name: str, namespace: str, labels: dict[str, str], number: int | None
) -> None:
    backend, _, _ = assigned(MAPPING)
    label_filter = LabelFilter(text, FixedIdentities(parse_mapping(MAPPING), CLUSTER))
    found = label_filter.apply(told({**labels, "io.cilium.fixed-identity": name}, namespace))
    if number is None:
        assert found == label_filter.apply(told(labels, namespace))
        return
    assert (await backend.allocate(found)).id == number
    assert f"reserved:{name}" in found.strings() and number in ACCEPTED


def test_policies_select_what_is_assigned() -> None:
    backend, _, _ = assigned(MAPPING)
    repository = Repository()
    repository.upsert_identities(backend.identities().values())
    selected = {
        number
        for number in backend.identities()
        for labels in [repository.cache.members[number].labels]
        if LabelSet.parse(["k8s:io.kubernetes.pod.namespace=kube-system"]).strings()[0] in map(str, labels)
    }
    assert selected == {102, 103, 104, 106, 110, 111, 112, 114, 130}


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("", []),
        (" 128=a ,", [FixedIdentity(128, "a")]),
        ("255=a/b.c_d,129=E", [FixedIdentity(255, "b.c_d", "a"), FixedIdentity(129, "E")]),
        ('{"128": "a", "129": "ns/b"}', [FixedIdentity(128, "a"), FixedIdentity(129, "b", "ns")]),
    ],
)
def test_a_mapping(text: str, entries: list[FixedIdentity]) -> None:
    assert list(parse_mapping(text)) == entries


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127=a", ("127=a", "'127' given, expected 128 to 255")),
        ("256=a", ("'256' given, expected 128 to 255",)),
        ("x=a", ("'x' given, expected 128 to 255",)),
        ("²=a", ("expected 128 to 255",)),
        ("128", ("'128'", "NUMBER=[NAMESPACE/]NAME")),
        ("128=", ("name '' given",)),
        ("128=-a", ("name '-a' given",)),
        ("128=a b", ("name 'a b' given",)),
        (f"128={'a' * 64}", ("1 to 63",)),
        ("128=/a", ("namespace '' given",)),
        ("128=a/b/c", ("namespace 'a/b' given",)),
        ("128=host", ("'host' has a meaning of its own",)),
        ("128=cluster", ("'cluster' has a meaning of its own",)),
        ("128=a,128=b", ("128=b", "each number and each name once")),
        ("128=a,129=x/a", ("129=x/a", "each number and each name once")),
        ('{"128": "a", "128": "b"}', ("128=b", "once")),
        ('{"128": 7}', ("128=7", "name '' given")),
        ('{"128": ', ("Expecting value",)),
    ],
)
def test_a_wrong_mapping_names_option_and_part(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"fixed-identity-mapping": text})
    (problem,) = caught.value.problems
    assert problem.field == "fixed-identity-mapping"
    for part in parts:
        assert part.lower() in str(problem).lower()


def test_the_ranges_do_not_touch() -> None:
    assert 5 < WELL_KNOWN_MIN < WELL_KNOWN_MAX < FIXED_MIN < FIXED_MAX < CLUSTER_MIN
    assert [identity.id for identity in well_known("c", "n")] == list(range(WELL_KNOWN_MIN, WELL_KNOWN_MAX + 1))
    assert len({identity.labels for identity in well_known("c", "n")}) == 16


@pytest.mark.parametrize("name", ["1", "104", "130", "255", str(1 << 24), "-1", "x"])
def test_no_key_of_the_store_redefines_what_is_assigned(name: str) -> None:
    with pytest.raises(ValueError, match="a number of the cluster's"):
        _decode(name, b"k8s:app=evil;")


def test_the_claim_shows_as_a_label_that_makes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    label_filter = LabelFilter("", FixedIdentities(parse_mapping(MAPPING), CLUSTER))
    claim = "k8s:io.cilium.fixed-identity=vault"
    endpoint_labels = told({"io.cilium.fixed-identity": "vault", "app": "a"}, "default")
    assert claim in endpoint_labels.strings()
    assert claim not in label_filter.apply(endpoint_labels).strings()
    with pytest.raises(labelling.LabelChangeError):
        labelling._refuse(LabelSet.parse([claim]))
