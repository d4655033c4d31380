"""What is shipped: every area is a package of the wheel, every wall has a contract that turns red. Tier unit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
AREAS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("plugins/*/ciliate_*"))
SOURCES = ("core", "bpf", "plugins")


def copy_of_the_project(target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in SOURCES:
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, target / name)
    return target


def test_every_plugin_folder_is_a_package_of_the_wheel() -> None:
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [item for item in packages if item.startswith("plugins/")] == AREAS
    contracts = PROJECT["tool"]["importlinter"]
    names = {area.rpartition("/")[2] for area in AREAS}
    assert names <= set(contracts["root_packages"])
    for contract in contracts["contracts"][:2]:
        assert names == set(contract.get("forbidden_modules", contract.get("modules")))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = copy_of_the_project(tmp_path_factory.mktemp("project"))
    subprocess.run([sys.executable, "-m", "hatchling", "build"], cwd=project, check=True, capture_output=True)
    return project / "dist"


def shipped() -> set[str]:
    roots = [ROOT / "core", ROOT / "bpf", *(ROOT / "plugins").iterdir()]
    return {
        path.relative_to(root).as_posix()
        for root in roots
        for path in root.rglob("*")
        if path.is_file() and path.suffix in (".py", ".c", ".h", ".json", ".yaml", ".typed")
    }


def test_the_wheel_has_every_module_and_the_bpf_sources(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert shipped() - names == set()
    assert "ciliate_bpf/endpoint.c" in names
    assert "ciliate_bpf/lib/types.h" in names


def test_the_source_archive_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (project,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (first,), (second,) = dist.glob("*.whl"), (project / "dist").glob("*.whl")
    assert zipfile.ZipFile(first).namelist() == zipfile.ZipFile(second).namelist()


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("core/ciliate/duration.py", "import ciliate_ipam", "The core imports no plugin"),
        ("plugins/ipam/ciliate_ipam/hostscope.py", "import ciliate_kvstore", "Plugin areas know nothing of each other"),
        ("core/ciliate/policy/ports.py", "import ciliate.datapath", "Policy is pure"),
    ],
)
def test_a_breached_wall_turns_the_test_run_red(tmp_path: Path, module: str, line: str, contract: str) -> None:
    project = copy_of_the_project(tmp_path)
    path = project / module
    path.write_text(path.read_text() + f"\n{line}\n")
    roots = [project / "core", project / "bpf", *(project / "plugins").iterdir()]
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=project,
        env={"PYTHONPATH": ":".join(map(str, roots)), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract}" in done.stdout
    assert "BROKEN" in done.stdout
