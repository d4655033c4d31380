"""Every example scenario answers as it expects; every example policy is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciliate.scenario import report
from ciliate.scenario.model import load_scenarios
from ciliate.scenario.run import simulate

EXAMPLES = Path(__file__).parents[3] / "examples"
FILES = sorted((EXAMPLES / "scenarios").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_scenario(file: Path) -> None:
    results = simulate(load_scenarios([file]))
    assert results[0].flows, "a scenario without flows shows nothing"
    assert report.failed(results) == 0, report.render_table(results)


def test_there_are_enough() -> None:
    assert len(FILES) >= 60
