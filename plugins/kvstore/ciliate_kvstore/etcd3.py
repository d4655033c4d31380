"""Store `etcd3`: the same etcd by the library `cslab-etcd3` (``import etcd3``); the keys are those of store `etcd`."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import KvstoreProvider, PluginContext, PluginError, hookimpl
from ciliate_kvstore.etcdv3.settings import Options, settings_of


def _create(context: PluginContext) -> Any:
    options = context.options or Options()
    settings = settings_of(options, "etcd3")
    try:
        from ciliate_kvstore.etcd3lib.connection import Etcd3Connection
        from ciliate_kvstore.etcdv3.store import EtcdStore
    except ImportError as error:
        raise PluginError(f"{error.name or error} is missing: pip install 'ciliate[etcd3]'") from error
    return EtcdStore(settings, Etcd3Connection(settings, renew=lambda: settings_of(options, "etcd3")))


@hookimpl
def ciliate_register_kvstore() -> KvstoreProvider:
    """One provider."""
    return KvstoreProvider(
        name="etcd3",
        summary="etcd by the library cslab-etcd3, for those who want that client",
        factory=_create,
        options=Options,
        requires="etcd3",
        extra="etcd3",
    )
