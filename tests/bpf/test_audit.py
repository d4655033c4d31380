"""The audit of a lab tells what is missing, also what it would read: it never breaks off. Tier bpf."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ciliate.datapath import pins
from ciliate.lab import audit


def test_pins_that_are_gone_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "bpf"
    pins.mount_bpffs(root)
    lab: Any = SimpleNamespace(directory=SimpleNamespace(bpf_dir=root, state_dir=tmp_path / "state"))
    monkeypatch.setattr(audit, "endpoints", lambda lab: {})
    for part in ("_addresses", "_devices", "_files"):
        monkeypatch.setattr(audit, part, lambda lab, known: iter(()))
    try:
        found = audit.leftovers(lab)
    finally:
        pins.unmount(root)
    assert [text for text in found if "ciliate_ep" in text and "cannot be read" in text]


@pytest.mark.parametrize("part", ["_addresses", "_devices", "_files", "_identities", "_maps"])
def test_a_part_that_changes_under_its_hands_is_told(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(lab: Any, known: Any) -> Any:
        yield "first"
        raise FileNotFoundError(2, "No such file or directory", "/gone")

    lab: Any = SimpleNamespace()
    monkeypatch.setattr(audit, "endpoints", lambda lab: {})
    for name in ("_addresses", "_devices", "_files", "_identities", "_maps"):
        monkeypatch.setattr(audit, name, breaks if name == part else lambda lab, known: iter(()))
    found = audit.leftovers(lab)
    assert found[0] == "first" and "/gone" in found[1]
