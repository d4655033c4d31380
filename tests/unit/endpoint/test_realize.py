"""From policies to what the kernel has: the verdicts of a node's maps are those that the documentation says.

Repository, realizer, ipcache and prefix identities are the real ones; the kernel is maps in memory that are looked up
as the programs do it. Policies, pods and addresses come and go at random.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, cast

import pytest
from tests.unit.policy.stranger import Address, End, World, addresses_of
from tests.unit.policy.strangers import NODES, WORLD, Stranger

from ciliate.datapath import Datapath, EndpointConfig, PolicyChange, layout
from ciliate.document import Document
from ciliate.endpoint.model import Endpoint
from ciliate.endpoint.realize import Realizer
from ciliate.identity import CLUSTER_MIN, HOST, LOCAL_BASE, Identity
from ciliate.identity import WORLD as WORLD_ID
from ciliate.identity.filter import LabelFilter
from ciliate.identity.local import LocalIdentities
from ciliate.ipcache import Ipcache, Source
from ciliate.labels import LabelSet
from ciliate.policy.mapstate import MapState, PolicyEntry, PolicyKey, Verdict, lookup
from ciliate.policy.model import PROTOCOLS
from ciliate.policy.repository import Repository
from ciliate.policy.world import World as Manifests
from ciliate.workload import Pod, WorkloadRegistry, merge_ports, parse_pod

from .requests import request

SEEDS = range(100)
QUESTIONS = 40


class Kernel:
    """The maps of a node. Everything is written at once and nothing fails."""

    def __init__(self) -> None:
        self.ipcache: dict[bytes, bytes] = {}
        self.places: dict[bytes, bytes] = {}
        self.policies: dict[int, dict[PolicyKey, PolicyEntry]] = {}
        self.enforced: dict[int, tuple[bool, bool]] = {}

    async def add_endpoint(self, config: EndpointConfig, policy: MapState) -> None:
        self.policies[config.id] = dict(policy)
        self.enforced[config.id] = (config.enforce_ingress, config.enforce_egress)

    async def remove_endpoint(self, endpoint: int, addresses: object = ()) -> None:
        del self.policies[endpoint], self.enforced[endpoint]

    async def apply_policies(self, changes: Sequence[PolicyChange]) -> dict[int, OSError]:
        for change in changes:
            self.policies[change.endpoint].update(change.upserts)
            for key in change.deletes:
                del self.policies[change.endpoint][key]
            self.enforced[change.endpoint] = change.enforce
        return {}

    async def change_ipcache(self, upserts: Mapping[bytes, bytes], deletes: Collection[bytes]) -> None:
        _change(self.ipcache, upserts, deletes)

    async def change_places(self, upserts: Mapping[bytes, bytes], deletes: Collection[bytes]) -> None:
        _change(self.places, upserts, deletes)

    def allows(self, endpoint: int, peer: Address, egress: bool, proto: str, port: int) -> bool:
        """What the programs make of a new flow's first packet."""
        if not self.enforced[endpoint][egress]:
            return True
        value = _longest(self.ipcache, peer)
        identity = layout.ipcache_identity(value) if value else WORLD_ID
        value = _longest(self.places, peer) if identity != WORLD_ID and identity < LOCAL_BASE else None
        place = layout.place_entry_of(value) if value else 0
        found = lookup(self.policies[endpoint], int(egress), identity, PROTOCOLS[proto], port, place)
        return found is not None and found.verdict is Verdict.ALLOW


def _change(table: dict[bytes, bytes], upserts: Mapping[bytes, bytes], deletes: Iterable[bytes]) -> None:
    table.update(upserts)
    for key in deletes:
        del table[key]


def _longest(table: Mapping[bytes, bytes], address: Address) -> bytes | None:
    around = [key for key in table if address in layout.ipcache_prefix(key)]
    return table[max(around, key=lambda key: layout.ipcache_prefix(key).prefixlen)] if around else None


