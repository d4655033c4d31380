"""State files: old or new, never half."""

import os
import signal
from pathlib import Path

import pytest

from ciliate import atomicfile


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert atomicfile.read_json(path) is None
    atomicfile.write_json(path, {"a": [1, 2]})
    assert atomicfile.read_json(path) == {"a": [1, 2]}
    assert path.stat().st_mode & 0o777 == 0o600
    atomicfile.remove(path)
    atomicfile.remove(path)
    assert atomicfile.read_json(path) is None


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "not JSON"), (b"[]", "schema"), (b'{"schema": 9}', "schema 9")]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        atomicfile.read_json(path)
    assert str(path) in str(caught.value)


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    atomicfile.write_json(path, "old")
    path.parent.chmod(0o700)
    with pytest.raises(OSError, match="No such file"):
        atomicfile.write_json(tmp_path / "missing" / "state.json", "new")
    assert atomicfile.read_json(path) == "old"


def test_kill_at_any_moment_leaves_one_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    atomicfile.write_json(path, [0] * 2000)
    for delay in range(12):
        child = os.fork()
        if child == 0:
            number = 0
            while True:
                number += 1
                atomicfile.write_json(path, [number] * 2000)
        for _ in range(delay * 3):
            atomicfile.read_json(path)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values = atomicfile.read_json(path)
        assert isinstance(values, list)
        assert len(values) == 2000
        assert len(set(values)) == 1
