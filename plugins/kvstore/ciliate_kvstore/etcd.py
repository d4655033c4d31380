"""Store `etcd`: the public etcd v3 protocol over grpc.aio."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import KvstoreProvider, PluginContext, PluginError, hookimpl
from ciliate_kvstore.etcdv3.settings import Options, settings_of


def _create(context: PluginContext) -> Any:
    options = context.options or Options()
    settings = settings_of(options)
    try:
        from ciliate_kvstore.etcdv3.connection import Connection
        from ciliate_kvstore.etcdv3.store import EtcdStore
    except ImportError as error:
        raise PluginError(f"{error.name or error} is missing: pip install 'ciliate[etcd]'") from error
    return EtcdStore(settings, Connection(settings, renew=lambda: settings_of(options)))


@hookimpl
def ciliate_register_kvstore() -> KvstoreProvider:
    """One provider."""
    return KvstoreProvider(
        name="etcd",
        summary="etcd, for clusters of any size",
        factory=_create,
        options=Options,
        requires="grpc",
        extra="etcd",
    )
