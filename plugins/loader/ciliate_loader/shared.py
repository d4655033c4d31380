"""Loader `shared`: one program per direction for every endpoint of the node; an endpoint is a map entry."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import LoaderProvider, PluginContext, hookimpl


def _create(context: PluginContext) -> Any:
    from ciliate_loader.shared_loader import SharedLoader

    return SharedLoader()


@hookimpl
def ciliate_register_loader() -> LoaderProvider:
    """One provider."""
    return LoaderProvider(
        name="shared",
        summary="One program for all endpoints; an endpoint is a map entry found by its class id",
        factory=_create,
    )
