"""Manifests: YAML and JSON files with one or many objects, read with the file and line of every item.

Source of behaviour: what `kubectl apply -f` takes: multi-document YAML, JSON, `kind: List` (and `…List`), folders.
A bare JSON or YAML list of policy rules, the form of the seed system's REST API, gives one ``Rule`` object each.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ciliate.document import Document

__all__ = ["Document", "ManifestError", "load", "loads"]
SUFFIXES = frozenset({".yaml", ".yml", ".json"})
MAX_ITEMS = 2_000_000
MAX_DEPTH = 60
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ManifestError(ValueError):
    """A file that cannot be read as manifests; each line of the text begins with ``file:line:``."""


def load(paths: Iterable[Path | str]) -> list[Document]:
    """Read every file; a folder stands for the manifests in it, ``-`` for standard input.

    Raises ManifestError with every problem found, one a line.
    """
    documents: list[Document] = []
    problems: list[str] = []
    for path in _files(paths, problems):
        try:
            documents.extend(loads(_text(path), str(path)))
        except ManifestError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError("\n".join(problems))
    return documents


def loads(text: str, file: str = "") -> list[Document]:
    """Read manifests from a text; ManifestError names ``file`` and the line."""
    return [document for root in _roots(text, file) for document in _objects(root, file)]


def mapping(path: Path) -> dict[str, Any]:
    """The one mapping in a file, empty where there is nothing; ManifestError where a key is given twice, or no word."""
    roots = _roots(_text(path), str(path))
    if len(roots) > 1:
        raise ManifestError(f"{path}: {len(roots)} documents given, expected one")
    value = roots[0].value if roots else None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(key[:1].isalpha() for key in value):
        raise ManifestError(f"{path}: expected a mapping of options at the top")
    return value


def _files(paths: Iterable[Path | str], problems: list[str]) -> Iterator[Path]:
    for given in paths:
        path = Path(given)
        if not str(given):
            problems.append("'': expected a file or folder")
        elif path.is_dir():
            found = sorted(item for item in path.rglob("*") if item.suffix in SUFFIXES and item.is_file())
            if not found:
                problems.append(f"{path}: expected a folder with .yaml, .yml or .json files")
            yield from found
        else:
            yield path


def _text(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"expected UTF-8 text: {error}"
        raise ManifestError(f"{path}: {reason}") from error


class _Root:
    """One document of a file: its value, with the lines of every item."""

    def __init__(self, value: Any, lines: dict[str, int]) -> None:
        self.value = value
        self.lines = lines


def _roots(text: str, file: str) -> list[_Root]:
    loader = None
    try:
        loader = _Loader(text)
        roots = []
        while loader.check_node():
            node = loader.get_node()
            builder = _Builder(file)
            roots.append(_Root(builder.build(node, "", 0), builder.lines))
        return roots
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ManifestError(f"{file}:{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{file}:1: not YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ManifestError(f"{file}:1: expected at most {MAX_DEPTH} nested levels") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Builder:
    """Makes plain values of YAML nodes and notes where each stands."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[str, int] = {}
        self._items = 0

    def build(self, node: Any, path: str, depth: int) -> Any:
        self._items += 1
        if self._items > MAX_ITEMS or depth > MAX_DEPTH:
            limit = f"at most {MAX_DEPTH} nested levels and {MAX_ITEMS} items"
            raise self._error(node, f"{path or 'document'}: expected {limit}")
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: Any, path: str, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            below = f"{path}.{key}" if path else key
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged.update(self._merge(value_node, path, depth))
                continue
            if key in result:
                raise self._error(key_node, f"{below}: given twice in one mapping")
            result[key] = self.build(value_node, below, depth + 1)
            self.lines[below] = key_node.start_mark.line + 1
        return {**merged, **result}

    def _merge(self, node: Any, path: str, depth: int) -> dict[str, Any]:
        value = self.build(node, path, depth + 1)
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, dict) for part in parts):
            raise self._error(node, f"{path or 'document'}: expected a mapping to merge")
        return {key: item for part in reversed(parts) for key, item in part.items()}

    def _key(self, node: Any, path: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"{path or 'document'}: expected text as a key")
        return str(node.value)

    def _scalar(self, node: Any, path: str) -> Any:
        kind = node.tag.rpartition(":")[2]
        try:
            if kind in ("str", "timestamp"):
                return node.value
            return _SCALARS[kind](node.value)
        except (KeyError, ValueError) as error:
            raise self._error(node, f"{path or 'document'}: {node.value!r} is not a plain {kind}") from error

    def _error(self, node: Any, text: str) -> ManifestError:
        return ManifestError(f"{self.file}:{node.start_mark.line + 1}: {text}")


def _integer(text: str) -> int:
    plain = text.replace("_", "").lower()
    sign = -1 if plain.startswith("-") else 1
    digits = plain.lstrip("+-")
    if ":" in digits:
        raise ValueError(text)
    if digits.startswith("0") and digits.isdigit() and len(digits) > 1:
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def _number(text: str) -> float:
    plain = text.replace("_", "").lower()
    if plain.lstrip("+-") in (".inf", ".nan"):
        raise ValueError(text)
    number = float(plain)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


_SCALARS: dict[str, Any] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() in ("true", "yes", "on"),
    "int": _integer,
    "float": _number,
}


def _objects(root: _Root, file: str) -> list[Document]:
    value, lines = root.value, root.lines
    if value is None:
        return []
    if isinstance(value, list):
        groups = _group(lines)
        return [_rule(item, f"[{index}]", lines, groups, file) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        raise ManifestError(f"{file}:{lines['']}: expected an object with kind and metadata, not {_name(value)}")
    kind = value.get("kind")
    if isinstance(kind, str) and kind.endswith("List") and isinstance(value.get("items"), list):
        return _items(value["items"], kind, value.get("apiVersion"), lines, file)
    return [Document(value, file, lines[""], {path: line for path, line in lines.items() if path})]


def _items(items: Sequence[Any], kind: str, version: Any, lines: dict[str, int], file: str) -> list[Document]:
    documents = []
    groups = _group(lines)
    for index, item in enumerate(items):
        prefix = f"items[{index}]"
        if not isinstance(item, dict):
            raise ManifestError(f"{file}:{lines[prefix]}: {prefix}: expected an object, not {_name(item)}")
        if kind != "List":
            item = {"kind": kind.removesuffix("List"), "apiVersion": version, **item}
        documents.append(Document(item, file, lines[prefix], groups.get(prefix, {})))
    return documents


def _rule(item: Any, prefix: str, lines: dict[str, int], groups: dict[str, dict[str, int]], file: str) -> Document:
    if not isinstance(item, dict):
        raise ManifestError(f"{file}:{lines[prefix]}: {prefix}: expected a rule or an object, not {_name(item)}")
    below = groups.get(prefix, {})
    if "kind" in item:
        return Document(item, file, lines[prefix], below)
    wrapped = {f"spec.{path}": line for path, line in below.items()}
    return Document({"kind": "Rule", "spec": item}, file, lines[prefix], {"spec": lines[prefix], **wrapped})


def _group(lines: dict[str, int]) -> dict[str, dict[str, int]]:
    """Lines by list item: ``items[3].kind`` goes to group ``items[3]`` as ``kind``."""
    groups: dict[str, dict[str, int]] = {}
    for path, line in lines.items():
        head, bracket, rest = path.partition("].")
        if bracket:
            groups.setdefault(head + "]", {})[rest] = line
    return groups


def _name(value: Any) -> str:
    return f"{type(value).__name__} {json.dumps(value)[:60]}"
