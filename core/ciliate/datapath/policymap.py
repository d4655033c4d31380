"""The policy map: what the kernel has of each endpoint, and the order in which it is changed.

The order: deny entries come before allow entries, and go after them; enforcement is switched on only when allows are
in; look-up shapes widen before entries appear and narrow after they went. So at no moment is allowed what both the old
and the new policy deny. A flow that both allow can be denied for the microseconds between two batches only where
the new policy puts a wide deny under a narrow allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from ciliate.datapath.bpf import Map
from ciliate.datapath.layout import policy_entry, policy_entry_of, policy_key, policy_key_of, shape_bit
from ciliate.policy.mapstate import PolicyEntry, PolicyKey, Verdict


class Enforcement(NamedTuple):
    """What an endpoint's entry says of policy: which directions are enforced, and which look-ups can succeed."""

    ingress: bool
    egress: bool
    ingress_shape: int
    egress_shape: int


class PolicyMap:
    """Owner of the policy map's entries. Blocking; not for two threads at once."""

    def __init__(self, table: Map) -> None:
        self._map = table
        self._entries: dict[int, dict[PolicyKey, PolicyEntry]] = {}
        self._shapes: dict[int, tuple[Counter[int], Counter[int]]] = {}

    def adopt(self) -> None:
        """Read what an earlier run left."""
        self._entries.clear()
        self._shapes.clear()
        for data, value in self._map.items():
            endpoint, key = policy_key_of(data)
            self._note(endpoint, key, policy_entry_of(value).entry)

    def endpoints(self) -> set[int]:
        """Endpoints that have entries."""
        return set(self._entries)

    def entries(self, endpoint: int) -> Mapping[PolicyKey, PolicyEntry]:
        """What the kernel has of one endpoint."""
        return self._entries.get(endpoint, {})

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
        """Change an endpoint's policy step by step; ``write`` puts enforcement and shapes into its entry."""
        ingress, egress = self.shape(endpoint)
        for key in upserts:
            if key.direction == 0:
                ingress |= shape_bit(key)
            else:
                egress |= shape_bit(key)
        write(Enforcement(*old_enforce, ingress, egress))
        self._upsert(endpoint, sorted(upserts.items(), key=lambda item: item[1].verdict == Verdict.ALLOW))
        write(Enforcement(*enforce, ingress, egress))
        if deletes:
            self._delete(endpoint, deletes)
            write(Enforcement(*enforce, *self.shape(endpoint)))

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
        return sum(bit for bit in counters[0] if counters[0][bit]), sum(bit for bit in counters[1] if counters[1][bit])

    def _upsert(self, endpoint: int, items: list[tuple[PolicyKey, PolicyEntry]]) -> None:
        self._map.update_many((policy_key(endpoint, key), policy_entry(entry)) for key, entry in items)
        for key, entry in items:
            self._note(endpoint, key, entry)

    def _delete(self, endpoint: int, keys: Collection[PolicyKey]) -> None:
        present = self._entries.get(endpoint, {})
        allow = Verdict.ALLOW
        known = sorted((key for key in keys if key in present), key=lambda key: present[key].verdict != allow)
        self._map.delete_many(policy_key(endpoint, key) for key in known)
        for key in known:
            del present[key]
            self._shapes[endpoint][key.direction][shape_bit(key)] -= 1

    def _note(self, endpoint: int, key: PolicyKey, entry: PolicyEntry) -> None:
        present = self._entries.get(endpoint)
        if present is None:
            present = self._entries[endpoint] = {}
            self._shapes[endpoint] = (Counter(), Counter())
        if key not in present:
            self._shapes[endpoint][key.direction][shape_bit(key)] += 1
        present[key] = entry
