"""Addresses of pods across the cluster: this node's are told to the others, theirs become claims of the ipcache.

Addresses of the other nodes themselves are not among them: they are ``world`` here, or what a policy's prefix makes of
them, in every routing mode. ``host`` means this node alone, and a node that masquerades its pods lends nobody an
identity that policies trust (field lesson CVE-2025-30163).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from ipaddress import ip_address, ip_network

from ciliate.backoff import ClusterSize
from ciliate.datapath import layout
from ciliate.ipcache import Ipcache, Source
from ciliate.kvstore import Kvstore
from ciliate.kvstore.local_keys import LocalKeys
from ciliate.kvstore.shared import SharedStore
from ciliate.node import records
from ciliate.node.model import Node
from ciliate.node.ranges import homes, pod_ranges, unusable
from ciliate.node.records import Address, Claim
from ciliate.node.registry import NodeRegistry
from ciliate.node.removal import remove_for_all
from ciliate.node.withdrawals import Withdrawals
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
        nodes: NodeRegistry,
        withdrawals: Withdrawals | None = None,
    ) -> None:
        """``nodes`` tells which ranges the nodes have: what they say of addresses is held against that."""
        self._store, self._keys = store, keys
        self._host = own.ipv4 or own.ipv6
        self._key = own.key
        self._owner = records.owner(own.cluster, own.name)
        self._ipcache = ipcache
        self._on_change = on_change
        self._withdrawals = withdrawals
        self.on_gone: Callable[[Collection[Address]], None] = lambda addresses: None
        """Called with addresses that another node's pod had, and has no more."""
        self._decode = records.Decoder(self._owner)
        self._named: dict[str, Claim] = {}
        self._names_of: dict[int, set[str]] = {}
        self._nodes = nodes
        self._known: dict[str, Node] = {}
        self._home_addresses: set[Address] | None = None
        self._bounds: dict[str, tuple[Node, tuple[tuple[bytes, bytes], ...]]] = {}
        self._open: dict[str, dict[str, Claim]] = {}
        """Claims by node, then address, that are not of the node's own ranges: they change with the nodes."""
        self.shared: SharedStore[Claim] = SharedStore(store, keys, PREFIX, self._decode, self._changed, cluster=cluster)

    async def start(self) -> None:
        """Begin to follow; returns before the store has answered."""
        self._nodes.subscribe(self._nodes_changed)
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
        if self._withdrawals is not None:
            self._withdrawals.settled()

    # this node's

    def publish(self, addresses: Iterable[Address], identity: int, endpoint: int, ports: NamedPorts) -> None:
        """Tell the others of an endpoint's addresses; returns at once."""
        node = f"{self._owner}:{endpoint}"
        if self._withdrawals is not None:
            self._withdrawals.take(addresses)
        for address in addresses:
            value = records.encode(address, self._host, identity, node, ports, self._key)
            self.shared.set(str(address), value)

    def withdraw(self, addresses: Iterable[Address]) -> None:
        """Tell the others that nobody here has these any more."""
        if self._withdrawals is not None:
            self._withdrawals.leave(addresses)
            return
        for address in addresses:
            self.shared.remove(str(address))

    async def remove_node(self, node: Node) -> int:
        """Tell the whole cluster that a node's pods are no more; returns how many addresses that was.

        KvstoreError where the store fails; what was done before stays done.
        """
        owner = f"{records.owner(node.cluster, node.name)}:0"
        where = {node.ipv4, node.ipv6} - {None}
        found = {}
        for name, claim in self.shared.items.items():
            entry = layout.ipcache_entry_of(claim.entry)
            if (claim.node == node.id or (not claim.node and entry.node in where)) and not claim.own:
                value = records.encode(ip_address(name), entry.node, entry.identity, owner, None, entry.key)
                found[PREFIX + name] = value
        await remove_for_all(self._store, found)
        return len(found)

    # the others'

    def _changed(self, changed: Mapping[str, Claim], removed: Mapping[str, Claim]) -> None:
        upserts: dict[bytes, bytes] = {}
        deletes: list[bytes] = []
        admitted: dict[str, Claim] = {}
        key_of = layout.ipcache_host_key
        for name, claim in changed.items():
            try:
                key = key_of(name)
            except OSError:
                continue  # a name that is no address, which nothing can come from
            self._close(name, claim.node)
            entry = b"" if claim.own else self._entry(name, key, claim)
            if entry:
                upserts[key] = entry
                admitted[name] = claim
            elif entry is not None:
                deletes.append(key)
        for name, claim in removed.items():
            self._close(name, claim.node)
            deletes.append(key_of(name))
        refused = {name: changed[name] for name in changed.keys() - admitted.keys()}
        touched = self._note(admitted, {**removed, **refused})
        gone = self._gone(upserts, removed)
        self._ipcache.change(Source.KVSTORE, upserts, deletes)
        if len(self._decode) > 2 * len(self.shared.items) + SLACK:
            self._decode.forget_all_but(set(self.shared.items.values()))
        self._on_change(touched)
        if gone:
            self.on_gone(gone)

    def _gone(self, upserts: Mapping[bytes, bytes], removed: Mapping[str, Claim]) -> list[Address]:
        """Addresses without a holder, or with one at another node.

        Another identity at the same node is a pod's that was given other labels: an address that is used again was
        withdrawn before.
        """
        gone = [ip_address(name) for name, claim in removed.items() if not claim.own]
        known = self._ipcache.claims(Source.KVSTORE)
        for key, entry in upserts.items():
            old = known.get(key)
            if old is not None and old != entry:
                nodes = {layout.ipcache_entry_of(value).node for value in (old, entry)}
                gone += [layout.ipcache_prefix(key).network_address] if len(nodes) > 1 else []
        return gone

    def _entry(self, name: str, key: bytes, claim: Claim) -> bytes | None:
        """What a claim makes of its address in the ipcache: nothing (empty) where the node may not speak of it.

        None where it is not known yet: what is there stays. Pods of chained plugins have addresses that no node's range
        has; they are known so, and nothing is led to the node that claims them.
        """
        node = self._nodes.others.get(claim.node)
        if node is None:
            self._open.setdefault(claim.node, {})[name] = claim
            # a node that comes back may tell of its pods before itself: what says nothing new changes nothing
            same = self._ipcache.claims(Source.KVSTORE).get(key) == claim.entry
            return None if same or not self._nodes.complete else b""
        fitting = claim.host is None or claim.host in (node.ipv4, node.ipv6)
        if fitting and any(low <= key <= high for low, high in self._bounds_of(node)):
            return claim.entry
        address = ip_address(name)
        self._open.setdefault(claim.node, {})[name] = claim
        if not fitting or unusable(address) or address.is_link_local:
            return b""
        if address in self._homes() or self._nodes.whose(ip_network(address)):
            return b""
        return layout.ipcache_entry(claim.identity, None, 0)

    def _bounds_of(self, node: Node) -> tuple[tuple[bytes, bytes], ...]:
        """The first and the last key of each of a node's ranges: a hundred thousand claims are compared with them."""
        known = self._bounds.get(node.id)
        if known is None or known[0] is not node:
            key_of = layout.ipcache_host_key
            ends = ((str(item.network_address), str(item.broadcast_address)) for item in pod_ranges(node))
            known = self._bounds[node.id] = (node, tuple((key_of(low), key_of(high)) for low, high in ends))
        return known[1]

    def _homes(self) -> set[Address]:
        if self._home_addresses is None:
            everybody = (self._nodes.own, *self._nodes.others.values())
            self._home_addresses = {home for node in everybody for home in homes(node)}
        return self._home_addresses

    def _close(self, name: str, node: str) -> None:
        found = self._open.get(node)
        if found is not None and found.pop(name, None) is not None and not found:
            del self._open[node]

    def _nodes_changed(self, came: list[Node], went: list[Node]) -> None:
        """Claims are held against what the nodes have now. Those of a node that went stay until they are withdrawn."""
        self._home_addresses = None
        again: dict[str, Claim] = {}
        moved = set()
        for node in went:
            self._bounds.pop(node.id, None)
        for node in came:
            old = self._known.get(node.id)
            self._known[node.id] = node
            if old is not None and (homes(old), pod_ranges(old)) != (homes(node), pod_ranges(node)):
                moved.add(node.id)
            again.update(self._open.get(node.id, {}))
        for number, claims in self._open.items():
            # few: those of nodes that are known, and of addresses outside of their ranges
            if number in self._known:
                again.update(claims)
        if moved:
            again.update((name, claim) for name, claim in self.shared.items.items() if claim.node in moved)
        if again:
            self._changed(again, {})

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
