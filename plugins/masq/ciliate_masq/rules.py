"""The rules of engine `iptables` as text, in the form in which `iptables -S` shows them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ciliate.masquerade import MAPPED_PORTS, Address, MasqueradedFlow, MasqueradePlan
from ciliate.ports import PortRange, without

RANGES = 4
"""Ranges of ports within which a flow's port stays as it is; where services are scattered the widest."""
PROTOCOLS = {1: "icmp", 58: "ipv6-icmp", 132: "sctp"}
JUMP_COMMENT = "ciliate: masquerade pods"


def chain_name(instance: str) -> str:
    """The chain of an agent; names have at most 28 letters."""
    return "CILIATE-MASQ" if instance == "default" else f"CILIATE-MASQ-{instance[:15]}"


def jump(chain: str) -> str:
    """The rule that leads into the chain."""
    return f'-A POSTROUTING -m comment --comment "{JUMP_COMMENT}" -j {chain}'


def chain_rules(
    plan: MasqueradePlan, version: int, chain: str, known: str = "", spared: Sequence[MasqueradedFlow] = ()
) -> list[str]:
    """The chain's rules for one family.

    ``known``: the pinned program that knows the flows of another engine; ``spared``: flows of others beside those.
    """
    direct = [prefix for prefix in plan.direct if prefix.version == version]
    sources = [prefix for prefix in plan.sources if prefix.version == version]
    targets = [
        (device, address)
        for device, addresses in plan.devices.items()
        for address in addresses
        if address.version == version
    ]
    if not sources or not targets:
        return []
    rules = [f"-A {chain} -d {prefix} -j RETURN" for prefix in direct]
    if known:
        rules.append(f"-A {chain} -m bpf --object-pinned {known} -j RETURN")
    rules += [spared_rule(chain, flow) for flow in spared if flow.source.version == version]
    usable = sorted(without(MAPPED_PORTS, plan.reserved), key=lambda item: item[0] - item[1])[:RANGES]
    for source in sources:
        for device, address in targets:
            rules += translations(f"-A {chain} -s {source} -o {device}", address, usable)
    return rules


def spared_rule(chain: str, flow: MasqueradedFlow) -> str:
    """Leaves a flow alone that another engine serves; of protocols without ports all of the pod's to that remote."""
    bits = 32 if flow.source.version == 4 else 128
    match = f"-A {chain} -s {flow.source}/{bits} -d {flow.remote}/{bits}"
    name = {6: "tcp", 17: "udp"}.get(flow.protocol)
    if name:
        return f"{match} -p {name} -m {name} --sport {flow.source_port} --dport {flow.remote_port} -j RETURN"
    return f"{match} -p {PROTOCOLS.get(flow.protocol, flow.protocol)} -j RETURN"


def translations(match: str, address: Address, usable: list[PortRange]) -> list[str]:
    """The rules for one source and device. ``usable``: ranges of ports that mappings may have, the widest first.

    A port within one of them stays where it is free, or becomes another one of that range; every other port becomes one
    of the widest. The kernel can be told of ports of three protocols only; the rest has none, or identifiers.
    """
    host = address if address.version == 4 else f"[{address}]"
    rules = [
        f"{match} -p {protocol} -m {protocol} --sport {first}:{last} -j SNAT --to-source {host}:{first}-{last}"
        for protocol in ("tcp", "udp")
        for first, last in usable
    ]
    for first, last in usable[:1]:
        rules += [f"{match} -p {name} -j SNAT --to-source {host}:{first}-{last}" for name in ("tcp", "udp", "sctp")]
    return [*rules, f"{match} -j SNAT --to-source {address}"]


def drained_rules(chain: str) -> list[str]:
    """The chain of an engine that begins nothing new. The kernel tracks, and so translates, flows only while there is a
    rule that needs it to; this one does nothing else.
    """
    return [f"-A {chain} -m conntrack --ctstate SNAT -j RETURN"]


def restore_input(chain: str, rules: list[str], with_jump: bool) -> str:
    """What `iptables-restore --noflush` takes: the chain becomes exactly these rules, in one step."""
    lines = ["*nat", f":{chain} - [0:0]", *rules]
    if with_jump:
        lines.append(jump(chain))
    return "\n".join([*lines, "COMMIT", ""])
