"""Hook specifications. Two kinds and nothing else: `ciliate_register_<kind>` and `ciliate_<event>`.

Register hooks are called once, when plugins are loaded; they return one provider record or a list of them and must not
import anything heavy. A register hook that raises makes its plugin "broken", which is fatal only where one of its
providers is chosen. Event hooks are called on the agent's loop and must return at once; one that raises is logged
with its plugin's name and the rest go on.

A complete plugin module::

    from ciliate.plugin import KvstoreProvider, hookimpl

    def _create(context):
        from my_store.client import Store  # heavy imports happen here, not at the top
        return Store(context.options)

    @hookimpl
    def ciliate_register_kvstore():
        return KvstoreProvider(name="mine", summary="Keys in my store", factory=_create)
"""

from __future__ import annotations

import pluggy

from ciliate.plugin.types import (
    ChainingProvider,
    CommandProvider,
    FeatureProvider,
    IdentityProvider,
    IpamProvider,
    KvstoreProvider,
    LoaderProvider,
    MasqueradeProvider,
    MetricsProvider,
    StatusProvider,
)

PROJECT = "ciliate"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ciliate_register_kvstore() -> KvstoreProvider | list[KvstoreProvider]:  # type: ignore[empty-body]
    """Key-value stores. Chosen by the option ``kvstore``; the instance follows ``ciliate.kvstore.Kvstore``."""


@hookspec
def ciliate_register_identity() -> IdentityProvider | list[IdentityProvider]:  # type: ignore[empty-body]
    """Identity backends. Chosen by ``identity-allocation-mode``; follows ``ciliate.identity.backend``."""


@hookspec
def ciliate_register_ipam() -> IpamProvider | list[IpamProvider]:  # type: ignore[empty-body]
    """Address allocation. Chosen by ``ipam``; follows ``ciliate.ipam.Ipam``."""


@hookspec
def ciliate_register_chaining() -> ChainingProvider | list[ChainingProvider]:  # type: ignore[empty-body]
    """CNI chaining modes. Chosen by the CNI configuration; follows ``ciliate.cni.modes.ChainingMode``."""


@hookspec
def ciliate_register_masquerade() -> MasqueradeProvider | list[MasqueradeProvider]:  # type: ignore[empty-body]
    """Masquerading. Chosen by ``masquerade``."""


@hookspec
def ciliate_register_loader() -> LoaderProvider | list[LoaderProvider]:  # type: ignore[empty-body]
    """Datapath loaders. Chosen by ``datapath-loader``; follows ``ciliate.datapath.loader.Loader``."""


@hookspec
def ciliate_register_feature() -> FeatureProvider | list[FeatureProvider]:  # type: ignore[empty-body]
    """Datapath features: all of them are active and part of the program's hash."""


@hookspec
def ciliate_register_command() -> CommandProvider | list[CommandProvider]:  # type: ignore[empty-body]
    """Sub-commands of ``ciliate``."""


@hookspec
def ciliate_register_metrics() -> MetricsProvider | list[MetricsProvider]:  # type: ignore[empty-body]
    """Prometheus collectors."""


@hookspec
def ciliate_register_status() -> StatusProvider | list[StatusProvider]:  # type: ignore[empty-body]
    """Parts of ``ciliate status``."""


@hookspec
def ciliate_agent_started(node_name: str) -> None:
    """The agent of ``node_name`` is ready: its API and CNI answer."""


@hookspec
def ciliate_agent_stopping(node_name: str) -> None:
    """The agent of ``node_name`` is about to stop; providers still run."""


@hookspec
def ciliate_endpoint_created(endpoint_id: int, labels: list[str]) -> None:
    """An endpoint is ready and its policy enforced. ``labels`` are ``source:key=value`` strings."""


@hookspec
def ciliate_endpoint_deleted(endpoint_id: int) -> None:
    """An endpoint is gone from the kernel."""


@hookspec
def ciliate_policy_changed(revision: int) -> None:
    """Policy ``revision`` is in the kernel."""
