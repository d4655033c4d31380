"""Accesses to BPF maps are timed by map, operation and outcome, and counted alike. Needs root."""

from __future__ import annotations

import pytest

from ciliate.datapath import bpf
from ciliate.datapath.errors import DatapathError
from ciliate.measure import FAILURE, MEASURED, SUCCESS, Count, Times

NAME = "test_accesses"
HASH = 1


def test_accesses_are_timed() -> None:
    (times,) = [item for item in MEASURED if item.name == "bpf_map_ops_duration_seconds"]
    (count,) = [item for item in MEASURED if item.name == "bpf_map_ops"]
    assert isinstance(times, Times) and isinstance(count, Count)
    assert times.labels == count.labels == ("mapName", "operation", "outcome")
    table = bpf.Map.create(HASH, 4, 4, 4, name=NAME)
    try:
        table.update(b"aaaa", b"1111")
        table.update(b"aaaa", b"2222")
        assert table.lookup(b"aaaa") == b"2222"
        assert table.lookup(b"bbbb") is None
        with pytest.raises(DatapathError):
            table.update(b"aaaa", b"3333", bpf.NOEXIST)
        table.update_batch(b"ccccdddd", b"11112222", 2)
    finally:
        table.close()
    found = {labels[1:]: item for labels, item in times.values().items() if labels[0] == NAME}
    counts = {labels[1:]: number for labels, number in count.values().items() if labels[0] == NAME}
    assert {labels: item.cumulative[-1] for labels, item in found.items()} == counts
    assert counts[("update", SUCCESS)] == 2
    assert counts[("lookup", SUCCESS)] == 2
    assert counts[("update", FAILURE)] == 1
    assert all(0 < item.total < 60 for item in found.values())
