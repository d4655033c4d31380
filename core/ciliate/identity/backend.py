"""What core needs of an identity backend; providers are plugins of kind `identity`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ciliate.identity.numeric import Identity
from ciliate.labels import LabelSet

Observer = Callable[[list[Identity], list[int]], None]
"""Called on the loop with identities that came and numbers that went."""


class IdentityError(Exception):
    """No identity can be given; the text says why."""


class IdentityBackend(Protocol):
    """Gives label sets their numbers, the same everywhere in the cluster."""

    async def start(self) -> None:
        """Read what is known; IdentityError or the store's error where that fails."""

    async def stop(self) -> None:
        """Stop following the cluster. References of this node stay."""

    async def allocate(self, labels: LabelSet) -> Identity:
        """The identity of ``labels``, with one reference more. IdentityError where numbers are used up."""

    async def release(self, identity_id: int) -> None:
        """One reference less; at none this node no longer holds the identity."""

    async def settle(self) -> None:
        """Give up what this node held before its last start and has not taken up again.

        The agent calls it once its endpoints are back: only then is what a crash left known to be nobody's.
        """

    def get(self, identity_id: int) -> Identity | None:
        """An identity of the cluster by number, as far as this node knows."""

    def identities(self) -> Mapping[int, Identity]:
        """Every identity of the cluster that this node knows."""

    async def collect(self) -> int:
        """Remove identities that no node holds; returns how many. Safe beside allocations; the operator calls it."""

    def subscribe(self, observer: Observer) -> None:
        """Tell ``observer`` of every change from now on."""
