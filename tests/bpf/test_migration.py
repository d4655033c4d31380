"""Maps that change while packets pass: an agent that is killed at any step is followed by one that converges."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_harness import CLIENT, SERVER, STRANGER, InNode, Net, address, connect_all, server_policy, started, tcp

from ciliate.datapath import EndpointConfig, bpf, mapversions, migration
from ciliate.datapath.bpf import Map
from ciliate.datapath.mapfields import Fields
from ciliate.datapath.maplayouts import REGISTRY, Layout, MapLayouts
from ciliate.datapath.mapversions import UnknownLayoutError
from ciliate.datapath.pins import PinDirectory, unmount

PORT, SIZE = 80, 8192
TABLE = "ciliate_ct_tcp"


class Killed(BaseException):
    """The agent ends here."""


class Node(InNode):
    """A node whose agents are started as real ones are: endpoints again, then the switch."""

    size = 4096

    def _make(self) -> Any:
        datapath = super()._make()
        datapath.config.sizes[TABLE] = self.size
        return datapath

    async def begin(self, configs: dict[int, EndpointConfig]) -> None:
        """A new agent, up to the switch."""
        self.datapath = self._make()
        await self.datapath.start()
        for number, config in configs.items():
            await self.datapath.add_endpoint(config, server_policy() if number == SERVER else {})
        await self.datapath.programs.start()

    async def kill(self) -> None:
        """Nothing is closed in order: only threads, which would stay."""
        await self.datapath._end_threads()

    @property
    def pins(self) -> PinDirectory:
        return PinDirectory(self.root / "bpffs", "test")

    def room(self) -> int:
        with contextlib.closing(Map.open(self.pins.of(TABLE))) as table:
            return int(table.max_entries)


@pytest.fixture
async def node(net: Net, tmp_path: Path, templates: Path, build: str) -> AsyncIterator[Node]:
    async with started(Node(net, tmp_path, build, templates)) as running:
        yield running  # type: ignore[misc]


class Talk:
    """A connection from the server's pod: its answers pass by what conntrack knows alone."""

    def __init__(self, net: Net) -> None:
        target = address(CLIENT, 4)
        listener = net.run(f"pod{CLIENT}", lambda: socket.create_server((target, PORT)))
        self._net = net
        self.ends = [net.run(f"pod{SERVER}", lambda: socket.create_connection((target, PORT), 5)), listener.accept()[0]]
        self.ends.append(listener)

    def goes_on(self) -> None:
        """Both ways, at once; and what is denied stays so."""
        for source, target in (self.ends[:2], self.ends[1::-1]):
            source.sendall(b"word")
            target.settimeout(5)
            assert target.recv(16) == b"word"
        assert not tcp(self._net, f"pod{STRANGER}", address(SERVER, 4), PORT, 0.1)

    def close(self) -> None:
        for end in self.ends:
            end.close()


def once(function: Callable[..., Any], when: int = 0) -> Callable[..., Any]:
    """``function``, but the agent ends instead of the call number ``when`` (from 0)."""
    calls = iter(range(1000))

    def call(*arguments: Any) -> Any:
        if next(calls) == when:
            raise Killed
        return function(*arguments)

    return call


