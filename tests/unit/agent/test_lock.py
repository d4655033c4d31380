"""Who may run beside whom, and that strangers on the node have no say in it. Tier unit; root, to be a stranger, too."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ciliate.agent import lock
from ciliate.agent.lock import AgentLock, AgentRunningError
from ciliate.directories import DirectoryError, make_directory

NOBODY = 65534


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where locks of network namespaces are, for this test alone."""
    monkeypatch.setattr(lock, "NAMESPACES", tmp_path / "netns", raising=False)
    monkeypatch.setattr(lock, "GOING", 0.1)
    return tmp_path / "netns"


def of(directory: Path) -> AgentLock:
    directory.mkdir(exist_ok=True)
    return AgentLock(directory)


def test_one_agent_serves_a_network_namespace(tmp_path: Path) -> None:
    first, second = of(tmp_path / "one"), of(tmp_path / "two")
    first.acquire()
    with pytest.raises(AgentRunningError, match=rf"another agent \(process {os.getpid()}\) serves this network"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_name_that_everybody_may_take_does_not_count(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind("\0ciliate-agent")
        own = of(tmp_path / "own")
        own.acquire()
        own.release()


def test_locks_of_namespaces_that_are_gone_go(tmp_path: Path, place: Path) -> None:
    place.mkdir(mode=0o700)
    (place / "4-1.lock").write_text("77\n")
    own = of(tmp_path / "own")
    own.acquire()
    assert len(list(place.iterdir())) == 1
    own.release()
    assert list(place.iterdir()) == []


def everybody(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def of_nobody(path: Path) -> None:
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)


def below_everybody(path: Path) -> None:
    path.parent.joinpath("open").mkdir()
    path.parent.joinpath("open").chmod(0o777)
    path.symlink_to(path.parent / "open" / "inner")
    path.parent.joinpath("open", "inner").mkdir()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (everybody, r"run-dir \S+: everybody may write into \S+; expected"),
        (of_nobody, rf"run-dir \S+: \S+ belongs to user {NOBODY}; expected"),
        (below_everybody, r"run-dir \S+: everybody may write into \S+open; expected"),
    ],
)
def test_a_directory_in_which_strangers_may_write_is_refused(
    tmp_path: Path, make: Callable[[Path], None], says: str
) -> None:
    make(tmp_path / "place")
    with pytest.raises(DirectoryError, match=says):
        make_directory(tmp_path / "place", "run-dir", 0o755)


def test_a_directory_below_one_with_the_sticky_bit_will_do(tmp_path: Path) -> None:
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    make_directory(tmp_path / "sticky" / "own", "run-dir", 0o755)
