"""Masquerade `bpf`: programs on the node's own devices and a table of mappings; the kernel's conntrack has no part."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import MasqueradeProvider, PluginContext, hookimpl


def _create(context: PluginContext) -> Any:
    from ciliate.datapath import Datapath
    from ciliate.datapath.nodeprograms import NodePrograms
    from ciliate_masq.bpf_engine import BpfMasquerade

    return BpfMasquerade(context.services.get(Datapath), context.services.get(NodePrograms))


@hookimpl
def ciliate_register_masquerade() -> MasqueradeProvider:
    """One provider."""
    return MasqueradeProvider(
        name="bpf",
        summary="Mappings in a BPF map, made and used by programs on the node's devices",
        factory=_create,
    )
