"""Every C struct against its Python twin, by the compiled object's BTF. Tier bpf."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ciliate.datapath import lblayout, snat
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.layout import STRUCTS as BASIC
from ciliate.datapath.reasons import drop_reasons

STRUCTS = BASIC | lblayout.STRUCTS | snat.STRUCTS
NETDEV = 1 << 20


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every type by number; those of masquerading, which no other program has, are numbered apart."""
    compiler = Compiler(tmp_path_factory.mktemp("btf"))
    # it has every map of the endpoint programs, and those of tunnels
    found = types_of(compiler.compile("overlay"))
    return found | {number + NETDEV: moved(item) for number, item in types_of(nat_object(compiler)).items()}


def nat_object(compiler: Compiler) -> Path:
    return compiler.compile("netdev", snat.DEFINES)


def moved(item: Any) -> Any:
    """A type whose references to other types are moved along with its number."""
    if isinstance(item, list):
        return [moved(part) for part in item]
    if not isinstance(item, dict):
        return item
    return {key: value + NETDEV if key == "type_id" else moved(value) for key, value in item.items()}


def types_of(path: Path) -> dict[int, Any]:
    done = subprocess.run(["bpftool", "-j", "btf", "dump", "file", str(path)], capture_output=True, check=True)
    return {item["id"]: item for item in json.loads(done.stdout)["types"]}


def by_name(types: dict[str, Any], name: str) -> Any:
    return next(item for item in types.values() if item["kind"] == "STRUCT" and item["name"] == name)


def size_of(types: dict[str, Any], number: int) -> int:
    item = types[number]
    if item["kind"] in ("TYPEDEF", "CONST", "VOLATILE"):
        return size_of(types, item["type_id"])
    if item["kind"] == "ARRAY":
        return item["nr_elems"] * size_of(types, item["type_id"])
    return int(item["size"])


@pytest.mark.parametrize("name", STRUCTS)
def test_sizes_agree(types: dict[str, Any], name: str) -> None:
    assert by_name(types, name)["size"] == STRUCTS[name].size


@pytest.mark.parametrize("name", STRUCTS)
def test_no_struct_has_padding_that_the_compiler_chose(types: dict[str, Any], name: str) -> None:
    end = 0
    for member in by_name(types, name)["members"]:
        assert member["bits_offset"] == end * 8, f"hole before {name}.{member['name']}"
        end += size_of(types, member["type_id"])
    assert end == by_name(types, name)["size"], f"hole at the end of {name}"


@pytest.mark.parametrize("name", STRUCTS)
def test_members_begin_where_the_twin_reads_them(types: dict[str, Any], name: str) -> None:
    assert offsets(STRUCTS[name].format) == list(begins(types, by_name(types, name), 0))


def begins(types: dict[str, Any], item: Any, base: int) -> Iterator[int]:
    """Where each value of a type begins: every element of an array but of one of bytes, every member of a struct."""
    if item["kind"] == "STRUCT":
        for member in item["members"]:
            if member["name"] != "pad":
                yield from begins(types, types[member["type_id"]], base + member["bits_offset"] // 8)
    elif item["kind"] == "ARRAY" and size_of(types, item["type_id"]) > 1:
        size = size_of(types, item["type_id"])
        for number in range(item["nr_elems"]):
            yield from begins(types, types[item["type_id"]], base + number * size)
    else:
        yield base


def offsets(layout: str) -> list[int]:
    """Where each value of a struct format begins, padding left out."""
    found, position, count = [], 0, ""
    for letter in layout.lstrip("="):
        if letter.isdigit():
            count += letter
            continue
        if letter == "x":
            position += int(count or 1)
        elif letter == "s":
            found.append(position)
            position += int(count or 1)
        else:
            for _ in range(int(count or 1)):
                found.append(position)
                position += struct.calcsize("=" + letter)
        count = ""
    return found


def test_every_reason_has_a_text() -> None:
    reasons = drop_reasons()
    source = (Path(__import__("ciliate_bpf").__file__).parent / "lib" / "drop.h").read_text()
    assert len(reasons) == source.count("#define") - 1
    assert reasons[133] == "Policy denied"
