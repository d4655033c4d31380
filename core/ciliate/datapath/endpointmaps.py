"""Endpoints in the maps: the entry of each, its addresses, its policy, in an order that never opens what is denied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv4Address, IPv6Address

import msgspec

from ciliate.datapath import layout, repair
from ciliate.datapath.bpf import Map
from ciliate.datapath.model import EndpointConfig
from ciliate.datapath.policymap import Enforcement, PolicyMap
from ciliate.policy.mapstate import MapState, PolicyEntry, PolicyKey


class EndpointMaps:
    """What the maps say of endpoints. Every method works on the kernel and may raise OSError."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        self._maps = maps
        self._entries = maps["ciliate_ep"]
        self._addresses = maps["ciliate_lxc"]
        self._links = maps["ciliate_link"]
        self.policy = PolicyMap(maps["ciliate_policy"])
        self.policy.adopt()

    def known(self, config: EndpointConfig) -> EndpointConfig | None:
        """``config`` with what the kernel enforces for this endpoint now, or None where it has no valid entry."""
        data = self._entries.lookup(_key(config.id))
        fields = layout.EP_CONFIG.unpack(data) if data else (0,) * 11
        flags, epoch = fields[7], fields[10]
        if not flags & layout.EP_VALID:
            return None
        self.policy.adopt_epoch(config.id, epoch)
        return msgspec.structs.replace(
            config,
            enforce_ingress=bool(flags & layout.EP_ENFORCE_INGRESS),
            enforce_egress=bool(flags & layout.EP_ENFORCE_EGRESS),
        )

    def left_behind(self, endpoint: int) -> EndpointConfig | None:
        """An endpoint as the kernel has it, without its device's name; None where it has no valid entry."""
        data = self._entries.lookup(_key(endpoint)) or bytes(layout.EP_CONFIG.size)
        ifindex, identity, ipv4, ipv6, mac, node_mac, number, flags, *_ = layout.EP_CONFIG.unpack(data)
        if not flags & layout.EP_VALID:
            return None
        return EndpointConfig(
            id=number,
            ifindex=ifindex,
            ifname="",
            identity=identity,
            mac=mac,
            node_mac=node_mac,
            ipv4=IPv4Address(ipv4) if any(ipv4) else None,
            ipv6=IPv6Address(ipv6) if any(ipv6) else None,
        )

    def sync(self, config: EndpointConfig, desired: MapState, known: EndpointConfig | None) -> None:
        """Make policy and entry as ``config`` and ``desired`` say. known: as the kernel has them, where it does."""
        upserts, deletes = self.policy.difference(config.id, desired)
        if known is not None:
            self.change(config, upserts, deletes, known)
            return
        # nothing looks at an endpoint that is not valid, so its entries come first and its own entry last
        wanted = (config.enforce_ingress, config.enforce_egress)
        final: list[Enforcement] = []
        self.policy.apply(config.id, upserts, deletes, wanted, wanted, final.append)
        self._write(config, final[-1])

    def change(
        self,
        config: EndpointConfig,
        upserts: Mapping[PolicyKey, PolicyEntry],
        deletes: Collection[PolicyKey],
        known: EndpointConfig,
    ) -> None:
        """Change an endpoint's policy by a delta, in the order that ``policymap`` describes."""
        wanted = (config.enforce_ingress, config.enforce_egress)
        old = (known.enforce_ingress, known.enforce_egress)
        self.policy.apply(config.id, upserts, deletes, wanted, old, lambda state: self._write(config, state))

    def write(self, config: EndpointConfig) -> None:
        """The endpoint's own entry and its addresses, with the policy that stands."""
        self.write_link(config)
        self._entries.update(_key(config.id), self.entry_of(config))
        self.write_addresses(config)

    def write_link(self, config: EndpointConfig) -> None:
        """What it may say of itself on a link of somebody else; on one of ours it has no neighbours."""
        key = _key(config.id)
        present = self._links.lookup(key)
        if not config.external:
            if present is not None:
                self._links.delete(key)
        elif not repair.is_link(present, config):
            self._links.update(key, layout.LINK_ENTRY.pack(0, config.interface_id))

    def write_addresses(self, config: EndpointConfig) -> None:
        """What delivers to it, except where its packets take the way through the node's stack."""
        if config.through_stack:
            return
        value = layout.ENDPOINT_INFO.pack(config.ifindex, config.identity, config.id, 0, config.mac, config.node_mac)
        for address in config.addresses:
            self._addresses.update(layout.endpoint_key(address), value)

    def remove(self, endpoint: int, config: EndpointConfig | None) -> None:
        """No delivery to it and nothing from it; ``config`` where its addresses are known."""
        for address in config.addresses if config else []:
            key = layout.endpoint_key(address)
            value = self._addresses.lookup(key)
            if value is not None and layout.ENDPOINT_INFO.unpack(value)[2] == endpoint:
                self._addresses.delete(key)
        self._entries.update(_key(endpoint), bytes(layout.EP_CONFIG.size))
        self._links.delete(_key(endpoint))
        self.policy.remove(endpoint)

    def forget_unknown(self, known: Collection[int]) -> list[int]:
        """Remove endpoints that are not ``known``; returns their ids."""
        found = set(repair.forget_unknown(self._maps, frozenset(known)))
        for endpoint in self.policy.endpoints() - set(known):
            self.policy.remove(endpoint)
            found.add(endpoint)
        return sorted(found)

    def entry_of(self, config: EndpointConfig) -> bytes:
        """The endpoint's entry as it should be, with the shapes of the policy that stands."""
        shapes, epoch = self.policy.shape(config.id), self.policy.epoch(config.id)
        return _entry(config, Enforcement(config.enforce_ingress, config.enforce_egress, *shapes, epoch))

    def _write(self, config: EndpointConfig, policy: Enforcement) -> None:
        self._entries.update(_key(config.id), _entry(config, policy))


def _key(endpoint: int) -> bytes:
    return endpoint.to_bytes(4, "little")


def _entry(config: EndpointConfig, policy: Enforcement) -> bytes:
    flags = layout.EP_VALID | config.monitor << layout.EP_MONITOR_SHIFT
    flags |= layout.EP_STACK if config.through_stack and not config.external else 0
    flags |= layout.EP_ENFORCE_INGRESS if policy.ingress else 0
    flags |= layout.EP_ENFORCE_EGRESS if policy.egress else 0
    return layout.EP_CONFIG.pack(
        config.ifindex,
        config.identity,
        config.ipv4.packed if config.ipv4 else b"",
        config.ipv6.packed if config.ipv6 else b"",
        config.mac,
        config.node_mac,
        config.id,
        flags,
        policy.ingress_shape,
        policy.egress_shape,
        policy.epoch,
    )
