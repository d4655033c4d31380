"""The registry of map layouts: it says of every map what the programs have, and entries survive each step and back."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import ciliate_bpf
from ciliate.datapath import layout, lblayout, mapversions, snat
from ciliate.datapath.mapfields import Fields, Shape, by_names
from ciliate.datapath.maplayouts import MAPS, REGISTRY, Layout, MapLayouts

INDEX = struct.Struct("=I")
NUMBER = lblayout.NUMBER
TWINS = {
    **layout.MAP_STRUCTS,
    **lblayout.MAP_STRUCTS,
    "ciliate_frag": (layout.FRAG_KEY, layout.FRAG_ENTRY),
    snat.MAP: (snat.SNAT_KEY, snat.SNAT_ENTRY),
    snat.DEVICES: (NUMBER, snat.SNAT_DEVICE),
    snat.CLASSES: (layout.IPCACHE_KEY, snat.MASQ_CLASS),
    snat.PODS: (layout.NODE_KEY, snat.SNAT_POD),
}
STEPS = [(item, number) for item in MAPS for number in range(1, item.number)]


def parts(form: str) -> Iterator[tuple[int, int]]:
    """Where each value of a struct format begins and how long it is, padding left out; one array is one value."""
    offset, count = 0, ""
    for letter in form.lstrip("="):
        if letter.isdigit():
            count += letter
            continue
        times = 1 if letter in "sx" or int(count or 1) > 16 else int(count or 1)
        size = struct.calcsize(f"={count}{letter}") // times
        for _ in range(times):
            if letter != "x":
                yield offset, size
            offset += size
        count = ""


def test_every_map_of_the_programs_has_layouts() -> None:
    """All that the sources define but what a packet is worked on in."""
    sources = Path(ciliate_bpf.__file__).parent.rglob("*.[ch]")
    maps = {name for path in sources for name in re.findall(r"^MAP\((ciliate_\w+),", path.read_text(), re.M)}
    assert REGISTRY.keys() == TWINS.keys() == {name for name in maps if not name.endswith("_scratch")}


@pytest.mark.parametrize("name", TWINS)
def test_the_last_layout_is_that_of_the_programs(name: str) -> None:
    for fields, twin in zip(REGISTRY[name].current.shape, TWINS[name], strict=True):
        expected = twin or INDEX
        assert fields.size == expected.size
        assert [(item.offset, item.size) for item in fields.all] == list(parts(expected.format))


@pytest.mark.parametrize("item", MAPS, ids=lambda item: item.name)
def test_names_of_fields_are_told_apart_and_fit_into_a_record(item: MapLayouts) -> None:
    assert len(item.name) <= 32
    for shape in (one.shape for one in item.layouts):
        for fields in shape:
            assert len(fields.named()) == len(fields.all)
        assert len(mapversions.text_of(shape)) <= 1012


@pytest.mark.parametrize("item, number", STEPS, ids=lambda value: getattr(value, "name", value))
def test_entries_survive_a_step_and_the_way_back(item: MapLayouts, number: int) -> None:
    """Random entries of the earlier layout, with zeros where it has padding."""
    chance = random.Random(number)
    old = item.layouts[number - 1].shape
    entries = [(filled(old.key, chance), filled(old.value, chance)) for _ in range(50)]
    up = item.path(number, number + 1)(entries)
    assert len({key for key, _ in up}) == len(entries)
    assert {(len(key), len(value)) for key, value in up} == {item.layouts[number].shape.sizes}
    assert item.path(number + 1, number)(up) == entries


def filled(fields: Fields, chance: random.Random) -> bytes:
    data = bytearray(fields.size)
    for item in fields.all:
        data[item.offset : item.offset + item.size] = chance.randbytes(item.size)
    return bytes(data)


OLD = Shape(Fields("who:I port:2s pad:2x"), Fields("count:I state:B pad:3x"))
NEW = Shape(Fields("who:I where:I port:2s pad:2x"), Fields("count:Q state:B why:B! note:B pad:5x"))


def new(who: int, where: int, port: bytes, count: int, state: int, why: int = 0, note: int = 0) -> tuple[bytes, bytes]:
    return NEW.key.struct.pack(who, where, port), NEW.value.struct.pack(count, state, why, note)


def old(who: int, port: bytes, count: int, state: int) -> tuple[bytes, bytes]:
    return OLD.key.struct.pack(who, port), OLD.value.struct.pack(count, state)


@pytest.mark.parametrize(
    "entry, expected",
    [
        (new(7, 0, b"\0\x50", 9, 3), old(7, b"\0\x50", 9, 3)),
        (new(7, 1, b"\0\x50", 9, 3), None),  # another key
        (new(7, 0, b"\0\x50", 9, 3, why=1), None),  # means something else
        (new(7, 0, b"\0\x50", 9, 3, note=1), old(7, b"\0\x50", 9, 3)),
        (new(7, 0, b"\0\x50", 1 << 32 | 9, 3), old(7, b"\0\x50", 9, 3)),  # a counter that is no vital field
    ],
    ids=["said in both", "a key's field", "a vital field", "another field", "too large a number"],
)
def test_what_the_earlier_layout_cannot_say_is_left_out(
    entry: tuple[bytes, bytes], expected: tuple[bytes, bytes] | None
) -> None:
    assert by_names(NEW, OLD)([entry]) == ([] if expected is None else [expected])


def test_what_is_new_is_zero() -> None:
    assert by_names(OLD, NEW)([old(7, b"\0\x50", 9, 3)]) == [new(7, 0, b"\0\x50", 9, 3)]


def test_steps_of_their_own_go_before_names() -> None:
    swap = lambda entries: [(key[::-1], value) for key, value in entries]  # noqa: E731
    one = Layout(Fields("a:2s"), Fields("b:B"))
    layouts = MapLayouts("x", (one, Layout(one.key, one.value, up=swap, down=swap), one))
    assert layouts.path(1, 3)([(b"ab", b"c")]) == [(b"ba", b"c")]
    assert layouts.path(3, 1)([(b"ba", b"c")]) == [(b"ab", b"c")]


@pytest.mark.parametrize("text", ["who", "who:", "who:Z", "Who:I", "who:I?"])
def test_a_field_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected NAME:CODE"):
        _ = Fields(text).all
