"""Identities as policy sees them, and the indexes that find them: by label, by address prefix."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from ipaddress import ip_network
from typing import Any

import msgspec
from pyroaring import BitMap

from ciliate.identity.numeric import WORLD, Identity
from ciliate.labels import SOURCE_ANY, SOURCE_CIDR, SOURCE_RESERVED, Label, LabelSet
from ciliate.policy.model import CidrPeer, Network
from ciliate.policy.places import covers
from ciliate.policy.selector import DOES_NOT_EXIST, EXISTS, IN, Requirement, Selector

SOURCE_FQDN = "fqdn"
"""Source of labels that say which DNS names an identity stands for; only the system sets them."""
_WORLD = Label(SOURCE_RESERVED, "world")


class Member(msgspec.Struct, frozen=True, eq=False, gc=False):
    """An identity. ``prefixes`` are what a CIDR identity covers."""

    id: int
    labels: LabelSet
    prefixes: tuple[Network, ...] = ()
    world: bool = False

    @classmethod
    def of(cls, identity: Identity) -> Member:
        """From an identity record; CIDR labels give its prefixes."""
        prefixes = dict.fromkeys(_label_prefixes(identity.labels))
        return cls(identity.id, identity.labels, tuple(prefixes), _WORLD in identity.labels)

    def names(self) -> list[str]:
        """DNS names that it stands for."""
        return [label.key for label in self.labels if label.source == SOURCE_FQDN]


def _label_prefixes(labels: LabelSet) -> Iterable[Network]:
    """The narrowest prefix of each family."""
    keys = [label.key.replace("-", ":") for label in labels if label.source == SOURCE_CIDR]
    found: dict[int, Network] = {}
    for key in sorted(keys, key=_length, reverse=True):
        known = found.get(6 if ":" in key else 4)
        if known is not None and known.prefixlen > _length(key):
            continue  # there is a label for every prefix around the narrowest, and reading them takes long
        try:
            network = ip_network(key)
        except ValueError:
            continue  # a label that only looks like a prefix selects nothing by address
        if known is None or known.prefixlen <= network.prefixlen:
            found[network.version] = network
    return found.values()


def _length(key: str) -> int:
    """The length that a CIDR label gives, or more than any where it gives none."""
    _, slash, text = key.rpartition("/")
    return int(text) if slash and len(text) <= 3 and text.isdecimal() else 129


def cidr_label(network: Network) -> Label:
    """The label of a prefix, in the form of inventory PO-L06."""
    text = str(network)
    if network.version == 6:
        address, _, length = text.partition("/")
        address = f"0{address}" if address.startswith(":") else address
        address = f"{address}0" if address.endswith(":") else address
        text = f"{address.replace(':', '-')}/{length}"
    return Label(SOURCE_CIDR, text)


def means(peer: CidrPeer, member: Member) -> bool:
    """True where a CIDR means this identity: one of the world, whose prefix lies in it and in no exception.

    Pods and nodes are never meant by identity; a Kubernetes ipBlock means them by their place.
    """
    if not member.world:
        return False
    if not member.prefixes:
        # the world at large is named by its /0 prefix identity; only identities without any prefix come here
        return covers(peer, None) and member.id != WORLD
    same = [prefix for prefix in member.prefixes if prefix.version == peer.cidr.version]
    return bool(same) and all(covers(peer, prefix) for prefix in same)


class LabelIndex:
    """From labels to the identities that carry them. CIDR labels are left to the prefix table."""

    def __init__(self) -> None:
        self.everyone = BitMap()
        self._values: dict[Label, BitMap] = {}
        self._keys: dict[tuple[str, str], BitMap] = {}
        self._sources: dict[str, set[str]] = {}

    def add(self, member: Member) -> None:
        """Take in one identity."""
        number = member.id
        self.everyone.add(number)
        for label in member.labels:
            if label.source == SOURCE_CIDR:
                continue
            _set(self._values, label, number)
            _set(self._keys, label[:2], number)
            self._sources.setdefault(label.key, set()).add(label.source)

    def discard(self, member: Member) -> None:
        """Forget one identity."""
        self.everyone.discard(member.id)
        for label in member.labels:
            _clear(self._values, label, member.id)
            _clear(self._keys, label[:2], member.id)

    def select(self, wanted: Selector) -> BitMap:
        """Every identity that a selector matches, as a bitmap of its own."""
        result: BitMap | None = None
        for item in sorted(wanted.requirements, key=lambda item: item.operator != IN):
            found = self._requirement(item)
            if item.operator in (IN, EXISTS):
                result = found if result is None else result & found
            else:
                result = (self.everyone if result is None else result) - found
        return BitMap(self.everyone) if result is None else BitMap(result)

    def _requirement(self, item: Requirement) -> BitMap:
        """Identities that have the key with one of the values, or the key at all."""
        sources = self._sources.get(item.key, ()) if item.source == SOURCE_ANY else (item.source,)
        if item.operator in (EXISTS, DOES_NOT_EXIST):
            found = [self._keys.get((source, item.key)) for source in sources]
        else:
            found = [self._values.get(Label(source, item.key, value)) for source in sources for value in item.values]
        bitmaps = [bitmap for bitmap in found if bitmap is not None]
        return bitmaps[0] if len(bitmaps) == 1 else BitMap.union(*bitmaps) if bitmaps else BitMap()


def _set(table: dict[Any, BitMap], key: Any, number: int) -> None:
    bitmap = table.get(key)
    if bitmap is None:
        table[key] = BitMap((number,))
    else:
        bitmap.add(number)


def _clear(table: dict[Any, BitMap], key: Any, number: int) -> None:
    bitmap = table.get(key)
    if bitmap is not None:
        bitmap.discard(number)
        if not bitmap:
            del table[key]


class PrefixTable:
    """World identities by prefix, sorted, so that those inside a CIDR are one slice."""

    def __init__(self) -> None:
        self._rows: dict[int, list[tuple[int, int, int]]] = {4: [], 6: []}

    def add(self, member: Member) -> None:
        """Take in a world identity."""
        for prefix in member.prefixes:
            insort(self._rows[prefix.version], (int(prefix.network_address), prefix.prefixlen, member.id))

    def discard(self, member: Member) -> None:
        """Forget a world identity."""
        for prefix in member.prefixes:
            rows = self._rows[prefix.version]
            row = (int(prefix.network_address), prefix.prefixlen, member.id)
            index = bisect_left(rows, row)
            if index < len(rows) and rows[index] == row:
                del rows[index]

    def within(self, network: Network) -> Iterator[int]:
        """Identities whose prefix lies in ``network``."""
        rows = self._rows[network.version]
        last = int(network.broadcast_address)
        index = bisect_left(rows, (int(network.network_address), network.prefixlen, 0))
        while index < len(rows) and rows[index][0] <= last:
            if rows[index][1] >= network.prefixlen:
                yield rows[index][2]
            index += 1
