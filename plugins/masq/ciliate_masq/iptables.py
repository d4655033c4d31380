"""Masquerade `iptables`: rules in chains of its own; the kernel's conntrack has the mappings."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import MasqueradeProvider, PluginContext, hookimpl


def _create(context: PluginContext) -> Any:
    from ciliate.datapath import Datapath
    from ciliate.datapath.nodeprograms import NodePrograms
    from ciliate_masq.iptables_engine import IptablesMasquerade

    datapath, programs = context.services.get(Datapath), context.services.get(NodePrograms)
    config = context.config
    families = [version for version, on in ((4, config.enable_ipv4), (6, config.enable_ipv6)) if on]
    return IptablesMasquerade(datapath, programs, config.instance, families)


@hookimpl
def ciliate_register_masquerade() -> MasqueradeProvider:
    """One provider."""
    return MasqueradeProvider(
        name="iptables",
        summary="MASQUERADE and SNAT rules of iptables in chains of our own",
        factory=_create,
    )
