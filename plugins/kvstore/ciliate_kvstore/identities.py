"""Identity backend `kvstore`: numbers agreed on through the key-value store."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import IdentityProvider, PluginContext, hookimpl


def _create(context: PluginContext) -> Any:
    from ciliate.backoff import ClusterSize
    from ciliate.kvstore import Kvstore
    from ciliate.kvstore.local_keys import LocalKeys
    from ciliate_kvstore.identity_backend import KvstoreIdentities

    services = context.services
    store = services.get(Kvstore)  # type: ignore[type-abstract]
    cluster = services.get(ClusterSize) if ClusterSize in services else None
    if LocalKeys not in services:
        return KvstoreIdentities(store, context.config.node_name, cluster=cluster)
    # an agent: it has keys in the store, and comes up without it
    cache, local = context.state_dir / "identities.json", services.get(LocalKeys)
    return KvstoreIdentities(store, context.config.node_name, local=local, cache=cache, cluster=cluster)


@hookimpl
def ciliate_register_identity() -> IdentityProvider:
    """One provider."""
    return IdentityProvider(name="kvstore", summary="Identities agreed on through the key-value store", factory=_create)
