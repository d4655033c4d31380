"""A new map filled from an old one of another size or layout. Blocking."""

from __future__ import annotations

from collections.abc import Iterator

from ciliate.datapath import bpf
from ciliate.datapath.bpf import Map
from ciliate.datapath.mapfields import Convert, Entries


def copy_entries(source: Map, target: Map, convert: Convert | None = None) -> int:
    """Write what ``source`` has into ``target``, as far as there is room; returns how many entries that were.

    ``convert`` makes entries of the source those of the target; without it both have one layout.
    """
    copied = 0
    for entries in converted(source, target, convert):
        fits = entries if target.type == bpf.LRU_HASH else entries[: max(0, target.max_entries - copied)]
        target.update_many(fits)
        copied += len(fits)
    return copied


def converted(source: Map, target: Map, convert: Convert | None) -> Iterator[Entries]:
    """The entries of ``source`` as ``target`` has them, by batches."""
    for entries in _batches(source):
        if convert is None:
            yield entries
        elif source.per_cpu:
            yield [(key, _each_cpu(key, value, source, target, convert)) for key, value in entries]
        else:
            yield convert(entries)


def _batches(source: Map) -> Iterator[Entries]:
    if source.per_cpu:
        yield list(source.items())
        return
    wide, broad = source.key_size, source.value_size
    for keys, values, count in source.batches():
        packed, content = bytes(keys), bytes(values)
        yield [(packed[at * wide : (at + 1) * wide], content[at * broad : (at + 1) * broad]) for at in range(count)]


def _each_cpu(key: bytes, value: bytes, source: Map, target: Map, convert: Convert) -> bytes:
    """A value of a per-CPU map: one of each CPU, every one in as many bytes as 8 divides."""
    stride, wanted = (source.width + 7) // 8 * 8, (target.width + 7) // 8 * 8
    parts = [value[start : start + source.width] for start in range(0, len(value), stride)]
    made = convert([(key, part) for part in parts])
    return b"".join(part.ljust(wanted, b"\0") for _, part in made)
