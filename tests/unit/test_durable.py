"""Files written together: all of them, in order, and each with its own error. Tier unit."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ciliate import atomicfile
from ciliate.durable import DurableWriter


async def test_many_files_share_the_flush_of_their_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    flush = atomicfile.sync_directory
    monkeypatch.setattr(atomicfile, "sync_directory", lambda path: (flushed.append(path), flush(path)))
    writer = DurableWriter()
    await asyncio.gather(*(writer.write(tmp_path / f"{number}", b"%d" % number) for number in range(50)))
    assert [(tmp_path / f"{number}").read_text() for number in range(50)] == [f"{number}" for number in range(50)]
    assert len(flushed) <= 3
    writer.close()


async def test_one_path_is_written_in_the_order_asked_for(tmp_path: Path) -> None:
    writer, path = DurableWriter(), tmp_path / "file"
    await asyncio.gather(*(writer.write(path, b"%d" % number) for number in range(20)))
    assert path.read_text() == "19"
    await asyncio.gather(writer.write(path, b"more"), writer.remove(path))
    assert not path.exists()
    await writer.remove(path)
    writer.close()


async def test_each_has_its_own_error(tmp_path: Path) -> None:
    writer = DurableWriter()
    good, bad = writer.write(tmp_path / "a", b"1"), writer.write(tmp_path / "missing" / "b", b"2")
    results = await asyncio.gather(good, bad, return_exceptions=True)
    assert results[0] is None and isinstance(results[1], FileNotFoundError)
    assert (tmp_path / "a").read_bytes() == b"1"
    writer.close()


async def test_who_is_cancelled_stops_nobody_else(tmp_path: Path) -> None:
    writer = DurableWriter()
    first, second, third = (writer.write(tmp_path / name, b"x") for name in "abc")
    second.cancel()
    await asyncio.gather(first, third)
    assert (tmp_path / "b").exists()
    writer.close()
    await writer.write(tmp_path / "d", b"x")
    assert (tmp_path / "d").exists()
    writer.close()
