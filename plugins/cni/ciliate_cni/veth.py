"""Chaining modes ``none`` and ``portmap``: Ciliate makes the pod's device itself, with an address per family."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ciliate.plugin import ChainingProvider, PluginContext, hookimpl

if TYPE_CHECKING:
    from ciliate_cni.veth_mode import VethMode


def _create(name: str, context: PluginContext) -> VethMode:
    from ciliate_cni.veth_mode import VethMode

    return VethMode(context, name)


@hookimpl
def ciliate_register_chaining() -> list[ChainingProvider]:
    """Offer ``none``, which a configuration without ``chaining-mode`` means, and ``portmap``."""
    return [
        ChainingProvider(
            name="none",
            summary="A veth pair per pod, packets between pods by the short way",
            factory=functools.partial(_create, "none"),
        ),
        ChainingProvider(
            name="portmap",
            summary="As none, with packets between pods through the node's stack, where port mappings are undone",
            factory=functools.partial(_create, "portmap"),
        ),
    ]
