"""Identities over a key-value store (inventory PO-L07 to PO-L09, keys of section 4.11 K1).

`…/id/NUMBER` = labels (master key, no lease); `…/value/LABELS/NODE` = number (slave key, under the node's lease: this
node uses it). A number is agreed on in one transaction, whose conditions stand for the lock of the seed system: the
master key is free or has these labels, and no node uses another number for them. That is known from any one that uses
them, because each of them joined under that condition. Of two nodes that ask at once one wins, and the other finds its
slave key.

Nobody waits for the store who does not have to. Labels whose number is known here get it while the store is away; their
slave key is written when it is back. A master key that somebody deletes while it is in use is written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from ciliate import tasks
from ciliate.backoff import Backoff, ClusterSize
from ciliate.identity import CLUSTER_MAX, CLUSTER_MIN, LOCAL_BASE, Identity
from ciliate.identity.backend import IdentityError, Observer
from ciliate.kvstore import Compare, Delete, KeyValue, Kvstore, KvstoreError, Put
from ciliate.kvstore.guard import Restoring
from ciliate.kvstore.known import WatchCache
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.kvstore.watcher import GRACE, Watcher
from ciliate.labels import (
    NAMESPACE_LABELS_PREFIX,
    SOURCE_CIDR,
    SOURCE_RESERVED,
    LabelSet,
    valid_key,
    valid_subdomain,
    valid_value,
)

log = logging.getLogger(__name__)
ROOT = "cilium/state/identities/v1"
MASTERS = f"{ROOT}/id/"
VALUES = f"{ROOT}/value/"
ATTEMPTS = 16
PROBES = 64
RETRY_MIN = 0.01
RETRY_MAX = 5.0
NOT_OF_PODS = (SOURCE_RESERVED, SOURCE_CIDR)
"""Sources of labels that no identity of the store has."""
START_PATIENCE = 5.0
"""Seconds that the start waits for a first list, before it goes on with what the last run knew."""
KNOWN_PATIENCE = 1.0
"""Seconds that labels with a known number wait for the store."""
MEND_GRACE = 2.0
"""Seconds within which nodes that use an identity have written its key again."""


class KvstoreIdentities:
    """`ciliate.identity.backend.IdentityBackend` over the store."""

    def __init__(
        self,
        store: Kvstore,
        node: str,
        *,
        local: LocalKeys | None = None,
        cache: Path | None = None,
        cluster: ClusterSize | None = None,
        grace: float = GRACE,
    ) -> None:
        """``local`` are this node's keys, ``cache`` is a file for what is known; both as the agent has them."""
        self._store = store
        self._node = node
        self._local = local
        self._own_local = local is None
        self._known: dict[int, Identity] = {}
        self._by_labels: dict[str, int] = {}
        self._references: dict[int, int] = {}
        self._observers: list[Observer] = []
        self._locks: dict[str, asyncio.Lock] = {}
        self._unused: dict[tuple[str, int], float] = {}
        self._broken: dict[int, bool] = {}
        """Numbers in use whose master key has to be looked at; True where a watch saw it go."""
        self._restoring = Restoring(cluster)
        self._mend = asyncio.Event()
        self._mender: asyncio.Task[None] | None = None
        self._watcher: Watcher[LabelSet] = Watcher(
            store,
            MASTERS,
            _decode,
            self._changed,
            on_missing=self._missing,
            grace=grace,
            delete_grace=MEND_GRACE,
            cache=WatchCache(cache, _encode) if cache else None,
            cluster=cluster,
        )

    async def start(self) -> None:
        """Read every identity; where the store does not answer soon, go on with what the last run knew."""
        await self._watcher.start()
        if self._local is not None:
            self._local.guard(VALUES)
        self._mender = tasks.start(self._mend_loop(), "identities-mend")
        try:
            async with asyncio.timeout(START_PATIENCE):
                await self._watcher.synced.wait()
        except TimeoutError:
            known = f"{len(self._known)} identities are known from the last run"
            log.warning("identities: the store does not answer (%s); %s", self._watcher.problem, known)

    async def stop(self) -> None:
        """Stop following; the slave keys of this node stay, so that its identities are not collected meanwhile."""
        if self._mender is not None:
            self._mender.cancel()
            await asyncio.gather(self._mender, return_exceptions=True)
        await self._watcher.stop()
        if self._own_local and self._local is not None:
            await self._local.stop()

    async def _keys(self) -> LocalKeys:
        """This node's keys; an instance of our own, from the first use on, where nobody gave one."""
        if self._local is None:
            self._local = LocalKeys(self._store)
            await self._local.start()
            self._local.guard(VALUES)
        return self._local

    async def allocate(self, labels: LabelSet, hint: int = 0) -> Identity:
        """The identity of ``labels``, with one reference more."""
        key = labels.key
        local = await self._keys()
        async with self._locks.setdefault(key, asyncio.Lock()):
            number = self._by_labels.get(key)
            if number is None or not self._references.get(number):
                number = await self._number(local, key, number or self._usable(hint, key))
            self._references[number] = self._references.get(number, 0) + 1
            self._learn(number, labels)
            return self._known[number]

    def _usable(self, hint: int, key: str) -> int | None:
        """A number that these labels had, unless others have it now."""
        if not CLUSTER_MIN <= hint <= CLUSTER_MAX:
            return None
        known = self._known.get(hint)
        return hint if known is None or known.labels.key == key else None

    async def _number(self, local: LocalKeys, key: str, known: int | None) -> int:
        if known is None:
            try:
                return await self._agree(local, key, None)
            except KvstoreError as error:
                raise IdentityError(f"labels {key}: are new here, and the store cannot be asked: {error}") from error
        if not self._watcher.problem:
            try:
                async with asyncio.timeout(KNOWN_PATIENCE):
                    return await self._agree(local, key, known)
            except (KvstoreError, TimeoutError) as error:
                log.warning("identity %d is used as known here: %s", known, error or "the store is slow")
        local.set(f"{VALUES}{key}/{self._node}", str(known).encode())
        self._broken.setdefault(known, False)  # looked at once the store is back
        self._mend.set()
        return known

    async def _agree(self, local: LocalKeys, key: str, known: int | None) -> int:
        """Find or choose the number of a label set, as every node of the cluster does at the same time."""
        waiting = Backoff(RETRY_MIN, maximum=RETRY_MAX)
        for _ in range(ATTEMPTS):
            user = await self._store.first(f"{VALUES}{key}/")
            if user is not None and user.value.isdigit() and CLUSTER_MIN <= int(user.value) <= CLUSTER_MAX:
                number = int(user.value)
                agreed = await self._join(local, key, number, Compare(user.key, "value", user.value))
            else:
                number = known or self._free(key)
                nobody = Compare(f"{VALUES}{key}/", "version", 0, prefix=True)
                # known from before, and still there or not; else new
                agreed = await self._join(local, key, number, nobody)
            if agreed:
                return number
            known = None
            await waiting.wait()
        raise IdentityError(f"labels {key}: no number could be agreed on in {ATTEMPTS} attempts")

    def _free(self, key: str) -> int:
        for _ in range(PROBES):
            number = random.randint(CLUSTER_MIN, CLUSTER_MAX)
            if number not in self._known:
                return number
        free = [number for number in range(CLUSTER_MIN, CLUSTER_MAX + 1) if number not in self._known]
        if not free:
            raise IdentityError(f"labels {key}: all {CLUSTER_MAX - CLUSTER_MIN + 1} identities are in use")
        return random.choice(free)

    async def _join(self, local: LocalKeys, key: str, number: int, users: Compare) -> bool:
        """Say that this node uses the number, as long as ``users`` holds; a master key that is missing is written.

        ``users`` is that nobody uses these labels, or that somebody uses them with this number: then all do.
        """
        master, slave, lease = f"{MASTERS}{number}", self._slave(key, number), await local.lease()
        put, here = Put(slave.key, slave.value, lease), Compare(master, "value", key.encode())
        missing = Compare(master, "version", 0)
        likely = (here, [put]), (missing, [Put(master, key.encode()), put])
        there = number in self._known or not users.prefix
        for condition, ops in likely if there else reversed(likely):
            done = await self._store.transaction([condition, users], ops)
            if done.succeeded:
                local.adopt(slave.key, slave.value, done.revision)
                return True
        return False

    def _slave(self, key: str, number: int) -> Put:
        return Put(f"{VALUES}{key}/{self._node}", str(number).encode())

    async def release(self, identity_id: int) -> None:
        """One reference less; with the last one this node's slave key goes."""
        identity = self._known.get(identity_id)
        if identity is None or not self._references.get(identity_id):
            return
        local, key = await self._keys(), identity.labels.key
        async with self._locks.setdefault(key, asyncio.Lock()):
            count = self._references.get(identity_id, 0) - 1
            if count > 0:
                self._references[identity_id] = count
                return
            self._references.pop(identity_id, None)
            local.remove(f"{VALUES}{key}/{self._node}")
            if not local.problem:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KNOWN_PATIENCE):
                        await local.flush()

    async def settle(self) -> None:
        """Remove this node's slave keys of label sets that nobody here refers to."""
        await (await self._keys()).settle(VALUES)

    def get(self, identity_id: int) -> Identity | None:
        """An identity by number."""
        return self._known.get(identity_id)

    def identities(self) -> Mapping[int, Identity]:
        """Every identity that is known."""
        return self._known

    def subscribe(self, observer: Observer) -> None:
        """Tell ``observer`` of every change from now on."""
        self._observers.append(observer)

    # what others do

    def _learn(self, number: int, labels: LabelSet) -> None:
        known = self._known.get(number)
        if known is None or known.labels != labels:
            self._changed({str(number): labels}, {})

    def _changed(self, found: Mapping[str, LabelSet], gone: Mapping[str, LabelSet]) -> None:
        added, removed = [], []
        for name, labels in found.items():
            number = int(name)
            known = self._known.get(number)
            if known is not None and known.labels == labels:
                continue
            if known is not None and self._references.get(number):
                log.error("identity %d was %s here and is %s in the store now", number, known.labels.key, labels.key)
                self._references.pop(number)
            identity = Identity(number, labels)
            self._known[number] = identity
            self._prefer(labels.key, number)
            added.append(identity)
        for name in gone:
            number = int(name)
            if number in self._known and not self._references.get(number):
                self._forget(number)
                removed.append(number)
        if added or removed:
            for observer in self._observers:
                observer(added, removed)

    def _prefer(self, key: str, number: int) -> None:
        """Of several numbers for the same labels the one that is in use here counts."""
        if not self._references.get(self._by_labels.get(key, 0)):
            self._by_labels[key] = number

    def _forget(self, number: int) -> None:
        key = self._known.pop(number).labels.key
        if self._by_labels.get(key) == number:
            del self._by_labels[key]

    def _missing(self, names: Collection[str]) -> None:
        broken = [int(name) for name in names if self._references.get(int(name))]
        if broken:
            log.warning("identities %s are in use but their keys are gone; they are written again", broken)
            self._broken |= dict.fromkeys(broken, True)
            self._mend.set()

    async def _mend_loop(self) -> None:
        """Write master keys again that are in use here."""
        waiting = Backoff(RETRY_MIN, maximum=RETRY_MAX)
        while True:
            await self._mend.wait()
            self._mend.clear()
            await self._restoring.wait()
            try:
                while self._broken:
                    await self._mend_one(next(iter(self._broken)))
            except KvstoreError as error:
                log.debug("identities cannot be mended yet: %s", error)
                self._mend.set()
                await waiting.wait()
            else:
                waiting.reset()

    async def _mend_one(self, number: int) -> None:
        identity = self._known.get(number)
        seen = self._broken.pop(number)
        back = seen and not self._watcher.holds(str(number))  # somebody else was faster
        if identity is not None and self._references.get(number) and not back:
            key = identity.labels.key
            master = Compare(f"{MASTERS}{number}", "version", 0)
            try:
                await self._store.transaction([master], [Put(master.key, key.encode())])
            except BaseException:
                self._broken.setdefault(number, seen)
                raise

    # collection

    async def collect(self, grace: float = 0.0) -> int:
        """Remove master keys that no node uses, and has used for ``grace`` seconds; returns how many.

        Safe beside allocations: the transaction that removes a key looks for users again.
        """
        now, used, removed = time.monotonic(), await self._used(), 0
        unused: dict[tuple[str, int], float] = {}
        async for page in self._store.pages(MASTERS):
            for item in page.items:
                users = used.get(item.value.decode(errors="replace"), {})
                if item.key[len(MASTERS) :].encode() in users:
                    continue
                since = self._unused.get((item.key, item.mod_revision), now)
                unused[item.key, item.mod_revision] = since
                if now - since >= grace and await self._remove_master(item, next(iter(users.values()), None)):
                    del unused[item.key, item.mod_revision]
                    removed += 1
        self._unused = unused
        return removed

    async def _used(self) -> dict[str, dict[bytes, KeyValue]]:
        """Label sets that some node uses, with the slave key of one such node by the number that it uses."""
        used: dict[str, dict[bytes, KeyValue]] = {}
        async for page in self._store.pages(VALUES):
            for item in page.items:
                users = used.setdefault(item.key[len(VALUES) :].rpartition("/")[0], {})
                users.setdefault(item.value, item)
        return used

    async def _remove_master(self, item: KeyValue, user: KeyValue | None) -> bool:
        """Remove a master key, unless somebody begins to use it: who uses the labels with another number, does not."""
        if user is None:
            users = Compare(f"{VALUES}{item.value.decode(errors='replace')}/", "version", 0, prefix=True)
        else:
            users = Compare(user.key, "value", user.value)
        mine = Compare(item.key, "mod_revision", item.mod_revision)
        return (await self._store.transaction([mine, users], [Delete(item.key)])).succeeded


def _decode(name: str, value: bytes) -> LabelSet:
    if not name.isdigit() or not CLUSTER_MIN <= int(name) < LOCAL_BASE:
        # nobody who can write into the store gives other labels to the host, to the world or to what is assigned
        raise ValueError(f"{name}: expected a number of the cluster's")
    labels = LabelSet.from_key(value.decode())
    if not len(labels):
        raise ValueError(f"{name}: expected labels")
    for label in labels:
        # nobody who can write into the store makes a pod part of the host or of the world
        if label.source in NOT_OF_PODS:
            raise ValueError(f"{name}: label {label} given, expected none of source {label.source}")
        bare = label.key.removeprefix(NAMESPACE_LABELS_PREFIX)
        if not valid_key(bare) or not (valid_value(label.value) or valid_subdomain(label.value)):
            raise ValueError(f"{name}: label {label} given, expected one that Kubernetes takes")
    return labels


def _encode(labels: LabelSet) -> bytes:
    return labels.key.encode()
