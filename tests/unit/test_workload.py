"""The registry of pods and namespaces: what becomes a pod's identity labels."""

from typing import Any

import pytest

from ciliate.workload import WorkloadError, WorkloadRegistry, parse_pod


def pod(name: str = "web", labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    return {"kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": labels or {}}, "spec": spec}


def namespace(labels: dict[str, str]) -> dict[str, Any]:
    return {"kind": "Namespace", "metadata": {"name": "shop", "labels": labels}}


def test_identity_labels_have_the_pod_the_namespace_and_the_account() -> None:
    registry = WorkloadRegistry("blue")
    registry.upsert([namespace({"team": "a"}), pod(labels={"app": "web"}, serviceAccountName="robot")])
    labels = registry.identity_labels("shop", "web")
    assert labels is not None
    assert labels.strings() == [
        "k8s:app=web",
        "k8s:io.cilium.k8s.namespace.labels.team=a",
        "k8s:io.cilium.k8s.policy.cluster=blue",
        "k8s:io.cilium.k8s.policy.serviceaccount=robot",
        "k8s:io.kubernetes.pod.namespace=shop",
    ]


@pytest.mark.parametrize(
    "key",
    [
        "io.cilium.k8s.namespace.labels.team",
        "io.kubernetes.pod.namespace",
        "io.cilium.k8s.policy.cluster",
        "io.cilium.k8s.policy.serviceaccount",
        "reserved:host",
        "cidr:10.0.0.0/8",
    ],
)
def test_a_pod_cannot_claim_labels_of_the_system(key: str) -> None:
    registry = WorkloadRegistry()
    registry.upsert([pod(labels={"app": "web", **({} if ":" in key else {key: "stolen"})})])
    labels = registry.identity_labels("shop", "web", {key: "stolen"})
    assert labels is not None
    assert "stolen" not in labels.key


def test_a_pod_of_which_nothing_is_known_has_no_labels() -> None:
    assert WorkloadRegistry().identity_labels("shop", "web") is None


def test_labels_of_the_runtime_count_and_the_manifest_wins() -> None:
    registry = WorkloadRegistry()
    registry.upsert([pod(labels={"app": "web"})])
    labels = registry.identity_labels("shop", "web", {"app": "other", "zone": "b"})
    assert labels is not None
    assert (labels.get("app"), labels.get("zone")) == ("web", "b")


def test_observers_hear_of_the_pods_whose_labels_may_have_changed() -> None:
    registry, heard = WorkloadRegistry(), []
    registry.subscribe(heard.append)
    registry.upsert([pod(labels={"app": "web"}), pod("other")])
    registry.upsert([pod(labels={"app": "web"})])
    registry.upsert([namespace({"team": "b"})])
    assert heard == [{"shop/web", "shop/other"}, {"shop/web", "shop/other"}]


@pytest.mark.parametrize(
    ("objects", "field"),
    [
        ([{"kind": "Service", "metadata": {"name": "x"}}], r"objects\[0\].kind"),
        ([pod(), {"kind": "Pod", "metadata": {}}], r"objects\[1\].metadata.name"),
        ([{"kind": "Pod", "metadata": {"name": "x", "labels": {"a": 1}}}], r"metadata.labels.a"),
        ([{"kind": "Pod", "metadata": {"name": "x", "labels": ["a"]}}], r"metadata.labels"),
        ([pod(containers=[{"ports": [{"name": "p", "containerPort": 70000}]}])], "containerPort"),
        ([pod(containers=[{"ports": [{"name": "p", "containerPort": True}]}])], "containerPort"),
        ([pod(containers=[{"ports": [{"name": "p", "containerPort": 80, "protocol": "x"}]}])], "ports.protocol"),
        ([pod(containers=[{"ports": [{"name": "p", "containerPort": 80, "protocol": ["TCP"]}]}])], "ports.protocol"),
        ([pod(containers=[{"ports": [{"name": {}, "containerPort": 80}]}])], "ports.name"),
        ([pod(containers=[{"ports": 7}])], r"objects\[0\].spec.containers.ports"),
        ([pod(containers=[None])], r"spec.containers\[0\]"),
        ([pod(containers="c")], "spec.containers"),
        ([{"kind": "Pod", "metadata": {"name": "x"}, "spec": -1}], r"objects\[0\].spec"),
        ([{"kind": "Pod", "metadata": {"name": "x"}, "spec": []}], r"objects\[0\].spec"),
        ([{"kind": "Pod", "metadata": {"name": "x/y"}}], "metadata.name"),
        ([{"kind": "Pod", "metadata": {"name": "x", "namespace": 1}}], "metadata.namespace"),
        ([pod(hostNetwork="false")], "spec.hostNetwork"),
        ([pod(serviceAccountName=["a"])], "spec.serviceAccountName"),
        (["text"], "kind"),
    ],
)
def test_a_bad_object_is_named_and_nothing_is_taken(objects: list[Any], field: str) -> None:
    registry = WorkloadRegistry()
    with pytest.raises(WorkloadError, match=field):
        registry.upsert(objects)
    assert registry.pods() == []