def half(entry: Map, slots: dict[int, int | None]) -> None:
    """Put programs into the first half of the slots."""
    programs = {slot: number for slot, number in slots.items() if number is not None}
    _put(entry, dict(list(programs.items())[: max(1, len(programs) // 2)]))
    raise Killed


_put = migration._put
STEPS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "while pins are mirrored": (migration, "_pin_again", once(migration._pin_again, 3)),
    "while a map is filled": (migration.Copy, "follow", once(migration.Copy.follow)),
    "ready to switch": (mapversions, "write_records", once(mapversions.write_records, 1)),
    "before the first program": (migration, "_put", once(migration._put)),
    "between programs": (migration, "_put", half),
    "after the last program": (migration, "_clear", once(migration._clear)),
    "before it catches up": (migration, "catch_up", once(migration.catch_up)),
    "before pins move": (migration, "_move", once(migration._move)),
    "between pins": (migration, "_move_rest", once(migration._move_rest)),
    "while pins move": (Path, "replace", once(Path.replace, 3)),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("build", ["shared"], indirect=True)
async def test_a_kill_at_a_step_is_followed_by_an_agent_that_goes_on(
    net: Net, node: Node, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = await connect_all(node)
    await node.datapath.programs.start()
    talk = Talk(net)
    talk.goes_on()
    await node.kill()
    node.size = SIZE
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*STEPS[step])
        await node.begin(configs)
        await node.datapath.switch()
    await node.kill()
    talk.goes_on()
    await node.begin(configs)
    await node.datapath.switch()
    talk.goes_on()
    assert node.room() == SIZE
    assert [path.name for path in node.pins.home.parent.iterdir()] == ["test"]
    talk.close()


@pytest.mark.parametrize("build", ["shared"], indirect=True)
@pytest.mark.parametrize("pinned", [3, 12])
async def test_a_kill_in_the_first_start_is_followed_by_an_agent_that_starts(
    net: Net, node: Node, pinned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many maps are pinned."""
    await node.kill()
    node.pins.remove()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(bpf, "pin", once(bpf.pin, pinned))
        await node.begin({})
    assert len(list(node.pins.path.iterdir())) == pinned
    await node.kill()
    await node.begin({})
    await connect_all(node)
    talk = Talk(net)
    talk.goes_on()
    talk.close()


async def test_nothing_serves_before_the_switch(net: Net, node: Node) -> None:
    configs = await connect_all(node)
    await node.datapath.programs.start()
    talk = Talk(net)
    before = node.programs(configs[SERVER].ifname)
    await node.datapath.stop()
    node.size = SIZE
    await node.begin(configs)
    assert (node.room(), node.programs(configs[SERVER].ifname)) == (4096, before)
    talk.goes_on()
    assert await node.datapath.switch()
    assert node.room() == SIZE
    talk.goes_on()
    assert not await node.datapath.switch()
    talk.close()


NAME = "ciliate_ct_any"
FIRST = REGISTRY[NAME].layouts[0]
"""What there was before there were records, so it may have none; the layouts after it are made up."""
GROWN = Fields(f"{FIRST.value.text} later:Q")


def registry(*more: Layout) -> dict[str, MapLayouts]:
    return {NAME: MapLayouts(NAME, (FIRST, *more), flows=True)}


def later(since: int, value: Fields = GROWN) -> Layout:
    return Layout(FIRST.key, value, since=since)


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[PinDirectory]:
    made = PinDirectory(tmp_path / "bpf", "test")
    made.open()
    yield made
    made.remove()
    unmount(tmp_path / "bpf")


def pin_map(pins: PinDirectory, key: int, value: int) -> None:
    pins.unlink(NAME)
    with contextlib.closing(Map.create(bpf.HASH, key, value, 8, 0, NAME)) as table:
        bpf.pin(table.descriptor, pins.of(NAME))


def found(pins: PinDirectory, *more: Layout) -> tuple[int, bool]:
    layout = mapversions.find_layouts(pins, [NAME], registry(*more))[NAME]
    return layout.number, layout.known


def test_a_layout_is_known_by_its_record_and_without_one_by_its_sizes(pins: PinDirectory) -> None:
    key, value = FIRST.shape.sizes
    pin_map(pins, key, value)
    assert found(pins) == found(pins, later(1)) == (1, True)
    pin_map(pins, key, GROWN.size)
    mapversions.write_records(pins, registry(later(1)))
    assert found(pins, later(1)) == (2, True)
    assert found(pins) == (2, False)  # an agent of before reads it by names
    pin_map(pins, key, value)  # by an agent that knows nothing of records
    assert found(pins) == found(pins, later(1)) == (1, True)


def test_what_is_recorded_of_a_map_that_was_not_replaced_yet_stays(pins: PinDirectory) -> None:
    newest = later(1, Fields(f"{GROWN.text} newest:Q"))
    pin_map(pins, FIRST.key.size, GROWN.size)
    mapversions.write_records(pins, registry(later(1)))
    mapversions.write_records(pins, registry(later(1), newest))
    assert found(pins, later(1)) == found(pins, later(1), newest) == (2, True)


@pytest.mark.parametrize(
    "recorded, known, said",
    [
        (None, [], "and no record of its layout"),
        ([later(2)], [], "which only agents of layout 2 and later can read"),
        ([later(1)], [later(1, Fields(f"{GROWN.text[:-7]}other:Q"))], "another layout 2 than the one that"),
    ],
    ids=["no record", "not to be read by names", "of another line"],
)
def test_what_cannot_be_read_is_refused_with_what_to_do(
    pins: PinDirectory, recorded: list[Layout] | None, known: list[Layout], said: str
) -> None:
    pin_map(pins, FIRST.key.size, GROWN.size)
    if recorded is not None:
        mapversions.write_records(pins, registry(*recorded))
    with pytest.raises(UnknownLayoutError) as raised:
        found(pins, *known)
    assert said in str(raised.value)
    assert "traffic goes on as it was" in str(raised.value) and str(pins.path) in str(raised.value)
