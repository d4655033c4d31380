"""Files that are either the old or the new content, never half of one, also across a crash."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

SCHEMA_KEY = "schema"


class StateFileError(ValueError):
    """A state file cannot be used; the text names it and says what to do."""


class DamagedError(StateFileError):
    """The content is not what was written."""


class SchemaError(StateFileError):
    """The file is of another version of this program."""


def write_bytes(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: temporary file in the same directory, fsync, rename, fsync of the directory.

    Raises OSError and leaves the old file alone where any step fails.
    """
    replace(path, data, mode)
    sync_directory(path.parent)


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """As ``write_bytes``, all but the last step: after a crash of the machine there may be the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = os.fspath(path)  # most errors do not say which file
        raise


def write_json(path: Path, value: object, schema: int = 1, pretty: bool = True) -> None:
    """Write ``{"schema": N, "data": value}`` atomically; ``pretty`` for people, at the price of some time."""
    write_bytes(path, encode(value, schema, pretty))


def encode(value: object, schema: int = 1, pretty: bool = True) -> bytes:
    """What ``write_json`` writes."""
    data = msgspec.json.encode({SCHEMA_KEY: schema, "data": value})
    return msgspec.json.format(data) if pretty else data


def read_json(path: Path, schema: int = 1) -> object | None:
    """The data that ``write_json`` stored, or None where there is no file.

    DamagedError where it is malformed, SchemaError where it is of another version; both name the file.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        document = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise DamagedError(f"{path}: not JSON: {error}; restore it from a backup, or remove it") from error
    found = document.get(SCHEMA_KEY) if isinstance(document, dict) else None
    if isinstance(found, int) and found != schema:
        age = "a newer" if found > schema else "an older"
        text = f"{path}: schema {found} found, expected {schema}: {age} version wrote it; run that version"
        raise SchemaError(text)
    if not isinstance(found, int) or "data" not in document:
        text = f"{path}: schema and data expected at the top; restore it from a backup, or remove it"
        raise DamagedError(text)
    data: object = document["data"]
    return data


def remove(path: Path) -> None:
    """Remove a file durably; nothing happens where it is gone already."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make durable what was created, renamed and removed in a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
