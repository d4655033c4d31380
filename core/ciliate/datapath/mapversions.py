"""Which layout a map in the kernel has: by what is recorded beside the pins, else by its sizes. Blocking.

``ciliate_layouts`` says of each pinned map the number of its layout and its fields, so that an agent of an earlier
version can read what a later one left.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ciliate.datapath import bpf
from ciliate.datapath.bpf import Map
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.mapfields import Convert, Fields, Shape, by_names
from ciliate.datapath.maplayouts import REGISTRY, MapLayouts
from ciliate.datapath.pins import PinDirectory

RECORDS = "ciliate_layouts"
ENTRIES = 128
_NAME, _RECORD = struct.Struct("=32s"), struct.Struct("=III1012s")


class UnknownLayoutError(DatapathError):
    """A map in the kernel of a layout that this version of the agent cannot read."""


class Record(NamedTuple):
    """What is recorded of a map: the number of its layout, from which on agents read it by names, the kernel's number
    of the map that is meant, and its fields."""

    number: int
    since: int
    map_id: int
    shape: Shape


class Found(NamedTuple):
    """The layout of a map in the kernel."""

    number: int
    shape: Shape
    known: bool
    """Whether this version has it in its registry."""


def read_records(pins: PinDirectory, directory: Path | None = None) -> dict[str, Record]:
    """What is recorded, by the map's name; nothing where an agent from before there were records left the pins.

    ``directory``: where the pins are, if it is not where programs find their maps now.
    """
    path = (directory or pins.path) / RECORDS
    if not path.exists():
        return {}
    table = Map.open(path)
    try:
        if (table.key_size, table.width) != (_NAME.size, _RECORD.size):
            return {}
        return dict(decoded(key, value) for key, value in table.items())
    finally:
        table.close()


def decoded(key: bytes, value: bytes) -> tuple[str, Record]:
    """A map's name and record from an entry of ``ciliate_layouts``."""
    number, since, map_id, text = _RECORD.unpack(value)
    fields = (Fields(part) for part in text.rstrip(b"\0").decode().split("|"))
    return key.rstrip(b"\0").decode(), Record(number, since, map_id, Shape(*fields))


def text_of(shape: Shape) -> bytes:
    """The fields of key and value as a record has them."""
    return f"{shape.key.text}|{shape.value.text}".encode()


def write_records(pins: PinDirectory, registry: Mapping[str, MapLayouts] = REGISTRY) -> None:
    """Record the layouts of this version for every map that is pinned, and forget maps that are not.

    What is recorded of a map of other sizes stays: it is of an earlier layout, and nobody replaced it yet.
    """
    present = {name: layouts for name, layouts in registry.items() if pins.of(name).exists()}
    with contextlib.closing(_records(pins)) as table:
        entries: dict[bytes, bytes] = {}
        for name, layouts in present.items():
            with contextlib.closing(Map.open(pins.of(name))) as pinned:
                if layouts.current.shape.sizes == (pinned.key_size, pinned.width):
                    entries.update([_record_of(pinned, layouts)])
        known = dict(table.items())
        table.update_many((key, value) for key, value in entries.items() if known.get(key) != value)
        names = {_NAME.pack(name.encode()) for name in present}
        table.delete_many(key for key in known if key not in names)


def record(pins: PinDirectory, table: Map) -> None:
    """Record that a map that was made now has the layout of this version; before it is pinned.

    So no agent finds it without its record, whenever this one ends.
    """
    if table.name in REGISTRY:
        with contextlib.closing(_records(pins)) as records:
            records.update(*_record_of(table, REGISTRY[table.name]))


def _record_of(table: Map, layouts: MapLayouts) -> tuple[bytes, bytes]:
    """The entry of ``ciliate_layouts`` for an open map of the current layout."""
    number = bpf.MapInfo(table.descriptor).id
    value = _RECORD.pack(layouts.number, layouts.current.since, number, text_of(layouts.current.shape))
    return _NAME.pack(table.name.encode()), value


