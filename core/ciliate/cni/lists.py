"""Configuration lists with our plugin in them: what of the plugins beside it cannot work as it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ciliate.cni.install import EXECUTABLE

SUFFIXES = (".conflist", ".conf", ".json")


def mistakes(document: Mapping[str, Any]) -> Iterator[str]:
    """In words, each with the field; nothing where the list is fine or has no plugin of ours."""
    plugins = document.get("plugins")
    if not isinstance(plugins, list):
        return
    types = [str(item.get("type", "")) if isinstance(item, dict) else "" for item in plugins]
    if EXECUTABLE not in types:
        return
    place = types.index(EXECUTABLE)
    ours = plugins[place]
    mode, given = ours.get("chaining-mode", "none"), ours.get("capabilities")
    able = {name for name, value in given.items() if value} if isinstance(given, dict) else set()
    own_device = mode in ("none", "portmap")
    for index, kind in enumerate(types):
        field = f"plugins[{index}] ({kind})"
        if kind == "bandwidth":
            yield f"{field}: cannot work beside {EXECUTABLE}; remove it, give {EXECUTABLE} the capability bandwidth"
        elif kind == "portmap" and own_device and mode != "portmap" and "portMappings" not in able:
            cure = f'give {EXECUTABLE} the capability portMappings, or "chaining-mode": "portmap"'
            yield f"{field}: pods of the node do not reach mapped ports; {cure}"
        elif kind == "tuning" and not own_device and index > place:
            yield f"{field}: a MAC address that it changes cuts the pod off; put it before {EXECUTABLE}"


def look(directory: Path) -> dict[Path, list[str]]:
    """Every list of a directory that names our plugin, with its mistakes; one that is no JSON counts, too."""
    found: dict[Path, list[str]] = {}
    for path in sorted(item for item in directory.iterdir() if item.suffix in SUFFIXES):
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            found[path] = [f"is no JSON: {error}"]
            continue
        if isinstance(document, dict) and EXECUTABLE in json.dumps(document):
            found[path] = list(mistakes(document))
    return found
