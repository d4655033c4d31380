"""Labels of users on endpoints: added, disabled, refused, kept on disk. Tier unit."""

from __future__ import annotations

import pytest

from ciliate.endpoint import labelling
from ciliate.endpoint.labelling import LabelChangeError
from ciliate.endpoint.model import Endpoint
from ciliate.identity.filter import LabelFilter
from ciliate.labels import Label, LabelSet

from .requests import request

ORCHESTRATION = ["k8s:org=empire", "k8s:class=deathstar", "k8s:io.kubernetes.pod.namespace=default"]
FILTER = LabelFilter()


def endpoint() -> Endpoint:
    subject = Endpoint(42, request(), LabelSet())
    subject.orchestration = LabelSet.parse(ORCHESTRATION)
    return subject


def parse(*labels: str) -> LabelSet:
    return LabelSet.parse(labels)


@pytest.mark.parametrize(
    ("add", "delete", "added", "missing"),
    [
        (["color=red"], [], {"unspec:color=red"}, set()),
        (["k8s:org=alliance"], [], {"k8s:org=alliance"}, {"k8s:org=empire"}),
        ([], ["k8s:org"], set(), {"k8s:org=empire"}),
        ([], ["k8s:org=empire", "k8s:class=deathstar"], set(), {"k8s:org=empire", "k8s:class=deathstar"}),
        (["k8s:org=empire"], [], set(), set()),
    ],
)
def test_a_change(add: list[str], delete: list[str], added: set[str], missing: set[str]) -> None:
    subject = endpoint()
    labelling.change(subject, parse(*add), parse(*delete))
    labels = set(labelling.identity_labels(subject, FILTER).strings())
    assert labels == (set(ORCHESTRATION) - missing) | added


def test_what_was_disabled_comes_back_when_it_is_added() -> None:
    subject = endpoint()
    labelling.change(subject, parse(), parse("k8s:org"))
    assert labelling.document(subject, FILTER)["status"]["disabled"] == ["k8s:org=empire"]
    labelling.change(subject, parse("k8s:org=empire"), parse())
    assert set(labelling.identity_labels(subject, FILTER).strings()) == set(ORCHESTRATION)
    assert labelling.document(subject, FILTER)["spec"]["user"] == []


def test_a_label_of_the_user_that_goes_shows_the_orchestrators_again() -> None:
    subject = endpoint()
    labelling.change(subject, parse("k8s:org=alliance"), parse())
    labelling.change(subject, parse(), parse("k8s:org"))
    assert set(labelling.identity_labels(subject, FILTER).strings()) == set(ORCHESTRATION)


def test_a_label_that_the_filter_ignores_is_told_apart() -> None:
    subject = endpoint()
    labelling.change(subject, parse("pod-template-hash=1"), parse())
    assert labelling.document(subject, FILTER)["status"]["derived"] == ["unspec:pod-template-hash=1"]


@pytest.mark.parametrize(
    ("add", "delete", "field"),
    [
        (["reserved:host"], [], "add"),
        (["cidr:10.0.0.0/8"], [], "add"),
        (["k8s:io.kubernetes.pod.namespace=kube-system"], [], "add"),
        (["io.cilium.k8s.policy.serviceaccount=admin"], [], "add"),
        (["ok=1"], ["k8s:io.kubernetes.pod.namespace"], "delete"),
        (["ok=1"], ["k8s:nobody"], "delete"),
    ],
)
def test_what_is_refused_changes_nothing(add: list[str], delete: list[str], field: str) -> None:
    subject = endpoint()
    before = subject.stored()
    with pytest.raises(LabelChangeError, match=f"^{field}: label ") as caught:
        labelling.change(subject, parse(*add), parse(*delete))
    assert caught.value.field == field
    assert subject.stored() == before


def test_no_labels_at_all_are_identity_init() -> None:
    subject = endpoint()
    subject.orchestration = LabelSet()
    assert labelling.identity_labels(subject, FILTER).strings() == ["reserved:init"]
    labelling.change(subject, parse("a=b"), parse())
    assert labelling.identity_labels(subject, FILTER).strings() == ["unspec:a=b"]


def test_the_record_keeps_them() -> None:
    subject = endpoint()
    labelling.change(subject, parse("color=red"), parse("k8s:org"))
    copy = Endpoint.from_stored(subject.stored())
    assert labelling.document(copy, FILTER) == labelling.document(subject, FILTER)


def test_a_record_of_an_older_agent_keeps_its_labels() -> None:
    subject = endpoint()
    subject.labels = LabelSet.parse(ORCHESTRATION)
    record = {key: value for key, value in subject.stored().items() if key in ("id", "request", "labels", "identity")}
    copy = Endpoint.from_stored(record)
    assert labelling.identity_labels(copy, FILTER) == subject.labels


@pytest.mark.parametrize(
    "label",
    [
        Label("unspec", "user", "admin;k8s:zone=x"),
        Label("k8s", "user;k8s:zone", "x"),
        Label("container", "user", "x" * 64),
        Label("unspec", "custom:user", "x"),
    ],
)
def test_labels_that_kubernetes_would_refuse_are_refused_and_can_be_deleted(label: Label) -> None:
    subject = endpoint()
    with pytest.raises(LabelChangeError, match=r"add: label .* expected"):
        labelling.change(subject, LabelSet([label]), parse())
    assert not len(subject.user_labels)
    subject.user_labels = LabelSet([label])  # of an earlier version
    labelling.change(subject, parse(), LabelSet([label]))
    assert not len(subject.user_labels)
