"""The services of a node with the numbers of all parts, as plain data. Turns what is wanted into what has to change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv6Address, ip_network
from typing import NamedTuple

import msgspec

from ciliate.service.ids import IdPool
from ciliate.service.model import (
    PROTOCOL_NAMES,
    PROTOCOLS,
    BackendSpec,
    FrontendSpec,
    FrontendTakenError,
    Network,
    Problem,
    ServiceError,
    ServiceMissingError,
    ServiceSpec,
    packed,
)

Key = bytes
"""Address (16 bytes, IPv4 mapped), port (2), protocol (1) of a frontend or backend."""


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One service as it is kept and stored. ``backends`` are numbers, the first ``local`` of them on this node.

    The last ``behind`` of them are of this node too, but terminate: only what comes from outside under the policy Local
    gets to them, as ``local`` is 0 then.
    """

    id: int
    frontend: Key
    backends: tuple[int, ...]
    local: int = 0
    kind: str = "ClusterIP"
    name: str = ""
    namespace: str = ""
    affinity: int = 0
    local_only: bool = False
    ranges: tuple[str, ...] = ()
    source: str = "api"
    behind: int = 0

    @property
    def at_home(self) -> bool:
        """Whether it is for the node's own processes that name a loopback address: its frontend has no address."""
        address = IPv6Address(self.frontend[:16])
        return (address.ipv4_mapped or address).is_unspecified

    def networks(self) -> list[Network]:
        """The source ranges of the frontend's family."""
        version = 4 if IPv6Address(self.frontend[:16]).ipv4_mapped else 6
        return [network for text in self.ranges if (network := ip_network(text)).version == version]


class Change(NamedTuple):
    """What the kernel and the disk have to follow: backends that are new or gone, services before and after."""

    backends: dict[int, Key]
    upserts: list[tuple[Record, Record | None]]
    deletes: list[Record]
    gone: dict[int, Key]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.upserts or self.deletes)


