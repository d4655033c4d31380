"""How much of the node's room for policies each namespace takes, for `status` and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ciliate.policy import bounds

if TYPE_CHECKING:
    from ciliate.endpoint.realize import Realizer
    from ciliate.policy.repository import Repository

CLUSTERWIDE = "-"
"""Stands for policies of the whole cluster, which belong to no namespace and have no share of their own."""


class PolicyShare(msgspec.Struct, frozen=True, rename="kebab"):
    """What one namespace takes. ``prefixes`` its policies name; ``entries`` of the policy map its endpoints have.

    ``largest`` is the object of its policies that names most prefixes.
    """

    namespace: str
    prefixes: int
    most_prefixes: int
    entries: int
    most_entries: int
    largest: str

    @property
    def used(self) -> float:
        """The greater share that is used up, 0 to 1."""
        return max(self.prefixes / self.most_prefixes, self.entries / self.most_entries)


def policy_shares(repository: Repository, realizer: Realizer) -> list[PolicyShare]:
    """Every namespace that takes anything, the one with the greatest share first."""
    named = {share.namespace: share for share in repository.shares.shares()}
    entries = {name: count for name, count in realizer.by_namespace.items() if count}
    found = []
    for name in named.keys() | entries.keys():
        share = named.get(name)
        most = bounds.NAMESPACE_PREFIXES if name else bounds.MAX_PREFIXES
        most_entries = bounds.NAMESPACE_ENTRIES if name else bounds.NODE_ENTRIES
        prefixes, largest = (share.prefixes, share.largest) if share is not None else (0, "")
        found.append(PolicyShare(name or CLUSTERWIDE, prefixes, most, entries.get(name, 0), most_entries, largest))
    return sorted(found, key=lambda item: (-item.used, item.namespace))
