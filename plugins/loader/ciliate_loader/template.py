"""Loader `template`: compiled once, loaded once per endpoint with the endpoint's constants in it."""

from __future__ import annotations

from typing import Any

from ciliate.plugin import LoaderProvider, PluginContext, hookimpl


def _create(context: PluginContext) -> Any:
    from ciliate_loader.template_loader import TemplateLoader

    return TemplateLoader()


@hookimpl
def ciliate_register_loader() -> LoaderProvider:
    """One provider."""
    return LoaderProvider(
        name="template",
        summary="Programs of its own for each endpoint, its addresses as constants in them; compiled once per node",
        factory=_create,
    )
