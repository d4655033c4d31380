"""Identities of this node alone: one for each prefix that a policy names (inventory PO-L05, PO-L06)."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from ciliate.identity.numeric import LOCAL_BASE, Identity
from ciliate.labels import SOURCE_CIDR, SOURCE_RESERVED, Label, LabelSet

Prefix = IPv4Network | IPv6Network
LAST = LOCAL_BASE + 0xFFFFFF


class LocalIdentitiesExhaustedError(Exception):
    """All 16.7 million local numbers are in use."""


def cidr_labels(prefix: Prefix) -> LabelSet:
    """Labels of a prefix: itself and every prefix around it, and world. In IPv6 keys colons become dashes."""
    around = [Label(SOURCE_CIDR, _key(prefix.supernet(new_prefix=length))) for length in range(1, prefix.prefixlen + 1)]
    return LabelSet([*around, Label(SOURCE_CIDR, _key(prefix.supernet(new_prefix=0))), Label(SOURCE_RESERVED, "world")])


def _key(prefix: Prefix) -> str:
    if prefix.version == 4:
        return str(prefix)
    address = str(prefix.network_address).replace(":", "-")
    # a label key begins and ends with a letter or digit
    address = f"0{address}" if address.startswith("-") else address
    address = f"{address}0" if address.endswith("-") else address
    return f"{address}/{prefix.prefixlen}"


class LocalIdentities:
    """Numbers of prefixes, with references. Numbers survive a restart by ``snapshot`` and ``restore``."""

    def __init__(self) -> None:
        self._by_prefix: dict[Prefix, Identity] = {}
        self._by_number: dict[int, Identity] = {}
        self._references: dict[Prefix, int] = {}
        self._reserved: dict[Prefix, int] = {}
        self._taken: set[int] = set()
        """Numbers that are reserved."""
        self._next = LOCAL_BASE + 1

    def acquire(self, prefix: Prefix) -> Identity:
        """The identity of a prefix, with one reference more."""
        identity = self._by_prefix.get(prefix)
        if identity is None:
            number = self._reserved.pop(prefix, 0)
            self._taken.discard(number)
            number = number or self._free()
            identity = Identity(number, cidr_labels(prefix))
            self._by_prefix[prefix] = identity
            self._by_number[number] = identity
        self._references[prefix] = self._references.get(prefix, 0) + 1
        return identity

    def release(self, prefix: Prefix) -> int | None:
        """One reference less; the number where it was the last, else None."""
        count = self._references.get(prefix, 0)
        if count > 1:
            self._references[prefix] = count - 1
            return None
        if count == 0:
            return None
        del self._references[prefix]
        number = self._by_prefix.pop(prefix).id
        del self._by_number[number]
        return number

    def number(self, prefix: Prefix) -> int:
        """The number of a prefix that has one; KeyError else."""
        return self._by_prefix[prefix].id

    def get(self, number: int) -> Identity | None:
        """By number."""
        return self._by_number.get(number)

    def identities(self) -> list[Identity]:
        """All of them."""
        return list(self._by_prefix.values())

    def snapshot(self) -> dict[str, int]:
        """Prefix -> number, for the state file."""
        return {str(prefix): identity.id for prefix, identity in self._by_prefix.items()}

    def restore(self, data: Mapping[str, Any]) -> None:
        """Keep these numbers for these prefixes; ValueError where one is malformed."""
        for text, number in data.items():
            if not isinstance(number, int) or not LOCAL_BASE < number <= LAST:
                raise ValueError(f"prefix identity {text}: {number!r} found, expected a local number")
            self._reserved[ip_network(text)] = number
            self._taken.add(number)

    def _free(self) -> int:
        for _ in range(LAST - LOCAL_BASE):
            number = self._next
            self._next = number + 1 if number < LAST else LOCAL_BASE + 1
            if number not in self._by_number and number not in self._taken:
                return number
        raise LocalIdentitiesExhaustedError(f"all {LAST - LOCAL_BASE} local identities are in use")
