"""Maps that change their layout or size under traffic: the old ones serve until the new ones are filled. Blocking.

A change is prepared in a directory of pins beside the instance's own: maps that stay are pinned there too, those that
change are made anew and filled, and programs are loaded over them into an array of their own. Nothing that serves is
touched, whatever the agent does meanwhile. ``switch`` then puts all programs into the array that devices lead to, and
takes over what the old programs wrote until then. The directory's name says how far that is, so that an agent that is
killed meanwhile is followed by one that goes on or begins anew:

- ``INSTANCE~next``: in preparation. The next agent removes it and begins anew.
- ``INSTANCE~switch``: programs are being switched. The next agent completes that.
- ``INSTANCE~done``: all programs are switched, pins are being moved. The next agent moves the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ciliate.datapath import bpf, mapversions
from ciliate.datapath.bpf import Map
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.mapcopy import converted
from ciliate.datapath.mapfields import Convert, Entries
from ciliate.datapath.maplayouts import REGISTRY
from ciliate.datapath.mapversions import RECORDS
from ciliate.datapath.pins import ENTRY, PinDirectory, remove_directory

log = logging.getLogger(__name__)
NEXT, SWITCH, DONE = "~next", "~switch", "~done"
ROUNDS = 8
"""How often changes of a map are followed before and after programs are switched, unless there are none earlier."""
_MASK = (1 << 32) - 1


class Migration:
    """One change of one instance's maps. Where nothing has to change it does nothing."""

    def __init__(self, pins: PinDirectory) -> None:
        self._pins = pins
        self._changed: set[str] = set()
        self._copies: dict[str, Copy] = {}
        self._later: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        """Whether a change is prepared: what is loaded now does not serve before ``switch``."""
        return self._pins.path != self._pins.home

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Complete what an earlier agent began; then prepare, where a map has another layout or not this size.

        UnknownLayoutError, with everything as it was, where a map cannot be read.
        """
        pins = self._pins
        found = mapversions.find_layouts(pins, REGISTRY)
        if complete(pins):
            found = mapversions.find_layouts(pins, REGISTRY)
        self._changed = {name for name, layout in found.items() if layout != mapversions.current(name)}
        self._changed |= {name for name, size in sizes.items() if self._size(name) not in (0, size)}
        if not self._changed or not pins.entry.exists():
            return
        log.info(
            "maps %s change; programs in place serve until the new ones are ready", ", ".join(sorted(self._changed))
        )
        beside = _beside(pins, NEXT)
        beside.mkdir()
        for path in pins.home.iterdir():
            if path.name not in (*self._changed, ENTRY, RECORDS):
                _pin_again(path, beside / path.name)
        pins.path = beside

    def _size(self, name: str) -> int:
        if not self._pins.of(name).exists():
            return 0
        with contextlib.closing(Map.open(self._pins.of(name))) as table:
            return int(table.max_entries)

    def fill(self, name: str, descriptor: int) -> None:
        """Give a map that was made now the entries of the one that it replaces."""
        before = self._pins.home / name
        if not self.active or name not in self._changed or not before.exists():
            return
        old, new = Map.open(before), Map(os.dup(descriptor), name)
        convert = None
        if name in REGISTRY:
            found = mapversions.identify(old, mapversions.read_records(self._pins, self._pins.home).get(name))
            convert = mapversions.conversion(name, found, mapversions.current(name))
        copy = Copy(old, new, convert)
        copied = copy.follow()
        log.info("map %s: %d entries taken over", name, copied)
        if name in self._copies:
            self._copies.pop(name).close()
        self._copies[name] = copy

    def at_switch(self, step: Callable[[], None]) -> None:
        """Do this when programs are switched; it must be quick."""
        self._later.append(step)

    def switch(self) -> bool:
        """Let the programs that were loaded serve, over the new maps; whether there was anything to switch.

        What the old programs wrote meanwhile is taken over. The first error of a step of others is raised at the end.
        """
        if not self.active:
            return False
        pins, began = self._pins, time.monotonic()
        flows = [copy for copy in self._copies.values() if copy.flows]
        mapversions.write_records(pins)
        with contextlib.closing(Map.open(pins.entry)) as entry, contextlib.ExitStack() as stack:
            slots = _programs(pins.of(ENTRY), stack)
            last = 0
            for _ in range(ROUNDS):
                found = sum([copy.follow() for copy in flows])
                if not found or 0 < last < 2 * found:
                    break  # what is left changes all the time
                last = found
            pins.path = pins.path.rename(_beside(pins, SWITCH))
            _put(entry, slots)
            failed = self._do_later()
            _clear(entry, slots)
        taken = catch_up(flows)
        _move(pins)
        self.close()
        log.info(
            "programs switched to new maps in %.3f s; %d entries written meanwhile were taken over",
            time.monotonic() - began,
            taken,
        )
        if failed:
            raise failed[0]
        return True

    def _do_later(self) -> list[OSError]:
        failed = []
        for step in self._later:
            try:
                step()
            except OSError as error:
                log.error("while programs were switched: %s", error)
                failed.append(error)
        self._later = []
        return failed

    def close(self) -> None:
        """Close what is open. A change that was not switched is given up."""
        while self._copies:
            self._copies.popitem()[1].close()
        self._later = []
        if self.active and self._pins.path == _beside(self._pins, NEXT):
            remove_directory(self._pins.path)
            self._pins.path = self._pins.home


class Copy:
    """A map that takes over the entries of another one, which goes on changing."""

    def __init__(self, old: Map, new: Map, convert: Convert | None) -> None:
        self._old, self._new, self._convert = old, new, convert
        self.flows = old.name not in REGISTRY or REGISTRY[old.name].flows
        self._seen: dict[bytes, int] = {}
        """Of each key, digests of the old value that was seen last and of the new one that was made of it."""

    def close(self) -> None:
        """Close both maps."""
        self._old.close()
        self._new.close()

    def follow(self) -> int:
        """Write what is new or changed in the old map, while nobody uses the new one; how many entries that were."""
        written = 0
        for pairs in self._pairs():
            room = pairs if self._new.type == bpf.LRU_HASH else pairs[: max(0, self._new.max_entries - written)]
            self._new.update_many(new for _, new in room)
            written += len(room)
            if self.flows:
                self._seen.update((old[0], _digest(old[1]) << 32 | _digest(new[1])) for old, new in room)
        return written

    def take_over(self) -> int:
        """Write what came or changed in the old map since, while programs use the new one; how many entries that were.

        What programs wrote into the new map goes before.
        """
        written = 0
        for pairs in self._pairs():
            for old, (key, value) in pairs:
                before = self._seen.get(old[0])
                if before is None:
                    written += self._new.add(key, value)
                elif (now := self._new.lookup(key)) is not None and _digest(now) == before & _MASK:
                    self._new.update(key, value)
                    written += 1
                self._seen[old[0]] = _digest(old[1]) << 32 | _digest(value)
        return written

    def _pairs(self) -> Iterator[list[tuple[tuple[bytes, bytes], tuple[bytes, bytes]]]]:
        """What is new or changed in the old map since it was seen, and what it is in the new one."""
        if self._old.per_cpu:
            for entries, made in zip(converted(self._old, self._old, None), self._made(), strict=True):
                yield list(zip(entries, made, strict=True))
            return
        seen = self._seen
        for entries in converted(self._old, self._old, None):
            fresh = [item for item in entries if seen.get(item[0], -1) >> 32 != _digest(item[1])] if seen else entries
            if fresh:
                yield _matched(fresh, self._convert)

    def _made(self) -> Iterator[Entries]:
        return converted(self._old, self._new, self._convert)


def _digest(value: bytes) -> int:
    return hash(value) & _MASK


def _matched(entries: Entries, convert: Convert | None) -> list[tuple[tuple[bytes, bytes], tuple[bytes, bytes]]]:
    if convert is None:
        return [(item, item) for item in entries]
    made = convert(entries)
    if len(made) == len(entries):
        return list(zip(entries, made, strict=True))
    return [(item, new) for item in entries for new in convert([item])]


def catch_up(copies: list[Copy]) -> int:
    """Take over what the old programs wrote, those too that were at work when they were switched."""
    taken = 0
    for _ in range(ROUNDS):
        found = sum([copy.take_over() for copy in copies])
        taken += found
        if not found:
            break
    return taken


def complete(pins: PinDirectory) -> bool:
    """Complete or undo what an agent that was killed began; whether pins changed."""
    remove_directory(_beside(pins, NEXT))
    if _beside(pins, SWITCH).exists():
        log.warning("an agent ended while it switched programs to new maps; the switch is completed")
        _complete_switch(pins)
    elif _beside(pins, DONE).exists():
        _move_rest(pins)
    else:
        return False
    return True


def _complete_switch(pins: PinDirectory) -> None:
    pins.path = _beside(pins, SWITCH)
    with contextlib.closing(Map.open(pins.entry)) as entry, contextlib.ExitStack() as stack:
        _put(entry, _programs(pins.of(ENTRY), stack))
    copies = list(_interrupted(pins))
    try:
        catch_up(copies)
    finally:
        for copy in copies:
            copy.close()
    _move(pins)


def _interrupted(pins: PinDirectory) -> Iterator[Copy]:
    """The maps that programs write and that an agent before was replacing."""
    before, after = mapversions.read_records(pins, pins.home), mapversions.read_records(pins)
    for name in sorted(path.name for path in pins.path.iterdir()):
        if name not in REGISTRY or not REGISTRY[name].flows or not (pins.home / name).exists():
            continue
        old, new = Map.open(pins.home / name), Map.open(pins.of(name))
        try:
            if bpf.MapInfo(old.descriptor).id != bpf.MapInfo(new.descriptor).id:
                ends = mapversions.identify(old, before.get(name)), mapversions.identify(new, after.get(name))
                yield Copy(old, new, mapversions.conversion(name, *ends))
                continue
        except mapversions.UnknownLayoutError as error:
            log.error("flows that began while an agent was killed may be lost: %s", error)
        old.close()
        new.close()


def _move(pins: PinDirectory) -> None:
    """Let the new pins take the place of the old ones; those of them that have no successor go."""
    kept = {path.name for path in pins.path.iterdir()}
    for path in pins.home.iterdir():
        if path.name not in kept:
            path.unlink()
    pins.of(ENTRY).unlink()
    pins.path.rename(_beside(pins, DONE))
    _move_rest(pins)


def _move_rest(pins: PinDirectory) -> None:
    done = _beside(pins, DONE)
    for path in done.iterdir():
        path.replace(pins.home / path.name)
    done.rmdir()
    pins.path = pins.home


def _programs(path: Path, stack: contextlib.ExitStack) -> dict[int, int | None]:
    """Slot -> descriptor of its program, closed by ``stack``; None where the slot is empty."""
    found: dict[int, int | None] = {}
    with contextlib.closing(Map.open(path)) as table:
        for slot in range(table.max_entries):
            number = table.lookup(struct.pack("=I", slot))
            found[slot] = None
            if number is not None:
                found[slot] = program = bpf.program_by_id(int.from_bytes(number, "little"))
                stack.callback(os.close, program)
    return found


def _put(entry: Map, slots: Mapping[int, int | None]) -> None:
    for slot, program in slots.items():
        if program is not None:
            entry.update(struct.pack("=I", slot), struct.pack("=I", program))


def _clear(entry: Map, slots: Mapping[int, int | None]) -> None:
    for slot, program in slots.items():
        if program is None:
            entry.delete(struct.pack("=I", slot))


def _beside(pins: PinDirectory, suffix: str) -> Path:
    return pins.home.with_name(pins.home.name + suffix)


def _pin_again(path: Path, other: Path) -> None:
    descriptor = bpf.get_pinned(path)
    try:
        bpf.pin(descriptor, other)
    except OSError as error:
        raise DatapathError(error.errno, f"pin {other}: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(descriptor)
