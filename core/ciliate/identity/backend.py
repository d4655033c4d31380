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
        """Read what is known, of the last run where the cluster cannot be asked. IdentityError where that fails."""

    async def stop(self) -> None:
        """Stop following the cluster. References of this node stay."""

    async def allocate(self, labels: LabelSet, hint: int = 0) -> Identity:
        """The identity of ``labels``, with one reference more. IdentityError where none can be had.

        ``hint`` is the number that this node used for them before: theirs where the cluster has no other, and where
        it cannot be asked. Labels whose number is known do not wait for a cluster that is away.
        """

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

    async def collect(self, grace: float = 0.0) -> int:
        """Remove identities that no node holds, and has held for ``grace`` seconds as far as this instance has seen.

        Returns how many. Safe beside allocations; the operator calls it.
        """

    def subscribe(self, observer: Observer) -> None:
        """Tell ``observer`` of every change from now on."""
