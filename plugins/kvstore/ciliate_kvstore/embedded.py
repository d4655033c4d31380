"""Store `embedded`: one SQLite file on this node."""

from __future__ import annotations

from typing import Any

import msgspec

from ciliate.plugin import KvstoreProvider, PluginContext, hookimpl


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the embedded store (section ``plugins.embedded``)."""

    path: str = ""
    """File; default STATE-DIR/kvstore.db."""
    history: int = 100_000
    """Changes that are kept for watches that resume."""


def _create(context: PluginContext) -> Any:
    from pathlib import Path

    from ciliate_kvstore.sqlite import SqliteStore

    options = context.options or Options()
    path = Path(options.path) if options.path else context.state_dir / "kvstore.db"
    return SqliteStore(path, history=options.history)


@hookimpl
def ciliate_register_kvstore() -> KvstoreProvider:
    """One provider."""
    return KvstoreProvider(
        name="embedded", summary="SQLite file on this node; no server", factory=_create, options=Options
    )
