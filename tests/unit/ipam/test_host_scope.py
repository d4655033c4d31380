"""Host-scope allocation across kill -9 and changed ranges."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

import pytest

from ciliate import atomicfile
from ciliate.ipam import HEALTH, NODE, ROUTER, IpamConflict, IpamError, IpamExhausted
from ciliate.ipam.node import reserve_node
from ciliate_ipam.allocator import HostScope

ALLOCATOR = """
import asyncio, sys
from ipaddress import IPv4Network
from pathlib import Path
from ciliate_ipam.allocator import HostScope

async def main():
    ipam = HostScope([IPv4Network("10.1.0.0/16")], Path(sys.argv[1]))
    await ipam.start()
    number = 0
    while True:
        allocation = await ipam.allocate(f"{sys.argv[2]}-{number}")
        print(allocation.ipv4, flush=True)
        number += 1

asyncio.run(main())
"""


def test_no_address_twice_across_kill_9(tmp_path: Path) -> None:
    given: list[str] = []
    for round_number in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", ALLOCATOR, str(tmp_path / "ipam.json"), str(round_number)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        for _ in range(5 + round_number):
            given.append(process.stdout.readline().decode().strip())
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
        given.extend(line for line in rest.decode().split("\n")[:-1] if line)
    assert len(given) == len(set(given)) >= 60
    assert "10.1.0.1" not in given


async def test_a_changed_range_forgets_the_old_addresses(tmp_path: Path) -> None:
    path = tmp_path / "ipam.json"
    old = HostScope([IPv4Network("10.1.0.0/24"), IPv6Network("fd01::/112")], path)
    await old.start()
    await old.allocate("pod")
    new = HostScope([IPv4Network("10.2.0.0/24"), IPv6Network("fd01::/112")], path)
    await new.start()
    assert new.router.ipv4 == ip_address("10.2.0.1")
    assert {str(address) for address, owner in new.owners().items() if owner == "pod"} == {"fd01::3"}


@pytest.mark.parametrize("content", ["{", '{"data": {}}', '{"schema": 1, "data": {"owners": {"x": "y"}}}'])
async def test_a_damaged_file_is_set_aside_and_named(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ipam.json"
    path.write_text(content)
    ipam = HostScope([IPv4Network("10.1.0.0/24")], path)
    await ipam.start()
    assert set(ipam.owners().values()) == {ROUTER, HEALTH}
    assert path.with_suffix(".broken").read_text() == content and str(path) in caplog.text


async def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ipam.json"
    path.write_text('{"schema": 2, "data": {}}')
    with pytest.raises(IpamError, match=f"{path}: schema 2 found, expected 1: a newer version"):
        await HostScope([IPv4Network("10.1.0.0/24")], path).start()
    assert path.exists()


async def test_a_disk_that_refuses_gives_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ipam = HostScope([IPv4Network("10.1.0.0/24")], tmp_path / "ipam.json")
    await ipam.start()

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    await ipam.allocate("old")
    with monkeypatch.context() as patch:
        patch.setattr("ciliate.atomicfile.replace", full)
        results = await asyncio.gather(*(ipam.allocate(f"pod{n}") for n in range(3)), return_exceptions=True)
        assert ["No space left" in str(result) for result in results] == [True] * 3
        with pytest.raises(IpamError, match="No space left"):
            await ipam.release("old")
    assert set(ipam.owners().values()) == {ROUTER, HEALTH, "old"}
    assert await ipam.release("old")
    await ipam.allocate("pod0")
    assert set(ipam.owners().values()) == {ROUTER, HEALTH, "pod0"}
    await ipam.stop()


async def test_those_who_ask_at_once_share_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ipam = HostScope([IPv4Network("10.1.0.0/24")], tmp_path / "ipam.json")
    await ipam.start()
    writes = []

    def replace(path: Path, data: bytes, write: Callable[..., None] = atomicfile.replace) -> None:
        writes.append(data)
        write(path, data)

    monkeypatch.setattr("ciliate.atomicfile.replace", replace)
    await asyncio.gather(*(ipam.allocate(f"pod{number}") for number in range(50)))
    assert len(writes) <= 3
    known = HostScope([IPv4Network("10.1.0.0/24")], tmp_path / "ipam.json")
    await known.start()
    assert known.owners() == ipam.owners()
    await ipam.stop()


async def test_a_reservation_is_nobody_elses_before_it_is_on_disk(tmp_path: Path) -> None:
    ipam = HostScope([IPv4Network("10.1.0.0/29")], tmp_path / "ipam.json")
    await ipam.start()
    first, second = ipam.reserve("one"), ipam.reserve("two")
    assert first.allocation.ipv4 != second.allocation.ipv4
    with pytest.raises(IpamConflict, match="one"):
        ipam.reserve("one")
    await first.durable
    await second.durable
    assert "one" in (tmp_path / "ipam.json").read_text()
    await ipam.stop()


async def test_an_address_under_way_back_is_not_given_again(tmp_path: Path) -> None:
    ipam = HostScope([IPv4Network("10.1.0.0/29")], tmp_path / "ipam.json")
    await ipam.start()
    for number in range(4):
        await ipam.allocate(f"pod{number}")
    going = asyncio.ensure_future(ipam.release("pod0"))
    await asyncio.sleep(0)
    with pytest.raises(IpamExhausted):
        ipam.reserve("late")
    assert await going
    assert ipam.reserve("late").allocation.ipv4 is not None
    await ipam.stop()


def test_both_families_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IpamError, match="ipv4-range"):
        HostScope([], tmp_path / "ipam.json")


async def test_no_pod_gets_an_address_that_the_node_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pods = IPv4Network("10.1.0.0/29")
    ipam = HostScope([pods], tmp_path / "ipam.json")
    await ipam.start()
    inside, outside = [ip_address("10.1.0.4"), ip_address("10.1.0.5")], ip_address("192.0.2.1")

    async def told(*addresses: str) -> set[str]:
        await reserve_node(ipam, [pods], map(ip_address, addresses))
        return {str(address) for address, owner in ipam.owners().items() if owner == NODE}

    try:
        assert await told("10.1.0.1", "10.1.0.4", "10.1.0.5", str(outside)) == {"10.1.0.4", "10.1.0.5"}
        assert [str((await ipam.allocate(name)).ipv4) for name in ("a", "b")] == ["10.1.0.3", "10.1.0.6"]
        with pytest.raises(IpamExhausted):
            await ipam.allocate("c")
        assert await told("10.1.0.5") == {"10.1.0.5"}
        assert (await ipam.allocate("c")).ipv4 == inside[0]
        # given to the node after a pod got it: the pod's it stays
        assert caplog.records == []
        assert await told("10.1.0.3") == set()
        assert "10.1.0.3" in caplog.text and " a " in f"{caplog.text} "
        assert ipam.owners()[ip_address("10.1.0.3")] == "a"
    finally:
        await ipam.stop()
