"""What a person may send to others has no secrets in it. Tier unit."""

from __future__ import annotations

from typing import Any

import pytest

from ciliate.redaction import hide_secrets


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"password": "x", "qps": 5}, {"password": "(hidden)", "qps": 5}),
        ({"plugins": {"etcd": {"password": "x"}}}, {"plugins": {"etcd": {"password": "(hidden)"}}}),
        (
            {"kvstore_opt": "etcd.address=a:1,etcd.password=x,etcd.qps=5"},
            {"kvstore_opt": "etcd.address=a:1,etcd.password=(hidden),etcd.qps=5"},
        ),
        (
            {"kvstore_opt": '{"etcd.password": "x", "etcd.qps": 5}'},
            {"kvstore_opt": '{"etcd.password":"(hidden)","etcd.qps":5}'},
        ),
        ({"labels": "k8s:app=a"}, {"labels": "k8s:app=a"}),
    ],
)
def test_secrets_are_hidden_wherever_they_stand(value: Any, shown: Any) -> None:
    assert hide_secrets(value) == shown
