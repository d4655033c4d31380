"""`plugins list`: from metadata and source text alone."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ciliate.plugin.listing import static_listing

SHIPPED = {
    ("chaining", "none"),
    ("identity", "kvstore"),
    ("ipam", "host-scope"),
    ("kvstore", "embedded"),
    ("loader", "shared"),
}


def install(site: Path, distribution: str, module: str, source: str | None) -> None:
    info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[ciliate.plugins]\nkvstore-other = {module}\n")
    if source is not None:
        (site / f"{module}.py").write_text(textwrap.dedent(source))


def test_the_shipped_ones_are_named_with_everything() -> None:
    records = [item for item in static_listing({"kvstore": "embedded"}) if item["distribution"] == "ciliate"]
    assert {(item["kind"], item["name"]) for item in records} >= SHIPPED
    for item in records:
        assert item["version"]
        assert item["summary"]
        assert item["state"] in ("active", "available")
    assert next(item for item in records if item["name"] == "embedded")["state"] == "active"


SOURCES = [
    ("no module", None, "broken", "not installed"),
    ("syntax", "def broken(:\n", "broken", "syntax error"),
    ("no hook", "x = 1\n", "broken", "has no ciliate_register_<kind> hook"),
    (
        "good, and dangerous to import",
        """
        raise SystemExit("imported!")
        def ciliate_register_kvstore():
            return KvstoreProvider(name="theirs", summary="A store", factory=_create)
        """,
        "available",
        "",
    ),
    (
        "needs a library that is not here",
        """
        def ciliate_register_kvstore():
            return KvstoreProvider(name="t", summary="A store", factory=_create, requires="nobody_has_this", extra="x")
        """,
        "unavailable",
        "nobody_has_this is missing: pip install 'other-dist[x]'",
    ),
]


@pytest.mark.parametrize(("name", "source", "state", "reason"), SOURCES, ids=[row[0] for row in SOURCES])
def test_third_parties_are_read_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str | None, state: str, reason: str
) -> None:
    install(tmp_path, "other-dist", "other_module", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    record = next(item for item in static_listing({}) if item["distribution"] == "other-dist")
    assert record["state"] == state
    assert reason in record["reason"]
    assert record["version"] == "1.2"
    assert "other_module" not in sys.modules


def test_safe_mode_and_blocking_show() -> None:
    record = next(item for item in static_listing({}, disabled=("loader-shared",)) if item["name"] == "shared")
    assert record["state"] == "disabled"


def test_the_command_imports_no_plugin() -> None:
    script = (
        "import sys, json, io, contextlib\n"
        "from ciliate.cli.main import cli\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out):\n"
        "    cli.main(['plugins', 'list', '-o', 'json'], standalone_mode=False)\n"
        "loaded = [name for name in sys.modules if name.startswith('ciliate_')]\n"
        "print(json.dumps({'records': json.loads(out.getvalue()), 'loaded': loaded}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["loaded"] == []
    assert {(item["kind"], item["name"]) for item in answer["records"]} >= SHIPPED
    assert {"name", "kind", "state", "distribution", "version"} <= set(answer["records"][0])
