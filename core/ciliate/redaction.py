"""What may be shown of options: all but the values of those that sound like secrets, in whatever form they come."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

HIDDEN = "(hidden)"
_SECRET = re.compile(
    r"pas+w|pass(phrase|code)|\bpass\b|pwd|secret|token|credential|private|bearer|(^|[-_.])(key|pass)s?($|[-_.])",
    re.IGNORECASE,
)
_FILE = re.compile(r"[-_.](file|path|dir)$", re.IGNORECASE)
_USER = re.compile(r"(://[^/@\s:]*:)[^/@\s]*@")
"""A password within an address."""
_PAIR = re.compile(r"""(?P<name>[\w.-]+)["'\\]*\s*[=:]\s*""")


def is_secret(name: str) -> bool:
    """Whether the value of an option of that name is to be hidden; the name of a file is none."""
    return bool(_SECRET.search(name)) and not _FILE.search(name)


def shown(name: str, value: Any) -> Any:
    """An option's value as it may be shown."""
    return HIDDEN if is_secret(name) and not isinstance(value, Mapping) else hide_secrets(value)


def hide_secrets(value: Any) -> Any:
    """A copy without the values of members that sound like secrets, also in texts that are JSON or ``name=value,…``."""
    if isinstance(value, Mapping):
        return {key: shown(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    if text.lstrip()[:1] in ("{", "["):
        try:
            found = msgspec.json.decode(text)
        except msgspec.DecodeError:
            # what is damaged may spell its names in ways that nobody foresees
            return HIDDEN
        safe = hide_secrets(found)
        return text if safe == found else msgspec.json.encode(safe).decode()
    return _pairs(text)


def _pairs(text: str) -> str:
    """A secret ends where the next option of the same provider begins: it may well have commas and equals signs."""
    text, place = _USER.sub(rf"\g<1>{HIDDEN}@", text), 0
    while (match := _PAIR.search(text, place)) is not None:
        name = match["name"]
        if not is_secret(name):
            place = match.end()
            continue
        provider = name.rpartition(".")[0]
        following = re.compile(rf"[,;&]\s*{re.escape(provider)}\.[\w.-]+\s*=") if provider else None
        end = following.search(text, match.end()) if following is not None else None
        rest = text[end.start() :] if end is not None else ""
        text = text[: match.end()] + HIDDEN + rest
        place = match.end() + len(HIDDEN)
    return text