ILL_FORMED = [
    {"user": "admin;k8s:zone=x"},
    {"user=admin;k8s:zone": "x"},
    {"user": "x" * 64},
    {"user": "-x"},
    {"user": "ä"},
    {"": "x"},
    {"x" * 64: "x"},
    {"a/b/c": "x"},
    {"/b": "x"},
    {"Team/b": "x"},
    {f"{'a' * 254}/b": "x"},
    {"user": "x\n"},
]
"""What the API server of Kubernetes refuses as labels."""


@pytest.mark.parametrize("labels", ILL_FORMED)
@pytest.mark.parametrize("make", [lambda labels: pod(labels=labels), namespace], ids=["pod", "namespace"])
def test_labels_that_kubernetes_would_refuse_are_refused_by_their_field(make: Any, labels: dict[str, str]) -> None:
    registry = WorkloadRegistry()
    with pytest.raises(WorkloadError, match=r"objects\[1\]\.metadata\.labels.*expected"):
        registry.upsert([pod(), make(labels)])
    assert not registry.known()


def test_the_longest_labels_are_taken() -> None:
    registry = WorkloadRegistry()
    labels = {f"{'a.' * 126}b/{'x' * 63}": "y" * 63, "empty": "", "A_b.c-d": "1.2_3-x"}
    registry.upsert([namespace({"x" * 63: "y"}), pod(labels=labels)])
    found = registry.identity_labels("shop", "web")
    assert found is not None and all(found.get(key) == value for key, value in labels.items())


@pytest.mark.parametrize(
    ("object_", "field"),
    [
        ({"kind": "Pod", "metadata": {"name": "x", "namespace": "a;k8s:zone=x"}}, "metadata.namespace"),
        ({"kind": "Pod", "metadata": {"name": "x", "namespace": "a" * 64}}, "metadata.namespace"),
        ({"kind": "Namespace", "metadata": {"name": "a;b"}}, "metadata.name"),
        (pod(serviceAccountName="a;k8s:zone=x"), "spec.serviceAccountName"),
    ],
)
def test_names_that_become_labels_are_names_of_kubernetes(object_: Any, field: str) -> None:
    with pytest.raises(WorkloadError, match=rf"objects\[0\]\.{field}: .*expected"):
        WorkloadRegistry().upsert([object_])


def test_named_ports_are_read_from_every_container() -> None:
    manifest = pod(
        containers=[
            {"ports": [{"name": "http", "containerPort": 80}]},
            {"ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}, {"containerPort": 9}]},
        ]
    )
    assert parse_pod(manifest).ports == {"http": [("TCP", 80)], "dns": [("UDP", 53)]}


def test_export_and_restore_give_the_same_labels() -> None:
    registry, copy = WorkloadRegistry(), WorkloadRegistry()
    registry.upsert([namespace({"team": "a"}), pod(labels={"app": "web"})])
    copy.restore(registry.export())
    assert copy.identity_labels("shop", "web") == registry.identity_labels("shop", "web")
