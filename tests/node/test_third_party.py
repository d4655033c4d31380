"""A third party's package: built, installed beside ours, listed, checked, used, switched. Needs root and an index."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ciliate.plugin.conformance import cases_of

ROOT = Path(__file__).parents[2]


def test_a_strangers_store_is_listed_checked_and_used() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "demo-plugin.sh", sys.executable], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.split(r"\n\d\. ", done.stdout)
    assert "ciliate_journal_store-1.0.0-py3-none-any.whl" in steps[1]
    assert re.search(r"kvstore +journal +available +ciliate-journal-store 1\.0\.0", steps[3])
    assert f"{len(cases_of('kvstore'))} passed, 0 failed" in steps[4]
    assert "kvstore=journal" in steps[5]
    assert re.search(r"kvstore +journal +active", steps[5])
    switches = steps[6].split("$ ciliate ")
    assert re.search(r"kvstore +embedded +ciliate\b", switches[1])
    assert re.search(r"kvstore +journal +ciliate-journal-store", switches[2])
    assert switches[3].count("ready") == 3
    assert "is down" in steps[7]
