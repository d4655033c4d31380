"""What is written at once never overtakes what another thread is writing still."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

from ciliate.datapath import Datapath, DatapathConfig
from ciliate.datapath.node import FEW


class Recorded(Datapath):
    """Remembers who wrote what; the kernel is not asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(DatapathConfig(state_dir=root, instance="order", bpf_root=root), None)  # type: ignore[arg-type]
        self.written: list[tuple[str, int]] = []

    def _change_ipcache(self, upserts: Mapping[bytes, bytes], deletes: Collection[bytes]) -> None:
        self.written.append((threading.current_thread().name.rstrip("_0123456789"), len(upserts) + len(deletes)))


def entries(count: int) -> dict[bytes, bytes]:
    return {number.to_bytes(4, "big"): b"" for number in range(count)}


@pytest.mark.parametrize(("count", "thread"), [(1, "MainThread"), (FEW, "MainThread"), (FEW + 1, "datapath")])
async def test_few_changes_are_written_at_once(tmp_path: Path, count: int, thread: str) -> None:
    datapath = Recorded(tmp_path)
    await datapath.change_ipcache(entries(count - 1), [b"gone"])
    assert datapath.written == [(thread, count)]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_few_changes_wait_for_what_is_under_way(tmp_path: Path, cancelled: bool) -> None:
    datapath, begun, go_on = Recorded(tmp_path), threading.Event(), threading.Event()

    def slowly() -> None:
        begun.set()
        assert go_on.wait(10)
        datapath.written.append(("slow", 0))

    first: asyncio.Task[Any] = asyncio.create_task(datapath._run(slowly))
    await asyncio.to_thread(begun.wait, 10)
    if cancelled:  # who asked for it is gone, but it goes on
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    second = asyncio.create_task(datapath.change_ipcache(entries(1)))
    await asyncio.sleep(0)
    assert datapath.written == []
    go_on.set()
    async with asyncio.timeout(10):
        await second
    assert datapath.written == [("slow", 0), ("datapath", 1)]
    await datapath.change_ipcache(entries(1))
    assert datapath.written[2:] == [("MainThread", 1)]
