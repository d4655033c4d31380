"""The policy map: what the kernel has of each endpoint, and the order in which it is changed.

The order: look-up shapes widen; entries are written in the order in which look-ups meet them (a peer's own at a place,
then anywhere, before those of any peer; longest prefix first); enforcement is switched; entries that go are deleted in
the opposite order; shapes narrow; where anything was taken away, the endpoint's epoch rises. So at every moment each
packet meets either what the old policy said of it or what the new one says. Answers of flows pass without a question
only within the epoch in which the flow was allowed, so the epoch is last: what the old policy allowed is of an old one.

A change that does not fit is refused before anything is written, one that the kernel refuses half-way is undone.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from ciliate.datapath.bpf import Map
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.layout import PolicyCounters, policy_entry, policy_entry_of, policy_key, policy_key_of, shape_bits
from ciliate.policy.mapstate import ANY_IDENTITY, MAX_ENTRIES, PolicyEntry, PolicyKey, Verdict


class PolicyTooLargeError(DatapathError):
    """An endpoint's policy that its map cannot hold; nothing of it was written."""


class Enforcement(NamedTuple):
    """What an endpoint's entry says of policy: which directions are enforced, and which look-ups can succeed."""

    ingress: bool
    egress: bool
    ingress_shape: int
    egress_shape: int
    epoch: int


