"""Chaining mode ``none``: Ciliate makes the pod's device itself, a veth pair with one address per family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ciliate.plugin import ChainingProvider, PluginContext, hookimpl

if TYPE_CHECKING:
    from ciliate_cni.veth_mode import VethMode


def _create(context: PluginContext) -> VethMode:
    from ciliate_cni.veth_mode import VethMode

    return VethMode(context)


@hookimpl
def ciliate_register_chaining() -> ChainingProvider:
    """Offer the mode under the name that a configuration without ``chaining-mode`` means."""
    return ChainingProvider(name="none", summary="A veth pair per pod, no other plugin in the chain", factory=_create)
