"""Address allocation `host-scope`: this node's own ranges."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import IpamProvider, PluginContext, hookimpl


def _create(context: PluginContext) -> Any:
    from ciliate_ipam.allocator import HostScope

    config = context.config
    ranges = [config.ipv4_range] if config.enable_ipv4 else []
    return HostScope(
        [*ranges, *([config.ipv6_range] if config.enable_ipv6 else [])], context.state_dir / "ipam-host-scope.json"
    )


@hookimpl
def ciliate_register_ipam() -> IpamProvider:
    """One provider."""
    return IpamProvider(name="host-scope", summary="Ranges of this node, kept in a file", factory=_create)
