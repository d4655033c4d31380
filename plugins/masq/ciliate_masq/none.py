"""Masquerade `none`: pods' packets leave with the pods' own addresses."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ciliate.masquerade import Address, MasqueradedFlow, MasqueradePlan, PodUsage, Spare
from ciliate.plugin import MasqueradeProvider, hookimpl


class NoMasquerade:
    """Does nothing, so that one can switch to nothing."""

    async def engage(self, plan: MasqueradePlan, spare: Spare) -> None:
        """Nothing to do."""

    async def drain(self, plan: MasqueradePlan, successor: bool) -> None:
        """Nothing to do."""

    async def remaining(self) -> int:
        """Nothing is served."""
        return 0

    async def remove(self) -> None:
        """Nothing is there."""

    async def mend(self) -> list[str]:
        """Nothing can be missing."""
        return []

    async def collect(self) -> int:
        """Nothing to collect."""
        return 0

    async def flows(self) -> list[MasqueradedFlow]:
        """None."""
        return []

    async def flush(self, select: Callable[[MasqueradedFlow], bool]) -> int:
        """Nothing to flush."""
        return 0

    async def forget(self, sources: Collection[Address]) -> int:
        """Nothing to forget."""
        return 0

    async def pressure(self) -> float:
        """There is no table."""
        return 0.0

    async def usage(self) -> list[PodUsage]:
        """Nobody has anything."""
        return []


@hookimpl
def ciliate_register_masquerade() -> MasqueradeProvider:
    """One provider."""
    return MasqueradeProvider(
        name="none",
        summary="No masquerading: pods' packets leave with the pods' own addresses",
        factory=lambda context: NoMasquerade(),
    )
