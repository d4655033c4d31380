"""Plain data of structs that hold addresses and paths, and back: one pair of hooks for msgspec."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_TEXT = (IPv4Address, IPv6Address, IPv4Network, IPv6Network, Path)


def _encode(value: object) -> object:
    if isinstance(value, _TEXT):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no plain form")


def _decode(kind: type[Any], value: object) -> object:
    if kind in _TEXT and isinstance(value, str):
        return kind(value)
    raise NotImplementedError(f"{kind.__name__} cannot be made of {value!r}")


def plain(value: object) -> Any:
    """``value`` as dicts, lists, text and numbers; addresses and paths become text."""
    return msgspec.to_builtins(value, enc_hook=_encode)


def convert(data: object, kind: type[T]) -> T:
    """The inverse of ``plain``; msgspec.ValidationError or ValueError where it does not fit."""
    return msgspec.convert(data, kind, dec_hook=_decode)
