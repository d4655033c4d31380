"""Other versions of this project for tests of upgrades: one of its history, and one to come with made-up layouts."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("core", "plugins", "bpf")
BEFORE_PLACES = "a3d04f8~1"
"""The commit before the last one that changed the key of a map: that of policy had no place."""


def of_history(commit: str, target: Path) -> Path:
    """The sources of a commit; the test is skipped where the clone is too shallow to have it."""
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "archive", commit, *SOURCES]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"commit {commit} is not in this clone: {done.stderr.decode().strip()}")
    target.mkdir()
    subprocess.run(["tar", "x", "-C", str(target)], input=done.stdout, check=True)
    return target


GROWN = {
    "policy_key": ("types.h", "layout.py", "POLICY_KEY"),
    "ct_key": ("types.h", "layout.py", "CT_KEY"),
    "ct_entry": ("types.h", "layout.py", "CT_ENTRY"),
    "lb_flow": ("lb_types.h", "lblayout.py", "FLOW"),
    "lb_service": ("lb_types.h", "lblayout.py", "SERVICE"),
    "snat_key": ("nattypes.h", "snat.py", "SNAT_KEY"),
    "snat_entry": ("nattypes.h", "snat.py", "SNAT_ENTRY"),
}
"""Structs that have eight bytes more in the version to come: header, and the twin in Python."""


def maps_of(structs: Collection[str]) -> dict[str, tuple[bool, bool]]:
    """Every map of the programs that has one of these as its key or value, and which of the two it is."""
    found = {}
    for path in sorted((ROOT / "bpf").rglob("*.[ch]")):
        for name, key, value in re.findall(
            r"(?m)^MAP\((\w+), \w+, [^,]+, (?:struct )?(\w+), (?:struct )?(\w+),", path.read_text()
        ):
            if key in structs or value in structs:
                found[name] = key in structs, value in structs
    return found


MAPS = maps_of(GROWN)
"""Maps of these structs: whether key and value grow."""


def to_come(target: Path, since: int = 1) -> Path:
    """This tree as a version to come: keys and values of maps that programs and the agent write are longer.

    ``since``: see `ciliate.datapath.maplayouts.Layout`.
    """
    for name in SOURCES:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (header, module, twin) in GROWN.items():
        change(
            target / "bpf" / "ciliate_bpf" / "lib" / header,
            rf"(struct {name} \{{\n(?:[^}}]*\n)?)\}};",
            r"\1\t__u32 made_up[2];\n};",
        )
        change(
            target / "core" / "ciliate" / "datapath" / module,
            rf'(?m)^({twin} = struct.Struct\("[^"]*)"\)',
            r'\g<1>8x")',
        )
    with (target / "core" / "ciliate" / "datapath" / "maplayouts.py").open("a") as file:
        file.write(REGISTER.format(maps=MAPS, since=since))
    return target


REGISTER = """

def _grown(item: MapLayouts, key: bool, value: bool) -> MapLayouts:
    last, more = item.current, " made_up0:I made_up1:I"
    new = Layout(
        Fields(last.key.text + more * key), Fields(last.value.text + more * value), since={since} or item.number + 1
    )
    return MapLayouts(item.name, (*item.layouts, new), item.flows)


REGISTRY.update((name, _grown(REGISTRY[name], *grows)) for name, grows in {maps}.items())
"""


def change(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count == 1, f"{path}: {pattern} found {count} times"
    path.write_text(text)


@contextlib.contextmanager
def version(tree: Path | None) -> Iterator[None]:
    """Agents that are started meanwhile are of this version; None is the one under test."""
    roots = [] if tree is None else [tree / "core", *sorted((tree / "plugins").iterdir()), tree / "bpf"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        if roots:
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, roots)))
        yield