class ServiceTable:
    """All services. ``plan_*`` methods change the table and return what has to follow."""

    def __init__(self, local: Iterable[Network] = ()) -> None:
        """``local``: ranges of this node's pods, where backends are on this node without anybody saying so."""
        self._local = [_span(network) for network in local]
        self.records: dict[int, Record] = {}
        self.backends: dict[int, Key] = {}
        self.ids: IdPool[Key] = IdPool()
        self.backend_ids: IdPool[Key] = IdPool()
        self._by_frontend: dict[Key, int] = {}
        self._numbers: dict[Key, int] = {}
        self._uses: dict[int, int] = {}
        self._by_name: dict[tuple[str, str], set[int]] = {}

    def restore(self, records: Iterable[Record], backends: dict[int, Key], next_ids: tuple[int, int]) -> None:
        """Take over what is on disk."""
        for number, key in backends.items():
            self._add_backend(number, key)
        for record in records:
            self._record(record)
            self.ids.claim(record.id)
            for number in record.backends:
                self._uses[number] += 1
        self.ids.claim(next_ids[0] - 1)
        self.backend_ids.claim(next_ids[1] - 1)

    def _add_backend(self, number: int, key: Key) -> None:
        self.backends[number] = key
        self._numbers[key] = number
        self._uses[number] = 0
        self.backend_ids.claim(number)

    def get(self, number: int) -> Record:
        """A service; ServiceMissingError where there is none."""
        if number not in self.records:
            raise ServiceMissingError(f"id: there is no service {number}")
        return self.records[number]

    def named(self, name: tuple[str, str]) -> list[Record]:
        """The services of one (namespace, name)."""
        return [self.records[number] for number in sorted(self._by_name.get(name, ()))]

    def _record(self, record: Record) -> None:
        self.records[record.id] = record
        self._by_frontend[record.frontend] = record.id
        if record.name:
            self._by_name.setdefault((record.namespace, record.name), set()).add(record.id)

    def _forget(self, record: Record) -> None:
        del self.records[record.id], self._by_frontend[record.frontend]
        name = (record.namespace, record.name)
        self._by_name.get(name, set()).discard(record.id)
        if not self._by_name.get(name):
            self._by_name.pop(name, None)

    def by_frontend(self, key: Key) -> Record | None:
        """The service with a frontend."""
        number = self._by_frontend.get(key)
        return self.records[number] if number is not None else None

    def refuse_overlaps(self, specs: Sequence[ServiceSpec], path: str = "services[{}].") -> None:
        """FrontendTakenError where two services would have one frontend; ServiceError where one id is given twice."""
        taken: dict[Key, int] = {}
        ids: dict[int, int] = {}
        problems, doubled = [], []
        for index, spec in enumerate(specs):
            key, field = frontend_key(spec.frontend_address), path.format(index)
            owner = self._by_frontend.get(key)
            if key in taken:
                first = f"a frontend of its own (services[{taken[key]}] has it)"
                problems.append(Problem(f"{field}frontend-address", str(spec.frontend_address), first))
            elif owner is not None and self._is_of_another(self.records[owner], spec):
                has = f"a frontend of its own (service {owner} has it)"
                problems.append(Problem(f"{field}frontend-address", str(spec.frontend_address), has))
            if spec.id and spec.id in ids:
                doubled.append(Problem(f"{field}id", spec.id, f"each id once (services[{ids[spec.id]}] has it)"))
            taken[key], ids[spec.id] = index, index
        if doubled:
            raise ServiceError(doubled)
        if problems:
            raise FrontendTakenError(problems)

    @staticmethod
    def _is_of_another(owner: Record, spec: ServiceSpec) -> bool:
        """By number where it is given, else by name."""
        if spec.id:
            return owner.id != spec.id
        return (owner.namespace, owner.name) != (spec.namespace, spec.name)

    def plan(
        self, specs: Sequence[ServiceSpec], deletes: Iterable[int] = (), source: str = "api"
    ) -> tuple[Change, list[Record]]:
        """Make these services so and delete others; also returns the record of each of ``specs``."""
        change = Change({}, [], [], {})
        lost: set[int] = set()
        for number in deletes:
            self._delete(self.get(number), change, lost)
        records = [self._upsert(spec, source, change, lost) for spec in specs]
        for number in lost:
            if not self._uses[number]:
                key = change.gone[number] = self.backends.pop(number)
                del self._uses[number], self._numbers[key]
                self.backend_ids.release(key, number)
        return change, records

    def _delete(self, record: Record, change: Change, lost: set[int]) -> None:
        self._forget(record)
        self.ids.release(record.frontend, record.id)
        self._drop(record.backends, lost)
        change.deletes.append(record)

    def _drop(self, backends: Iterable[int], lost: set[int]) -> None:
        for number in backends:
            self._uses[number] -= 1
            lost.add(number)

    def _upsert(self, spec: ServiceSpec, source: str, change: Change, lost: set[int]) -> Record:
        front = frontend_key(spec.frontend_address)
        number = spec.id or self._by_frontend.get(front) or self.ids.take(front)
        self.ids.claim(number)
        old = self.records.get(number)
        backends, local, behind = self._number(spec, front[18:], old, change)
        record = Record(
            number,
            front,
            backends,
            local,
            spec.type,
            spec.name,
            spec.namespace,
            spec.session_affinity_timeout,
            spec.external_traffic_policy == "Local",
            tuple(spec.source_ranges),
            source,
            behind,
        )
        if record == old:
            return old
        for item in backends:
            self._uses[item] += 1
        if old is not None:
            self._drop(old.backends, lost)
            self._forget(old)
        self._record(record)
        change.upserts.append((record, old))
        return record

    def _number(
        self, spec: ServiceSpec, proto: bytes, old: Record | None, change: Change
    ) -> tuple[tuple[int, ...], int, int]:
        """The backends' numbers: local ones first; those that the service had keep their order, so that few move. Then
        how many are local, and how many are behind the others (see ``Record``)."""
        serving, behind = self._serving(spec, proto)
        order, local = self._order(serving, old, change)
        rest, _ = self._order(behind, old, change)
        return (*order, *rest), local, len(rest)

    def _serving(self, spec: ServiceSpec, proto: bytes) -> tuple[dict[Key, bool], dict[Key, bool]]:
        """Keys of the backends with whether they are local: those that serve everybody, and those behind them. Who
        terminates serves where nobody else does; for the policy Local that is asked of this node alone."""
        ready: dict[Key, bool] = {}
        ending: dict[Key, bool] = {}
        for item in spec.backend_addresses:
            key = (packed(item.ip) or b"") + item.port.to_bytes(2, "big") + proto
            (ending if item.terminating else ready)[key] = item.local or self._is_local(key)
        if not ready:
            return ending, {}
        if spec.external_traffic_policy != "Local" or any(ready.values()):
            return ready, {}
        return ready, {key: True for key, local in ending.items() if local and key not in ready}

    def _order(self, keys: Mapping[Key, bool], old: Record | None, change: Change) -> tuple[tuple[int, ...], int]:
        wanted = {}
        for key, is_local in keys.items():
            number = self._numbers.get(key)
            if number is None:
                number = self.backend_ids.take(key)
                self._add_backend(number, key)
                change.backends[number] = key
            wanted[number] = is_local
        kept = [number for number in old.backends if number in wanted] if old is not None else []
        order = list(dict.fromkeys([*kept, *wanted]))
        local = [number for number in order if wanted[number]]
        return (*local, *(number for number in order if not wanted[number])), len(local)

    def _is_local(self, key: Key) -> bool:
        return any(first <= key[:16] <= last for first, last in self._local)

    def spec(self, record: Record) -> ServiceSpec:
        """A service as people write it."""
        return ServiceSpec(
            id=record.id,
            name=record.name,
            namespace=record.namespace,
            type=record.kind,  # type: ignore[arg-type]
            frontend_address=frontend_spec(record.frontend),
            backend_addresses=list(self._backend_specs(record)),
            session_affinity_timeout=record.affinity,
            external_traffic_policy="Local" if record.local_only else "Cluster",
            source_ranges=list(record.ranges),
        )

    def _backend_specs(self, record: Record) -> Iterator[BackendSpec]:
        behind = len(record.backends) - record.behind
        for index, number in enumerate(record.backends):
            ip, port, _ = split_key(self.backends[number])
            yield BackendSpec(ip, port, index < record.local or index >= behind, index >= behind)


def frontend_key(spec: FrontendSpec) -> Key:
    """The key of a frontend that was checked."""
    return (packed(spec.ip) or b"") + spec.port.to_bytes(2, "big") + bytes([PROTOCOLS[spec.protocol]])


def _span(network: Network) -> tuple[bytes, bytes]:
    first, last = packed(str(network.network_address)), packed(str(network.broadcast_address))
    return first or b"", last or b""


def split_key(key: Key) -> tuple[str, int, int]:
    """Address, port and protocol of a key."""
    address = IPv6Address(key[:16])
    return str(address.ipv4_mapped or address), int.from_bytes(key[16:18], "big"), key[18]


def frontend_spec(key: Key) -> FrontendSpec:
    """The frontend of a key."""
    ip, port, proto = split_key(key)
    return FrontendSpec(ip, port, PROTOCOL_NAMES[proto])