def _records(pins: PinDirectory) -> Map:
    path = pins.of(RECORDS)
    if path.exists():
        table = Map.open(path)
        if (table.key_size, table.width) == (_NAME.size, _RECORD.size):
            return table
        table.close()
        pins.unlink(RECORDS)
    table = Map.create(bpf.HASH, _NAME.size, _RECORD.size, ENTRIES, bpf.NO_PREALLOC, RECORDS)
    bpf.pin(table.descriptor, path)
    return table


def identify(table: Map, record: Record | None, registry: Mapping[str, MapLayouts] = REGISTRY) -> Found:
    """The layout of an open map of the datapath. UnknownLayoutError where this version cannot read it.

    ``record`` is what is recorded of its name; it counts only if it is about this very map.
    """
    layouts = registry[table.name]
    sizes = (table.key_size, table.width)
    if record is None or record.map_id != bpf.MapInfo(table.descriptor).id or record.shape.sizes != sizes:
        return _by_sizes(table, sizes, layouts)
    if record.number > layouts.number:
        if record.since > layouts.number:
            text = f"layout {record.number}, which only agents of layout {record.since} and later can read"
            raise _unknown(table, text, layouts)
        return Found(record.number, record.shape, False)
    known = layouts.layouts[record.number - 1].shape
    if known != record.shape:
        raise _unknown(table, f"another layout {record.number} than the one that this version knows", layouts)
    return Found(record.number, known, True)


def _by_sizes(table: Map, sizes: tuple[int, int], layouts: MapLayouts) -> Found:
    for number, item in reversed(list(enumerate(layouts.layouts, 1))):
        if not item.recorded and item.shape.sizes == sizes:
            return Found(number, item.shape, True)
    raise _unknown(table, f"a key of {sizes[0]} and a value of {sizes[1]} bytes and no record of its layout", layouts)


def conversion(name: str, old: Found, new: Found, registry: Mapping[str, MapLayouts] = REGISTRY) -> Convert | None:
    """What makes entries of one layout of a map those of another one; None where they are the same."""
    if old.shape == new.shape and old.number == new.number:
        return None
    if old.known and new.known:
        return registry[name].path(old.number, new.number)
    return by_names(old.shape, new.shape)


def current(name: str, registry: Mapping[str, MapLayouts] = REGISTRY) -> Found:
    """The layout that this version's programs have."""
    return Found(registry[name].number, registry[name].current.shape, True)


def _unknown(table: Map, found: str, layouts: MapLayouts) -> UnknownLayoutError:
    text = f"map {table.name} has {found}; this agent knows layouts 1 to {layouts.number}"
    return UnknownLayoutError(errno.EINVAL, text)


def find_layouts(
    pins: PinDirectory, names: Iterable[str], registry: Mapping[str, MapLayouts] = REGISTRY
) -> dict[str, Found]:
    """The layout of each of these maps that is pinned. UnknownLayoutError says which map and what people can do."""
    records, found = read_records(pins), {}
    for name in names:
        if name not in registry or not pins.of(name).exists():
            continue
        table = Map.open(pins.of(name))
        try:
            found[name] = identify(table, records.get(name), registry)
        except UnknownLayoutError as error:
            raise UnknownLayoutError(error.errno, f"{error.strerror}. {_remedy(pins)}") from None
        finally:
            table.close()
    return found


def _remedy(pins: PinDirectory) -> str:
    return (
        "Nothing was changed: pods' traffic goes on as it was, by the programs in place. Start the version of the "
        "agent that was there before, or a later one; to give up what is in the kernel, drain the node and remove "
        f"{pins.path}"
    )


def is_current(table: Map) -> bool:
    """Whether an open map has the layout of this version, or is none whose entries have a layout."""
    known = REGISTRY.get(table.name)
    return known is None or known.current.shape.sizes == (table.key_size, table.width)


def require_current(table: Map) -> None:
    """DatapathError where somebody of this version would read an agent of another one wrong."""
    if not is_current(table):
        text = f"map {table.name} has another layout than this version reads: its agent is of another version"
        raise DatapathError(errno.EINVAL, f"{text}; use the commands that came with it")
