"""Files that are broken or hostile: each mistake is one line with file and line number, nothing else is read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from ciliate.manifest import ManifestError, load, mapping

LEVELS = "abcdefghijk"
BOMB = "a: &a [x]\n" + "".join(f"{new}: &{new} [{','.join(9 * [f'*{old}'])}]\n" for old, new in pairwise(LEVELS))
GOOD = b"kind: Pod\r\nmetadata: {name: x}\r\n"


@pytest.mark.parametrize(
    ("content", "line", "told"),
    [
        (b"a: \0\n", 1, "not YAML: unacceptable character"),
        (b"<<: [1]\n", 1, "document: expected a mapping to merge"),
        (b"a:\n\t x: 1\n", 2, "not YAML"),
        (b"a: 1\na: 2\n", 2, "a: given twice"),
        (b"a: [\n", 2, "not YAML"),
        (b"a: &a [*a]\n", 1, "at most 60 nested levels"),
        (b"a: " + b"[" * 5000, 1, "not YAML"),
        (b"a: .inf\n", 1, "is not a plain float"),
        (b"a: !!binary '@@@'\n", 1, "is not a plain binary"),
        (b'{"kind": "\\ud800"}', 1, "not YAML"),
        (GOOD + b"---\n- {a: 1}\n- 2\n", 5, "expected a rule"),
        (GOOD.decode().encode("utf-16"), 0, "expected UTF-8"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes, line: int, told: str) -> None:
    (file := tmp_path / "f.yaml").write_bytes(content)
    with pytest.raises(ManifestError, match=told) as caught:
        load([file])
    (text,) = str(caught.value).splitlines()
    assert text.startswith(f"{file}:{line}: " if line else f"{file}: ")


def test_a_bomb_is_defused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciliate.manifest.MAX_ITEMS", 10_000)
    (file := tmp_path / "f.yaml").write_text(BOMB)
    for read in (lambda: load([file]), lambda: mapping(file)):
        with pytest.raises(ManifestError, match="10000 items"):
            read()


@pytest.mark.parametrize(("content", "count"), [(b"", 0), (b"# nothing\n---\n---\n", 0), (b"\xef\xbb\xbf" + GOOD, 1)])
def test_what_is_odd_but_well(tmp_path: Path, content: bytes, count: int) -> None:
    (file := tmp_path / "f.yaml").write_bytes(content)
    assert len(load([file])) == count


def test_an_empty_name_is_not_this_folder() -> None:
    with pytest.raises(ManifestError, match="expected a file or folder"):
        load([""])
