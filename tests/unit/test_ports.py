"""Ranges of ports, and the kernel's list of those that it chooses for no socket. Tier unit."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciliate.agent.reservedports import ReservedPorts
from ciliate.config import ConfigError, load_config
from ciliate.ports import common, merged, parse_range, subtracted, without


def test_ranges() -> None:
    assert merged([(5, 9), (1, 2), (3, 4), (8, 20), (30, 30)]) == ((1, 20), (30, 30))
    assert without((10, 20), [(1, 11), (15, 15), (20, 40)]) == ((12, 14), (16, 19))
    assert without((10, 20), [(1, 40)]) == ()
    assert common([(1, 10), (20, 30)], [(5, 25)]) == ((5, 10), (20, 25))
    assert subtracted([(1, 10)], [(3, 4), (10, 12)]) == ((1, 2), (5, 9))


@pytest.mark.parametrize("text", ["30000", "30000-", "-5", "5-4", "0-9", "1-65536", "a-b", "1-2-3"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected two ports"):
        parse_range(text)


@pytest.mark.parametrize(("value", "expected"), [("30000", "expected two ports"), ("1-40000", "at most 32768 ports")])
def test_the_option_says_what_was_expected(value: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"node-port-range.*{expected}"):
        load_config({"node-port-range": value})


@pytest.fixture
def sysctl(tmp_path: Path) -> Path:
    (tmp_path / "ip_local_port_range").write_text("32768\t60999\n")
    (tmp_path / "ip_local_reserved_ports").write_text("8080,40000-40002\n")
    return tmp_path


async def test_ports_are_added_and_taken_away_again_and_others_stay(sysctl: Path) -> None:
    def list_now() -> str:
        return (sysctl / "ip_local_reserved_ports").read_text().strip()

    file = sysctl / "state.json"
    await ReservedPorts(file, sysctl).sync([(30000, 32767)])
    assert (list_now(), file.exists()) == ("8080,40000-40002", False), "out of reach for the kernel"
    await ReservedPorts(file, sysctl).sync([(30000, 32768), (40001, 40003), (50000, 50000)])
    assert list_now() == "8080,32768,40000-40003,50000"
    # another agent goes on, and somebody adds one meanwhile
    (sysctl / "ip_local_reserved_ports").write_text(f"{list_now()},9090\n")
    await ReservedPorts(file, sysctl).sync([(50000, 50001)])
    assert list_now() == "8080,9090,40000-40002,50000-50001"
    await ReservedPorts(file, sysctl).sync([])
    assert (list_now(), file.exists()) == ("8080,9090,40000-40002", False)
