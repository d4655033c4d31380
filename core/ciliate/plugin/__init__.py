"""The public API for plugin authors. See `docs/writing-a-plugin.md`; `specs` shows a complete plugin."""

from ciliate.plugin.handle import Handle
from ciliate.plugin.hooks import Hooks
from ciliate.plugin.loading import GROUP, FoundPlugin, PluginSettings
from ciliate.plugin.manager import LoadedProvider, PluginManager
from ciliate.plugin.specs import hookimpl, hookspec
from ciliate.plugin.types import (
    KINDS,
    ChainingProvider,
    CommandProvider,
    FeatureProvider,
    IdentityProvider,
    IpamProvider,
    KvstoreProvider,
    LoaderProvider,
    MasqueradeProvider,
    MetricsProvider,
    PluginContext,
    PluginError,
    Provider,
    StatusProvider,
    UnknownProviderError,
)

__all__ = [
    "GROUP",
    "KINDS",
    "ChainingProvider",
    "CommandProvider",
    "FeatureProvider",
    "FoundPlugin",
    "Handle",
    "Hooks",
    "IdentityProvider",
    "IpamProvider",
    "KvstoreProvider",
    "LoadedProvider",
    "LoaderProvider",
    "MasqueradeProvider",
    "MetricsProvider",
    "PluginContext",
    "PluginError",
    "PluginManager",
    "PluginSettings",
    "Provider",
    "StatusProvider",
    "UnknownProviderError",
    "hookimpl",
    "hookspec",
]