class Node:
    """One node's agent as far as policy goes. Pods are here or on another node."""

    def __init__(self, folder: Path) -> None:
        self.kernel, self.repository = Kernel(), Repository()
        self.ipcache, self.workloads = Ipcache(), WorkloadRegistry()
        datapath = cast(Datapath, self.kernel)
        self.realizer = Realizer(datapath, self.repository, self.ipcache, LocalIdentities(), folder)
        self.endpoints: dict[int, Endpoint] = {}
        self.realizer.endpoints = self.endpoints
        self._numbers: dict[LabelSet, int] = {}
        self._pods: dict[int, list[Pod]] = {}
        for text in NODES:
            self.ipcache.upsert(ip_network(text), HOST, Source.LOCAL)

    async def add(self, number: int, manifest: dict[str, Any], here: bool) -> None:
        """A pod comes; to policy of this node it is its identity, its addresses and its named ports."""
        self.workloads.upsert([manifest])
        pod = parse_pod(manifest, 0)
        labels = self.workloads.identity_labels(pod.namespace, pod.name, {})
        assert labels is not None
        labels = LabelFilter().apply(labels)
        identity = self._numbers.setdefault(labels, CLUSTER_MIN + len(self._numbers))
        self.repository.upsert_identities([Identity(identity, labels)])
        self._pods.setdefault(identity, []).append(pod)
        self.repository.set_peer_ports(identity, merge_ports(item.ports for item in self._pods[identity]))
        for address in addresses_of(manifest):
            self.ipcache.upsert(ip_network(str(address)), identity, Source.LOCAL if here else Source.KVSTORE)
        if here:
            endpoint = self.endpoints[number] = Endpoint(number, request(container_id=str(number)), labels)
            endpoint.identity, endpoint.named_ports = identity, pod.ports
            await self.realizer.attach(endpoint)
        else:
            await self.realizer.write_addresses()

    async def remove(self, number: int, manifest: dict[str, Any]) -> None:
        """A pod goes, and its addresses with it."""
        here = number in self.endpoints
        for address in addresses_of(manifest):
            self.ipcache.delete(ip_network(str(address)), Source.LOCAL if here else Source.KVSTORE)
        if here:
            await self.realizer.detach(self.endpoints.pop(number))
        else:
            await self.realizer.write_addresses()

    async def put(self, policy: dict[str, Any]) -> None:
        self.repository.import_documents([Document(policy)])
        await self.realizer.realize()

    async def delete(self, policy: dict[str, Any]) -> None:
        refs = [item.ref for item in self.repository.objects() if item.name == policy["metadata"]["name"]]
        self.repository.delete(refs)
        await self.realizer.realize()


@pytest.mark.parametrize("seed", SEEDS)
async def test_maps_of_a_node_say_what_the_documentation_says(seed: int, tmp_path: Path) -> None:
    stranger = Stranger(seed)
    manifests = stranger.cluster()
    pods = {number: item for number, item in enumerate(manifests) if item["kind"] == "Pod" and "status" in item}
    pods = {number: item for number, item in pods.items() if not item["spec"].get("hostNetwork")}
    _same_ports(pods.values())
    node = Node(tmp_path)
    node.workloads.upsert([item for item in manifests if item["kind"] == "Namespace"])
    node.repository.set_services(Manifests(map(Document, manifests)).external_services())
    others = [item for item in manifests if item["kind"] not in ("Pod", "NetworkPolicy", "CiliumNetworkPolicy")]
    policies = [item for item in manifests if item["kind"].endswith("NetworkPolicy")]
    for number, pod in pods.items():
        await node.add(number, pod, stranger.random() < 0.6)
    steps = [("put", policy) for policy in policies]
    steps += [(stranger.choice(["delete", "swap"]), policy) for policy in stranger.sample(policies, len(policies))]
    present: list[dict[str, Any]] = []
    for step, policy in steps:
        if step == "put":
            await node.put(policy)
            present.append(policy)
        elif step == "delete":
            await node.delete(policy)
            present.remove(policy)
        elif len(pods) > 1:
            await _swap(node, pods, stranger)
        _compare(node, World([*others, *present]), pods, stranger)
    if not present:
        assert node.kernel.places == {}


