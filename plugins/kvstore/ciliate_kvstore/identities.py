"""Identity backend `kvstore`: numbers agreed on through the key-value store."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import IdentityProvider, PluginContext, hookimpl


def _create(context: PluginContext) -> Any:
    from ciliate.kvstore import Kvstore
    from ciliate_kvstore.identity_backend import KvstoreIdentities

    return KvstoreIdentities(context.services.get(Kvstore), context.config.node_name)  # type: ignore[type-abstract]


@hookimpl
def ciliate_register_identity() -> IdentityProvider:
    """One provider."""
    return IdentityProvider(name="kvstore", summary="Identities agreed on through the key-value store", factory=_create)
