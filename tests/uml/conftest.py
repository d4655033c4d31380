"""Tier uml: a second, older kernel (Debian's User-mode Linux 6.1, no BTF, no JIT). Root, user-mode-linux, kmod."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from uml import Outcome

REPOSITORY = Path(__file__).parents[2]
results: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from uml import missing

    lacking = missing()
    for item in items:
        if lacking and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"tier uml needs {lacking}"))


@pytest.fixture
def inside(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Outcome]:
    """Run a command of the repository in a User-mode Linux of its own."""
    import uml

    def run(command: Sequence[str], limit: float = 120.0) -> Outcome:
        job = tmp_path / f"job{len(list(tmp_path.iterdir()))}"
        job.mkdir()
        outcome = uml.run(command, job, limit, directory=REPOSITORY)
        last = (outcome.output.strip().splitlines() or [""])[-1]
        said = last if "passed" in last or "expected" in last else f"status {outcome.status}"
        results.append(f"{request.node.name}: {outcome.seconds:.1f} s: {said}")
        return outcome

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in results:
        terminalreporter.write_line(f"tier uml: {line}")