async def _swap(node: Node, pods: dict[int, dict[str, Any]], chance: random.Random) -> None:
    """Two pods go, and come again with each other's addresses."""
    one, two = chance.sample(sorted(pods), 2)
    here = {number: number in node.endpoints for number in (one, two)}
    for number in (one, two):
        await node.remove(number, pods[number])
    pods[one]["status"], pods[two]["status"] = pods[two]["status"], pods[one]["status"]
    for number in (one, two):
        await node.add(number, pods[number], here[number])


def _same_ports(pods: Iterable[dict[str, Any]]) -> None:
    """Pods of one identity name their ports alike; docs/policy.md says what holds where they do not."""
    known: dict[str, Any] = {}
    for pod in pods:
        key = repr((pod["metadata"]["namespace"], pod["metadata"]["labels"], pod["spec"].get("serviceAccountName")))
        pod["spec"]["containers"] = known.setdefault(key, pod["spec"]["containers"])


def _compare(node: Node, world: World, pods: Mapping[int, dict[str, Any]], chance: Stranger) -> None:
    peers = [world.pod(pod, address) for pod in pods.values() for address in addresses_of(pod)]
    peers += [End("host", ip_address(text), labels={("reserved", "host"): ""}) for text in NODES]
    peers += [End("world", ip_address(text), labels={("reserved", "world"): ""}) for text in WORLD]
    own = [(number, address) for number in node.endpoints for address in addresses_of(pods[number])]
    for _ in range(QUESTIONS if own else 0):
        (number, address), peer = chance.choice(own), chance.choice(peers)
        assert peer.address is not None
        if peer.address == address or peer.address.version != address.version:
            continue
        egress, this = chance.random() < 0.5, world.pod(pods[number], address)
        proto, port = chance.packet((peer if egress else this).ports)
        expected = world.allows(this, peer, egress, proto, port)
        found = node.kernel.allows(number, peer.address, egress, proto, port)
        assert found == expected, (number, address, peer, egress, proto, port)


BLOCKS = [f"198.51.100.{number}/32" for number in range(0, 100, 2)]


def _blocks(name: str, namespace: str, blocks: list[str]) -> dict[str, Any]:
    head = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    peers = [{"ipBlock": {"cidr": block}} for block in blocks]
    spec = {"podSelector": {}, "ingress": [{"from": peers}]}
    return {**head, "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def _pod(name: str, namespace: str, address: str) -> dict[str, Any]:
    meta = {"name": name, "namespace": namespace, "labels": {"app": name}}
    return {"kind": "Pod", "metadata": meta, "spec": {}, "status": {"podIP": address}}


def _local(node: Node) -> set[str]:
    """Prefixes that have an identity of their own in the kernel."""
    found = {key for key, value in node.kernel.ipcache.items() if layout.ipcache_identity(value) >= LOCAL_BASE}
    return {str(layout.ipcache_prefix(key)) for key in found}


async def test_a_policy_takes_prefixes_while_it_selects_an_endpoint(tmp_path: Path) -> None:
    node = Node(tmp_path)
    await node.add(1, _pod("web", "shop", "10.0.0.1"), here=True)
    await node.put(_blocks("open", "shop", ["0.0.0.0/0"]))
    before = len(node.kernel.policies[1])
    await node.put(_blocks("many", "other", BLOCKS))
    assert _local(node) == {"0.0.0.0/0"} and len(node.kernel.policies[1]) == before
    other = _pod("other", "other", "10.0.0.2")
    await node.add(2, other, here=True)
    assert _local(node) == {"0.0.0.0/0", *BLOCKS}
    await node.remove(2, other)
    assert _local(node) == {"0.0.0.0/0"} and len(node.kernel.policies[1]) == before
    assert set(map(str, map(layout.ipcache_prefix, node.kernel.places))) == {"0.0.0.0/0"}
