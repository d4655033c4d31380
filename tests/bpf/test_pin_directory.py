"""The directory of pins on a BPF file system into which everybody may write, as the kernel mounts it. Tier bpf."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciliate.datapath import pins
from ciliate.datapath.pins import PinDirectory

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bpf"
    pins.mount_bpffs(path)
    path.chmod(0o1777)
    yield path
    pins.unmount(path)


def of_nobody(path: Path) -> None:
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)


def test_a_strangers_directory_becomes_ours(root: Path) -> None:
    of_nobody(root / "ciliate")
    of_nobody(root / "ciliate" / "one")
    of_nobody(root / "ciliate" / "one" / "ciliate_policy")
    (root / "ciliate" / "two").symlink_to("/etc")
    os.lchown(root / "ciliate" / "two", NOBODY, NOBODY)
    own = PinDirectory(root, "one")
    own.open()
    for path in (root / "ciliate", own.path):
        assert (path.stat().st_uid, path.stat().st_mode & 0o022) == (0, 0)
    assert list(own.path.iterdir()) == []
    assert [path.name for path in (root / "ciliate").iterdir()] == ["one"]
    own.remove()


def test_a_strangers_link_leads_nowhere(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / "ciliate").symlink_to(tmp_path / "elsewhere")
    own = PinDirectory(root, "one")
    own.open()
    assert not (root / "ciliate").is_symlink()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    own.remove()


def test_other_instances_keep_theirs(root: Path) -> None:
    other, own = PinDirectory(root, "other"), PinDirectory(root, "own")
    other.open()
    (other.path / "kept").mkdir()
    own.open()
    assert (other.path / "kept").is_dir()
    (other.path / "kept").rmdir()
    for item in (own, other):
        item.remove()
