"""Lists plugins without importing one: entry-point metadata, and the source read as a syntax tree."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

GROUP = "ciliate.plugins"
OWN_DISTRIBUTION = "ciliate"
_HOOK = "ciliate_register_"


def static_listing(
    chosen: Mapping[str, str] | None = None,
    disabled: tuple[str, ...] = (),
    third_party: bool = True,
) -> list[dict[str, str]]:
    """One record per provider: name, kind, state, reason, distribution, version, summary, module, plugin.

    ``chosen`` maps kinds to the provider names that the configuration selects. State is active (chosen), available,
    disabled, unavailable where a library is missing, or broken with a reason, as far as that can be told without
    running the plugin's code.
    """
    records = []
    entries = {(item.dist.name if item.dist else "unknown", item.name): item for item in _entries()}
    for (distribution, _), entry in sorted(entries.items(), key=lambda item: (item[0][0] != OWN_DISTRIBUTION, item[0])):
        off = entry.name in disabled or not (third_party or distribution == OWN_DISTRIBUTION)
        for found in _providers(entry):
            records.append(_record(entry, found, off, chosen or {}))
    _mark_clashes(records)
    return records


def _entries() -> Iterator[importlib.metadata.EntryPoint]:
    yield from importlib.metadata.entry_points(group=GROUP)


def _record(
    entry: importlib.metadata.EntryPoint, found: Mapping[str, str], off: bool, chosen: Mapping[str, str]
) -> dict[str, str]:
    reason = found.get("reason") or missing(found.get("requires", ""), found.get("extra", ""), entry)
    state = "broken" if found.get("reason") else "unavailable" if reason else "available"
    if off:
        state = "disabled"
    elif state == "available" and (chosen.get(found["kind"]) == found["name"] or found["kind"] == "chaining"):
        # every chaining mode is at hand: the CNI configuration of each network picks its own
        state = "active"
    return {
        "name": found["name"],
        "kind": found["kind"],
        "state": state,
        "reason": reason or ("disabled by configuration" if off else ""),
        "distribution": entry.dist.name if entry.dist else "unknown",
        "version": entry.dist.version if entry.dist else "unknown",
        "summary": found.get("summary", ""),
        "module": entry.value,
        "plugin": entry.name,
    }


def missing(module: str, extra: str, entry: importlib.metadata.EntryPoint) -> str:
    """That a library is missing, and what installs it; empty where it is there."""
    if not module or importlib.util.find_spec(module.partition(".")[0]) is not None:
        return ""
    distribution = entry.dist.name if entry.dist else "unknown"
    return f"{module} is missing" + (f": pip install '{distribution}[{extra}]'" if extra else "")


def _mark_clashes(records: list[dict[str, str]]) -> None:
    seen: dict[tuple[str, str], list[dict[str, str]]] = {}
    for record in records:
        if record["state"] in ("active", "available"):
            seen.setdefault((record["kind"], record["name"]), []).append(record)
    for same in seen.values():
        if len(same) > 1:
            both = " and ".join(f"{record['plugin']} ({record['distribution']})" for record in same)
            for record in same:
                record["reason"] = f"provided by {both}; choose one with prefer-plugins"


def _providers(entry: importlib.metadata.EntryPoint) -> list[dict[str, str]]:
    """What a plugin's source says that it registers; one broken record where it cannot be read."""
    kind, _, name = entry.name.partition("-")
    fallback = {"kind": kind if name else "unknown", "name": name or entry.name}
    path = find_source(entry.value)
    if path is None:
        return [{**fallback, "reason": f"module {entry.value} is not installed"}]
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        return [{**fallback, "reason": f"{path.name}:{error.lineno}: syntax error: {error.msg}"}]
    except (OSError, ValueError) as error:
        return [{**fallback, "reason": f"{path}: {error}"}]
    found = list(_registered(tree, fallback["name"]))
    return found or [{**fallback, "reason": f"module {entry.value} has no {_HOOK}<kind> hook"}]


def find_source(module: str) -> Path | None:
    """The file of a module, found on sys.path without importing it or its parents."""
    parts = module.split(":")[0].split(".")
    for root in sys.path:
        base = Path(root or ".").joinpath(*parts)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _registered(tree: ast.Module, default: str) -> Iterator[dict[str, str]]:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith(_HOOK):
            continue
        kind = node.name.removeprefix(_HOOK)
        records = [_keywords(call) for call in ast.walk(node) if isinstance(call, ast.Call)]
        named = [record for record in records if "factory" in record]
        for record in named or [{}]:
            name = record.get("name") or default
            needs = {key: record.get(key, "") for key in ("requires", "extra")}
            yield {**needs, "kind": kind, "name": name, "summary": record.get("summary") or _first_line(tree)}


def _keywords(call: ast.Call) -> dict[str, str]:
    """Keyword arguments of a call; literal text as it is, anything else as an empty string."""
    found: dict[str, str] = {}
    for keyword in call.keywords:
        if keyword.arg:
            value: Any = keyword.value.value if isinstance(keyword.value, ast.Constant) else ""
            found[keyword.arg] = value if isinstance(value, str) else ""
    return found


def _first_line(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").split("\n", 1)[0]
