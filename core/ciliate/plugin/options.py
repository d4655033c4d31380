"""Describes a provider's options for people."""

from __future__ import annotations

from typing import Any

import msgspec


def describe_options(options: type[Any] | None) -> list[dict[str, Any]]:
    """Name, type and default of every option; an empty list where there are none."""
    if options is None:
        return []
    return [
        {
            "name": field.encode_name,
            "type": getattr(field.type, "__name__", str(field.type)),
            "default": None if field.default is msgspec.NODEFAULT else field.default,
        }
        for field in msgspec.structs.fields(options)
    ]
