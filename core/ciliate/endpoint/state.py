"""The endpoint's state machine (inventory section 4.5)."""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    """Where an endpoint stands in its life."""

    NEW = ""
    CREATING = "creating"
    WAITING_FOR_IDENTITY = "waiting-for-identity"
    WAITING_TO_REGENERATE = "waiting-to-regenerate"
    REGENERATING = "regenerating"
    RESTORING = "restoring"
    READY = "ready"
    DISCONNECTING = "disconnecting"
    DISCONNECTED = "disconnected"


_S = State
TRANSITIONS: dict[State, frozenset[State]] = {
    _S.NEW: frozenset({_S.CREATING, _S.WAITING_FOR_IDENTITY, _S.RESTORING}),
    _S.CREATING: frozenset({_S.DISCONNECTING, _S.WAITING_FOR_IDENTITY, _S.RESTORING}),
    _S.WAITING_FOR_IDENTITY: frozenset({_S.READY, _S.DISCONNECTING, _S.WAITING_TO_REGENERATE}),
    _S.READY: frozenset({_S.WAITING_FOR_IDENTITY, _S.DISCONNECTING, _S.WAITING_TO_REGENERATE, _S.RESTORING}),
    _S.WAITING_TO_REGENERATE: frozenset({_S.WAITING_FOR_IDENTITY, _S.DISCONNECTING, _S.RESTORING, _S.REGENERATING}),
    _S.REGENERATING: frozenset(
        {_S.WAITING_FOR_IDENTITY, _S.DISCONNECTING, _S.WAITING_TO_REGENERATE, _S.RESTORING, _S.READY}
    ),
    _S.RESTORING: frozenset({_S.DISCONNECTING, _S.WAITING_TO_REGENERATE, _S.RESTORING}),
    _S.DISCONNECTING: frozenset({_S.DISCONNECTED}),
    _S.DISCONNECTED: frozenset(),
}


def allowed(old: State, new: State) -> bool:
    """Whether the state machine lets ``old`` become ``new``."""
    return new in TRANSITIONS[old]
