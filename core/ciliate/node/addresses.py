"""Addresses of pods across the cluster: this node's are told to the others, theirs become claims of the ipcache.

Addresses of the other nodes themselves are not among them: they are ``world`` here, or what a policy's prefix makes of
them, in every routing mode. ``host`` means this node alone, and a node that masquerades its pods lends nobody an
identity that policies trust (field lesson CVE-2025-30163).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address

from ciliate.backoff import ClusterSize
from ciliate.datapath import layout
from ciliate.ipcache import Ipcache, Source
from ciliate.kvstore import Kvstore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.kvstore.shared import SharedStore
from ciliate.node import records
from ciliate.node.model import Node
from ciliate.node.records import Address, Claim
from ciliate.node.removal import remove_for_all
from ciliate.workload import NamedPorts, merge_ports

PREFIX = "cilium/state/ip/v1/default/"

SLACK = 10_000
"""Claims that nobody uses any more, before they are looked for."""


class ClusterAddresses:
    """Who has which address. ``on_change`` is called after the ipcache was told.

    It is given the identities whose pods' ports may be called something else than before.
    """

    def __init__(
        self,
        store: Kvstore,
        keys: LocalKeys,
        own: Node,
        ipcache: Ipcache,
        cluster: ClusterSize,
        on_change: Callable[[set[int]], None],
    ) -> None:
        self._store, self._keys = store, keys
        self._host = own.ipv4 or own.ipv6
        self._key = own.key
        self._owner = records.owner(own.cluster, own.name)
        self._ipcache = ipcache
        self._on_change = on_change
        self._decode = records.Decoder(self._owner)
        self._named: dict[str, Claim] = {}
        self._names_of: dict[int, set[str]] = {}
        self.shared: SharedStore[Claim] = SharedStore(store, keys, PREFIX, self._decode, self._changed, cluster=cluster)

    async def start(self) -> None:
        """Begin to follow; returns before the store has answered."""
        await self.shared.start()

    async def stop(self) -> None:
        """Stop following; the ipcache stays as it is."""
        await self.shared.stop()

    def inherit(self, kernel: Mapping[bytes, bytes]) -> None:
        """Before ``start``: what an earlier run left in the kernel counts until the store says otherwise."""
        local = self._ipcache.claims(Source.LOCAL)
        found = {}
        for key, value in kernel.items():
            number = layout.ipcache_identity(value)
            prefix = layout.ipcache_prefix(key)
            if number in records.ACCEPTED and key not in local and prefix.prefixlen == prefix.max_prefixlen:
                self.shared.items[str(prefix.network_address)] = Claim(number, value)
                found[key] = value
        self._ipcache.change(Source.KVSTORE, found)

    async def settle(self) -> None:
        """Once this node's endpoints are back: remove what it told of others, and nobody has any more.

        Waits for the store. KvstoreError where it fails then.
        """
        await self.shared.synced.wait()
        await self._keys.flush()
        await self.shared.settle()
        wanted = self._keys.keys
        stale = [name for name, claim in self.shared.items.items() if claim.own and PREFIX + name not in wanted]
        for name in stale:
            await self._store.delete(PREFIX + name)

    # this node's

    def publish(self, addresses: Iterable[Address], identity: int, endpoint: int, ports: NamedPorts) -> None:
        """Tell the others of an endpoint's addresses; returns at once."""
        node = f"{self._owner}:{endpoint}"
        for address in addresses:
            value = records.encode(address, self._host, identity, node, ports, self._key)
            self.shared.set(str(address), value)

    def withdraw(self, addresses: Iterable[Address]) -> None:
        """Tell the others that nobody here has these any more."""
        for address in addresses:
            self.shared.remove(str(address))

    async def remove_node(self, node: Node) -> int:
        """Tell the whole cluster that a node's pods are no more; returns how many addresses that was.

        KvstoreError where the store fails; what was done before stays done.
        """
        owner = f"{records.owner(node.cluster, node.name)}:0"
        homes = {node.ipv4, node.ipv6} - {None}
        found = {}
        for name, claim in self.shared.items.items():
            entry = layout.ipcache_entry_of(claim.entry)
            if entry.node in homes and not claim.own:
                value = records.encode(ip_address(name), entry.node, entry.identity, owner, None, entry.key)
                found[PREFIX + name] = value
        await remove_for_all(self._store, found)
        return len(found)

    # the others'

    def _changed(self, changed: Mapping[str, Claim], removed: Mapping[str, Claim]) -> None:
        upserts: dict[bytes, bytes] = {}
        deletes: list[bytes] = []
        key_of = layout.ipcache_host_key
        for name, claim in changed.items():
            try:
                key = key_of(name)
            except OSError:
                continue  # a name that is no address, which nothing can come from
            if claim.own:
                deletes.append(key)
            else:
                upserts[key] = claim.entry
        for name in removed:
            deletes.append(key_of(name))
        touched = self._note(changed, removed)
        self._ipcache.change(Source.KVSTORE, upserts, deletes)
        if len(self._decode) > 2 * len(self.shared.items) + SLACK:
            self._decode.forget_all_but(set(self.shared.items.values()))
        self._on_change(touched)

    def _note(self, changed: Mapping[str, Claim], removed: Mapping[str, Claim]) -> set[int]:
        """Keep the index of named ports; returns the identities whose ports changed."""
        touched: set[int] = set()
        for name in (*changed, *removed) if self._named else ():
            old = self._named.pop(name, None)
            if old is not None:
                self._names_of[old.identity].discard(name)
                touched.add(old.identity)
        for name, claim in changed.items():
            if claim.ports and not claim.own:
                self._named[name] = claim
                self._names_of.setdefault(claim.identity, set()).add(name)
                touched.add(claim.identity)
        return touched

    def ports(self, identity: int) -> NamedPorts:
        """Named ports of an identity's pods on other nodes."""
        claims = {self._named[name] for name in self._names_of.get(identity, ())}
        return merge_ports(_named_ports(ports) for ports in sorted(claim.ports for claim in claims))

    def problem(self) -> str:
        """Why the others are not followed, or nothing."""
        return self.shared.problem


def _named_ports(ports: records.Ports) -> NamedPorts:
    found: dict[str, list[tuple[str, int]]] = {}
    for name, protocol, number in ports:
        found.setdefault(name, []).append((protocol, number))
    return found
