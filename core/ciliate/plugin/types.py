"""Provider records: what a `ciliate_register_<kind>` hook returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ciliate.config import AgentConfig
    from ciliate.services import Services


class PluginError(Exception):
    """A plugin is missing, ambiguous, broken, or its provider failed; the text names plugin, kind and remedy."""


class UnknownProviderError(PluginError):
    """Somebody asked for a kind or a provider that there is not; the text lists what there is."""


@dataclass(frozen=True)
class PluginContext:
    """What a factory gets: configuration, its own decoded options, directories, core's services."""

    config: AgentConfig
    options: Any
    state_dir: Path
    run_dir: Path
    services: Services


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One implementation of one kind.

    ``factory`` makes the instance; heavy imports belong inside it. ``options`` is a msgspec Struct type for the
    section ``plugins.<name>`` of the configuration, or None where the provider has no options. An instance may have
    ``async start()`` and ``async stop()``; the core awaits them in order and in reverse order.

    ``requires`` names the module that the factory needs and that may be missing, ``extra`` the extra of the plugin's
    distribution that installs it: both are told where somebody lists or chooses the provider. Literals, please.
    """

    kind: ClassVar[str] = ""
    name: str
    summary: str
    factory: Callable[[PluginContext], Any]
    options: type[Any] | None = None
    requires: str = ""
    extra: str = ""


class KvstoreProvider(Provider):
    """A key-value store (`ciliate.kvstore.Kvstore`)."""

    kind = "kvstore"


class IdentityProvider(Provider):
    """An identity backend (`ciliate.identity.backend.IdentityBackend`)."""

    kind = "identity"


class IpamProvider(Provider):
    """Address allocation (`ciliate.ipam.Ipam`)."""

    kind = "ipam"


class ChainingProvider(Provider):
    """A CNI chaining mode (`ciliate.cni.modes.ChainingMode`)."""

    kind = "chaining"


class MasqueradeProvider(Provider):
    """Masquerading of pod traffic that leaves the cluster."""

    kind = "masquerade"


class LoaderProvider(Provider):
    """A datapath loader (`ciliate.datapath.loader.Loader`)."""

    kind = "loader"


class FeatureProvider(Provider):
    """A datapath feature (`ciliate.datapath.feature.Feature`): C at named hooks of the programs, with its maps."""

    kind = "feature"


class CommandProvider(Provider):
    """A sub-command of `ciliate`, under the provider's name; the factory returns a click command.

    Its entry point must be named ``command-NAME``: the list of commands is made from names alone. The factory gets
    None, because a command runs outside of any agent.
    """

    kind = "command"


class MetricsProvider(Provider):
    """A Prometheus collector: the factory returns an object with ``collect()`` (`prometheus_client.registry`)."""

    kind = "metrics"


class StatusProvider(Provider):
    """A part of `ciliate status` (`ciliate.agent.status.StatusSource`)."""

    kind = "status"


KINDS: dict[str, type[Provider]] = {
    cls.kind: cls
    for cls in (
        KvstoreProvider,
        IdentityProvider,
        IpamProvider,
        ChainingProvider,
        MasqueradeProvider,
        LoaderProvider,
        FeatureProvider,
        CommandProvider,
        MetricsProvider,
        StatusProvider,
    )
}
"""Every kind by its name."""
