"""Tier node: helpers of its tests are found beside them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciliate.lab.agent import TEMPLATES

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the first lab compiles serves every other one, those of commands too."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "node-templates"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TEMPLATES, str(shared))
        yield