class PolicyMap:
    """Owner of the policy map's entries. Blocking; not for two threads at once."""

    def __init__(self, table: Map, limit: int = MAX_ENTRIES) -> None:
        self._map = table
        self._limit = limit
        self._count = 0
        self._entries: dict[int, dict[PolicyKey, PolicyEntry]] = {}
        self._shapes: dict[int, tuple[Counter[int], Counter[int]]] = {}
        self._epochs: dict[int, int] = {}
        self._unsure: set[int] = set()

    def adopt_epoch(self, endpoint: int, epoch: int) -> None:
        """Go on from the epoch that an earlier run left. It may have been cut short: the next change begins another."""
        if endpoint not in self._epochs:
            self._epochs[endpoint] = epoch
            self._unsure.add(endpoint)

    def epoch(self, endpoint: int) -> int:
        """The epoch of an endpoint: how often its policy has taken something away."""
        return self._epochs.get(endpoint, 0)

    def unsure(self, endpoint: int) -> bool:
        """Whether something may have been taken away without a new epoch, so that `apply` is to make one."""
        return endpoint in self._unsure

    def adopt(self) -> None:
        """Read what an earlier run left."""
        self._entries.clear()
        self._shapes.clear()
        self._count = 0
        for data, value in self._map.items():
            endpoint, key = policy_key_of(data)
            self._note(endpoint, key, policy_entry_of(value).entry)

    def endpoints(self) -> set[int]:
        """Endpoints that have entries."""
        return set(self._entries)

    def entries(self, endpoint: int) -> Mapping[PolicyKey, PolicyEntry]:
        """What the kernel has of one endpoint."""
        return self._entries.get(endpoint, {})

    def counters(self, endpoint: int) -> dict[PolicyKey, PolicyCounters]:
        """What the kernel has of one endpoint, with packets and bytes so far."""
        found = ((key, self._map.lookup(policy_key(endpoint, key))) for key in self.entries(endpoint))
        return {key: policy_entry_of(value) for key, value in found if value is not None}

    def difference(
        self, endpoint: int, desired: Mapping[PolicyKey, PolicyEntry]
    ) -> tuple[dict[PolicyKey, PolicyEntry], list[PolicyKey]]:
        """What to write and to delete so that the kernel has exactly ``desired``."""
        present = self.entries(endpoint)
        upserts = {key: entry for key, entry in desired.items() if present.get(key) != entry}
        return upserts, [key for key in present if key not in desired]

    def apply(
        self,
        endpoint: int,
        upserts: Mapping[PolicyKey, PolicyEntry],
        deletes: Collection[PolicyKey],
        enforce: tuple[bool, bool],
        old_enforce: tuple[bool, bool],
        write: Callable[[Enforcement], None],
    ) -> None:
        """Change an endpoint's policy step by step; ``write`` puts enforcement and shapes into its entry.

        Raises PolicyTooLargeError before anything is written, DatapathError after what was written is undone.
        """
        self._check(endpoint, upserts, deletes)
        epoch = self.epoch(endpoint)
        before = Enforcement(*old_enforce, *self.shape(endpoint), epoch)
        after = Enforcement(*enforce, *self._widened(endpoint, upserts), epoch)
        items = [(key, upserts[key]) for key in look_up_order(upserts)]
        try:
            write(Enforcement(*old_enforce, after.ingress_shape, after.egress_shape, epoch))
            self._write(endpoint, items)
            write(after)
        except OSError:
            self._undo(endpoint, upserts)
            write(before)
            raise
        self._note_all(endpoint, items)
        if not self._narrows(endpoint, upserts, deletes, enforce, old_enforce):
            return
        self._unsure.add(endpoint)  # until the last step is done
        if deletes:
            self._delete(endpoint, look_up_order(deletes)[::-1])
        self._epochs[endpoint] = epoch = epoch + 1 & 0xFFFFFFFF
        write(Enforcement(*enforce, *self.shape(endpoint), epoch))
        self._unsure.discard(endpoint)

    def _narrows(
        self,
        endpoint: int,
        upserts: Mapping[PolicyKey, PolicyEntry],
        deletes: Collection[PolicyKey],
        enforce: tuple[bool, bool],
        old_enforce: tuple[bool, bool],
    ) -> bool:
        """Whether anything that was allowed may be so no more."""
        if deletes or endpoint in self._unsure:
            return True
        enforced = any(new and not old for new, old in zip(enforce, old_enforce, strict=True))
        return enforced or any(entry.verdict is not Verdict.ALLOW for entry in upserts.values())

    def _check(self, endpoint: int, upserts: Mapping[PolicyKey, PolicyEntry], deletes: Collection[PolicyKey]) -> None:
        present = self.entries(endpoint)
        added = sum(key not in present for key in upserts)
        gone = sum(key in present for key in deletes)
        wanted = len(present) + added - gone
        if wanted > self._limit:
            reason = f"it would take {wanted} entries of the policy map, and one endpoint may have {self._limit}"
            raise PolicyTooLargeError(errno.E2BIG, reason)
        if self._count + added > self._map.max_entries:
            reason = f"the policy map of the node is full: it would take {added} more than {self._count} entries"
            raise PolicyTooLargeError(errno.E2BIG, f"{reason}, and it may have {self._map.max_entries}")

    def _widened(self, endpoint: int, upserts: Mapping[PolicyKey, PolicyEntry]) -> tuple[int, int]:
        shapes = list(self.shape(endpoint))
        for key in upserts:
            shapes[key.direction] |= shape_bits(key)
        return shapes[0], shapes[1]

    def _undo(self, endpoint: int, upserts: Mapping[PolicyKey, PolicyEntry]) -> None:
        """Write back what was there before; where even that fails, read anew what the kernel has."""
        present = self.entries(endpoint)
        try:
            self._map.delete_many(policy_key(endpoint, key) for key in upserts if key not in present)
            self._write(endpoint, [(key, present[key]) for key in upserts if key in present])
        except OSError:
            self.adopt()
            raise

    def remove(self, endpoint: int) -> None:
        """Delete every entry of an endpoint, which must not be valid any more."""
        self._delete(endpoint, list(self.entries(endpoint)))
        self._entries.pop(endpoint, None)
        self._shapes.pop(endpoint, None)

    def shape(self, endpoint: int) -> tuple[int, int]:
        """The shape bits of an endpoint, ingress and egress."""
        counters = self._shapes.get(endpoint)
        if counters is None:
            return 0, 0
        return _union(counters[0]), _union(counters[1])

    def _write(self, endpoint: int, items: Collection[tuple[PolicyKey, PolicyEntry]]) -> None:
        self._map.update_many((policy_key(endpoint, key), policy_entry(entry)) for key, entry in items)

    def _note_all(self, endpoint: int, items: Collection[tuple[PolicyKey, PolicyEntry]]) -> None:
        for key, entry in items:
            self._note(endpoint, key, entry)

    def _delete(self, endpoint: int, keys: Collection[PolicyKey]) -> None:
        present = self._entries.get(endpoint, {})
        known = [key for key in keys if key in present]
        self._map.delete_many(policy_key(endpoint, key) for key in known)
        for key in known:
            del present[key]
            self._shapes[endpoint][key.direction][shape_bits(key)] -= 1
        self._count -= len(known)

    def _note(self, endpoint: int, key: PolicyKey, entry: PolicyEntry) -> None:
        present = self._entries.get(endpoint)
        if present is None:
            present = self._entries[endpoint] = {}
            self._shapes[endpoint] = (Counter(), Counter())
        if key not in present:
            self._shapes[endpoint][key.direction][shape_bits(key)] += 1
            self._count += 1
        present[key] = entry


def look_up_order(keys: Iterable[PolicyKey]) -> list[PolicyKey]:
    """Keys as a look-up meets them. By groups, of which there are few, because sorting costs ten times as much."""
    groups: dict[tuple[bool, bool, bool, int], list[PolicyKey]] = {}
    for key in keys:
        groups.setdefault((key[1] == ANY_IDENTITY, key[5] == 0, key[2] == 0, -key[4]), []).append(key)
    return [key for _, group in sorted(groups.items()) for key in group]


def _union(counters: Mapping[int, int]) -> int:
    shape = 0
    for bits, count in counters.items():
        shape |= bits if count else 0
    return shape
