"""Identities over a key-value store (inventory PO-L07 to PO-L09, keys of section 4.11 K1).

`…/id/NUMBER` = labels (master key, no lease); `…/value/LABELS/NODE` = number (slave key: this node uses it);
`…/locks/LABELS` while a number is chosen. A master key that somebody deletes while it is in use is written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Mapping

from ciliate.backoff import Backoff
from ciliate.identity import CLUSTER_MAX, CLUSTER_MIN, Identity
from ciliate.identity.backend import IdentityError, Observer
from ciliate.kvstore import CompactedError, Compare, Delete, Event, Kvstore, KvstoreError, Put, following
from ciliate.labels import LabelSet

log = logging.getLogger(__name__)
ROOT = "cilium/state/identities/v1"
MASTERS = f"{ROOT}/id/"
VALUES = f"{ROOT}/value/"
ATTEMPTS = 16
RETRY_MIN = 0.01
RETRY_MAX = 5.0


class KvstoreIdentities:
    """`ciliate.identity.backend.IdentityBackend` over the store."""

    def __init__(self, store: Kvstore, node: str) -> None:
        self._store = store
        self._node = node
        self._known: dict[int, Identity] = {}
        self._by_labels: dict[str, int] = {}
        self._references: dict[int, int] = {}
        self._observers: list[Observer] = []
        self._locks: dict[str, asyncio.Lock] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read every identity, then follow changes."""
        following = await self._list()
        self._task = asyncio.create_task(self._follow(following), name="identities")

    async def stop(self) -> None:
        """Stop following; the slave keys of this node stay, so that its identities are not collected meanwhile."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def allocate(self, labels: LabelSet) -> Identity:
        """The identity of ``labels``, with one reference more."""
        key = labels.key
        async with self._locks.setdefault(key, asyncio.Lock()):
            number = self._by_labels.get(key)
            if number is None or not self._references.get(number):
                number = await self._agree(key)
            self._references[number] = self._references.get(number, 0) + 1
            self._learn(number, labels)
            return self._known[number]

    async def _agree(self, key: str) -> int:
        """Find or choose the number of a label set, as every node of the cluster does at the same time."""
        number = await self._existing(key)
        waiting = Backoff(RETRY_MIN, maximum=RETRY_MAX)
        for _ in range(ATTEMPTS):
            if number is not None and await self._join(key, number):
                return number
            async with self._store.lock(f"identities/{key}"):
                number = await self._existing(key)
                if number is None:
                    number = await self._create(key)
                if number is not None and await self._join(key, number):
                    return number
            number = None
            await waiting.wait()
        raise IdentityError(f"labels {key}: no number could be agreed on in {ATTEMPTS} attempts")

    async def _existing(self, key: str) -> int | None:
        """The number that some node uses for these labels, or that a master key still has."""
        for item in (await self._store.get_prefix(f"{VALUES}{key}/")).items:
            if item.value.isdigit():
                return int(item.value)
        number = self._by_labels.get(key)
        if number is not None:
            master = await self._store.get(f"{MASTERS}{number}")
            if master is not None and master.value.decode() == key:
                return number
        return None

    async def _create(self, key: str) -> int | None:
        """Claim a free number by its master key; None where somebody else was faster."""
        free = [number for number in range(CLUSTER_MIN, CLUSTER_MAX + 1) if number not in self._known]
        if not free:
            raise IdentityError(f"labels {key}: all {CLUSTER_MAX - CLUSTER_MIN + 1} identities are in use")
        number = random.choice(free)
        master = f"{MASTERS}{number}"
        result = await self._store.transaction([Compare(master, "version", 0)], [Put(master, key.encode())])
        return number if result.succeeded else None

    async def _join(self, key: str, number: int) -> bool:
        """Say that this node uses the number; False where its master key stands for other labels."""
        master, slave = f"{MASTERS}{number}", Put(f"{VALUES}{key}/{self._node}", str(number).encode())
        if await self._joined(master, key, slave):
            return True
        ours = [Compare(master, "value", key.encode())]
        if (await self._store.transaction(ours, [slave])).succeeded:
            return True
        # in use by its slave keys but without master: heal it
        missing = [Compare(master, "version", 0)]
        return (await self._store.transaction(missing, [Put(master, key.encode()), slave])).succeeded

    async def _joined(self, master: str, key: str, slave: Put) -> bool:
        """Whether an earlier run left both keys as they should be: then nothing has to be written."""
        held = await self._store.get(slave.key)
        if held is None or held.value != slave.value:
            return False
        stands = await self._store.get(master)
        return stands is not None and stands.value == key.encode()

    async def release(self, identity_id: int) -> None:
        """One reference less; with the last one this node's slave key goes."""
        identity = self._known.get(identity_id)
        count = self._references.get(identity_id, 0)
        if identity is None or count == 0:
            return
        async with self._locks.setdefault(identity.labels.key, asyncio.Lock()):
            count = self._references.get(identity_id, 0) - 1
            if count > 0:
                self._references[identity_id] = count
                return
            self._references.pop(identity_id, None)
            await self._store.delete(f"{VALUES}{identity.labels.key}/{self._node}")

    async def settle(self) -> None:
        """Remove this node's slave keys of label sets that nobody here refers to."""
        for item in (await self._store.get_prefix(VALUES)).items:
            key, _, node = item.key.removeprefix(VALUES).rpartition("/")
            if node != self._node:
                continue
            async with self._locks.setdefault(key, asyncio.Lock()):
                if not self._references.get(self._by_labels.get(key, 0)):
                    log.warning("identity %s (%s) is held for nobody here and is given up", item.value.decode(), key)
                    await self._store.delete(item.key)

    def get(self, identity_id: int) -> Identity | None:
        """An identity by number."""
        return self._known.get(identity_id)

    def identities(self) -> Mapping[int, Identity]:
        """Every identity that is known."""
        return self._known

    def subscribe(self, observer: Observer) -> None:
        """Tell ``observer`` of every change from now on."""
        self._observers.append(observer)

    async def collect(self) -> int:
        """Remove master keys that no node uses; returns how many. Safe beside allocations."""
        removed = 0
        for item in (await self._store.get_prefix(MASTERS)).items:
            key = item.value.decode()
            async with self._store.lock(f"identities/{key}"):
                if (await self._store.get_prefix(f"{VALUES}{key}/")).items:
                    continue
                unchanged = [Compare(item.key, "mod_revision", item.mod_revision)]
                removed += (await self._store.transaction(unchanged, [Delete(item.key)])).succeeded
        return removed

    async def _list(self) -> int:
        snapshot = await self._store.get_prefix(MASTERS)
        present = {}
        for item in snapshot.items:
            number = item.key.removeprefix(MASTERS)
            if number.isdigit():
                present[int(number)] = item.value.decode()
        for identity_id, key in present.items():
            self._learn(identity_id, labels_of(key))
        for identity_id in [known for known in self._known if known not in present]:
            await self._gone(identity_id)
        return snapshot.revision + 1

    async def _follow(self, start: int) -> None:
        waiting = Backoff(RETRY_MIN, maximum=RETRY_MAX)
        while True:
            try:
                async for events in self._store.watch_prefix(MASTERS, start):
                    waiting.reset()
                    for event in events:
                        await self._apply(event)
                    start = following(events, start)
            except CompactedError:
                start = await self._list()
            except KvstoreError as error:
                log.warning("identities cannot be followed: %s; trying again", error)
            await waiting.wait()

    async def _apply(self, event: Event) -> None:
        text = event.key.removeprefix(MASTERS)
        if not text.isdigit():
            return
        if event.kind == "put":
            self._learn(int(text), labels_of(event.value.decode()))
        else:
            await self._gone(int(text))

    def _learn(self, number: int, labels: LabelSet) -> None:
        known = self._known.get(number)
        if known is not None and known.labels == labels:
            return
        identity = Identity(number, labels)
        self._known[number] = identity
        self._by_labels[labels.key] = number
        for observer in self._observers:
            observer([identity], [])

    async def _gone(self, number: int) -> None:
        identity = self._known.get(number)
        if identity is None:
            return
        if self._references.get(number):
            log.warning("identity %d is in use but its key was deleted; it is written again", number)
            await self._join(identity.labels.key, number)
            return
        del self._known[number]
        if self._by_labels.get(identity.labels.key) == number:
            del self._by_labels[identity.labels.key]
        for observer in self._observers:
            observer([], [number])


def labels_of(key: str) -> LabelSet:
    """The label set of a canonical key (``source:key=value;`` and so on)."""
    return LabelSet.parse(part for part in key.split(";") if part)
