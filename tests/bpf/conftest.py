"""Tier bpf: needs root, clang, libbpf and a kernel with BPF; skips, saying which of these is missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from bpf_harness import Programs

packets_tried = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="tier bpf needs root"))


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    from bpf_harness import Programs

    programs = Programs(tmp_path_factory.mktemp("templates"))
    yield programs
    programs.close()


@pytest.fixture
def programs(loaded: Programs) -> Iterator[Programs]:
    """The loaded programs with both endpoints fresh; counters go on over tests."""
    loaded.reset()
    before = loaded.runs
    yield loaded
    global packets_tried
    packets_tried += loaded.runs - before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if packets_tried:
        terminalreporter.write_line(f"tier bpf: {packets_tried} packets tried through BPF_PROG_TEST_RUN")
