"""Every mistake of `examples/bad` is listed with file, line and field. Tier unit."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ciliate.cli.policy_offline import validate
from ciliate.manifest import ManifestError, load
from ciliate.policy.problems import PolicyError
from ciliate.policy.repository import Repository

ROOT = Path(__file__).parents[3]
BAD = ROOT / "examples" / "bad"
UNREADABLE = {"not-yaml", "twice-key"}
"""Files that end at their first mistake."""


def test_every_mistake_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = [str(path.relative_to(ROOT)) for path in sorted(BAD.glob("*.yaml"))]
    done = CliRunner().invoke(validate, files)
    assert done.exit_code == 1
    assert done.output == (BAD / "expected.txt").read_text()


@pytest.mark.parametrize("path", sorted(BAD.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_file_has_several_mistakes(path: Path) -> None:
    lines = [line for line in (BAD / "expected.txt").read_text().splitlines() if f"/{path.name}:" in line]
    assert len(lines) > 2 or path.stem in UNREADABLE


@pytest.mark.parametrize("path", sorted(BAD.glob("*.yaml")), ids=lambda path: path.stem)
def test_none_of_them_changes_anything(path: Path) -> None:
    repository = Repository()
    with pytest.raises((ManifestError, PolicyError)):
        repository.import_documents(load([path]))
    assert (repository.objects(), repository.revision) == ([], 1)
