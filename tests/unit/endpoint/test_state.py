"""The endpoint's state machine, against the table of the inventory (section 4.5)."""

import itertools

import pytest

from ciliate.endpoint.model import Endpoint
from ciliate.endpoint.state import State
from ciliate.labels import LabelSet

from .requests import request

ALLOWED = {
    "": {"creating", "waiting-for-identity", "restoring"},
    "creating": {"disconnecting", "waiting-for-identity", "restoring"},
    "waiting-for-identity": {"ready", "disconnecting", "waiting-to-regenerate"},
    "ready": {"waiting-for-identity", "disconnecting", "waiting-to-regenerate", "restoring"},
    "waiting-to-regenerate": {"waiting-for-identity", "disconnecting", "restoring", "regenerating"},
    "regenerating": {"waiting-for-identity", "disconnecting", "waiting-to-regenerate", "restoring", "ready"},
    "restoring": {"disconnecting", "waiting-to-regenerate", "restoring"},
    "disconnecting": {"disconnected"},
    "disconnected": set(),
}


def endpoint() -> Endpoint:
    return Endpoint(42, request(), LabelSet.parse(["k8s:app=web"]))


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_transition(old: State, new: State) -> None:
    subject = endpoint()
    subject.state = old
    moved = subject.move(new, "test")
    assert moved == (new in ALLOWED[old])
    assert subject.state == (new if moved else old)
    assert len(subject.log) == moved


def test_a_stored_endpoint_is_the_same() -> None:
    subject = endpoint()
    subject.identity = 300
    copy = Endpoint.from_stored(subject.stored())
    assert copy.stored() == subject.stored()


@pytest.mark.parametrize("data", [None, [], {}, {"id": "x", "request": {}, "labels": []}])
def test_a_damaged_record_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"(?i)expected|missing|object"):
        Endpoint.from_stored(data)


def test_the_status_log_keeps_the_last_256_entries() -> None:
    subject = endpoint()
    for number in range(1000):
        subject.note(str(number))
    assert [entry.message for entry in subject.log] == [str(number) for number in range(744, 1000)]


def test_a_refused_transition_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    subject = endpoint()
    assert not subject.move(State.READY, "too early")
    assert "refused (too early)" in caplog.text
