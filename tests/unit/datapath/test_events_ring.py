"""Records of the ring buffer, those that go over its end too. Tier unit: a file stands for the map's memory."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

import pytest

from ciliate.datapath import bpf
from ciliate.datapath.events import EventReader

SIZE, PAGE = 4096, mmap.PAGESIZE
BUSY, DISCARD = 1 << 31, 1 << 30


class Ring:
    """Writes as the kernel does (Documentation/bpf/ringbuf.rst): header of 8 bytes, records begin at multiples of 8."""

    def __init__(self, path: Path, position: int) -> None:
        self.max_entries = SIZE
        path.write_bytes(bytes(2 * PAGE + SIZE))
        self.descriptor = os.open(path, os.O_RDWR)
        self._position = position
        os.pwrite(self.descriptor, struct.pack("=Q", position), 0)

    def write(self, record: bytes, flags: int = 0) -> None:
        whole = struct.pack("=II", len(record) | flags, 0) + record
        for index, byte in enumerate(whole):
            place = 2 * PAGE + (self._position + index) % SIZE
            os.pwrite(self.descriptor, bytes([byte]), place)
        self._position += (len(whole) + 7) & ~7
        os.pwrite(self.descriptor, struct.pack("=Q", self._position), PAGE)

    def consumed(self) -> int:
        """How many bytes are not consumed yet."""
        return self._position - int(struct.unpack("=Q", os.pread(self.descriptor, 8, 0))[0])

    def close(self) -> None:
        os.close(self.descriptor)


@pytest.mark.parametrize("length", [1, 8, 120, 157])
def test_records_are_whole_wherever_they_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    record = bytes(range(1, length + 1))
    for before_end in range(8, 2 * 160, 8):
        ring = Ring(tmp_path / "ring", 7 * SIZE - before_end)
        monkeypatch.setattr(bpf.Map, "open", lambda path, ring=ring: ring)
        reader = EventReader(tmp_path / "ring")
        ring.write(record)
        ring.write(b"not wanted", DISCARD)
        ring.write(record[::-1])
        ring.write(b"not complete", BUSY)
        assert reader.read() == [record, record[::-1]]
        assert ring.consumed() == 8 + 16
        assert reader.read() == []
        reader.close()
