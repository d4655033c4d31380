"""Chaining modes after another plugin: policy only, on the veth device that it made."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ciliate.plugin import ChainingProvider, PluginContext, hookimpl

if TYPE_CHECKING:
    from ciliate_cni.chained_mode import ChainedMode


def _create(name: str, context: PluginContext) -> ChainedMode:
    from ciliate_cni.chained_mode import ChainedMode

    return ChainedMode(context, name)


@hookimpl
def ciliate_register_chaining() -> list[ChainingProvider]:
    """One behaviour under the names that people look for: all of these make a veth pair and give it addresses."""
    return [
        ChainingProvider(
            name="generic-veth",
            summary="Policy on the veth device of the plugin before (bridge, ptp, ...)",
            factory=functools.partial(_create, "generic-veth"),
        ),
        ChainingProvider(
            name="flannel",
            summary="Policy on flannel's veth device, which a bridge connects",
            factory=functools.partial(_create, "flannel"),
        ),
        ChainingProvider(
            name="aws-vpc",
            summary="Policy on the veth device of the AWS VPC plugin",
            factory=functools.partial(_create, "aws-vpc"),
        ),
    ]
