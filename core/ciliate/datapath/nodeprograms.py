"""Programs on the node's own devices: its network cards (`netdev`), tunnels (`overlay`) and the router device (`host`).

A feature says which program it is part of, what it adds to it and on which devices it wants to run. A program is
compiled with everything that its features add, loaded over the pinned maps and put into its slots of ``ciliate_entry``;
devices run dispatchers that never change. So an upgrade is one step per slot, a new agent goes on where the last one
was, and a node without features loads and attaches nothing. None of this depends on the endpoint loader that is chosen.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import struct
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from ciliate.datapath import bpf, nodefilters
from ciliate.datapath.bpf import Map
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.libbpf import read
from ciliate.datapath.loader import LoadPlan, forget_strays, load_object
from ciliate.datapath.pins import PinDirectory

log = logging.getLogger(__name__)
T = TypeVar("T")


class Attachment(NamedTuple):
    """One program of a source file: its slot, the dispatcher that leads there, and the side of the device."""

    function: str
    slot: int
    dispatcher: str
    egress: bool


PROGRAMS: dict[str, tuple[Attachment, ...]] = {
    "netdev": (
        Attachment("from_netdev", 2, "entry_from_netdev", False),
        Attachment("to_netdev", 3, "entry_to_netdev", True),
    ),
    "overlay": (Attachment("from_overlay", 4, "entry_from_overlay", False),),
    "host": (Attachment("from_host", 5, "entry_from_host", True),),
}
"""Source file -> what it has; the slots are those of ``lib/maps.h``."""


@dataclass(frozen=True)
class NodeFeature:
    """What one feature adds to a program, and where it runs.

    ``devices`` are names; one that is not there (yet) is attached once it is. ``maps`` are the feature's own, unpinned
    when it is disabled. ``loaded`` is called in the datapath's thread once the maps are there and before any packet
    meets the program, to fill them.
    """

    name: str
    program: str
    devices: tuple[str, ...]
    defines: tuple[str, ...] = ()
    constants: Mapping[str, bytes] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    maps: tuple[str, ...] = ()
    loaded: Callable[[PinDirectory], None] | None = None


class Run(Protocol):
    """Runs a function in the datapath's thread."""

    def __call__(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """The function's result."""


class NodePrograms:
    """The one owner of these programs. Until ``start`` features only gather, so that a new agent switches once for all.

    Every method raises DatapathError where a step fails; programs that were in their slots go on then.
    """

    def __init__(self, run: Run, pins: PinDirectory, plan: Callable[[], LoadPlan]) -> None:
        self.run = run
        self.pins = pins
        self.plan = plan
        self._features: dict[str, NodeFeature] = {}
        self._started = False
        self._attached: dict[int, str] = {}
        self.devices: set[int] = set()
        """The interface indexes that run our programs now."""
        self.uplinks: Callable[[], Collection[str]] = tuple
        """Names of the devices that lead out of the node; blocking. They can take programs from the start on, whether
        or not a feature has any: to make them ready once they carry traffic would lose some of it."""

    async def start(self) -> None:
        """Realise what was enabled so far, and remove what an earlier run left that nobody enabled."""
        self._started = True
        await self.run(self._prepare)
        await self.run(self._realize)

    async def enable(self, feature: NodeFeature) -> None:
        """Add a feature, or change the one of that name. Traffic goes on by the old program until then."""
        await self._change({**self._features, feature.name: feature}, feature.program)

    async def disable(self, name: str) -> None:
        """Take a feature out of its program; where it was the last one the program goes. Its maps go after that."""
        feature = self._features.get(name)
        if feature is None:
            return
        rest = {key: value for key, value in self._features.items() if key != name}
        await self._change(rest, feature.program)
        if self._started:
            await self.run(self._unpin, feature.maps)

    def features(self) -> dict[str, NodeFeature]:
        """What is enabled, by name."""
        return dict(self._features)

    async def _change(self, wanted: dict[str, NodeFeature], program: str) -> None:
        before, self._features = self._features, wanted
        if not self._started:
            return
        try:
            await self.run(self._realize_one, program)
        except BaseException:
            self._features = before
            raise

    # everything below blocks and runs in the datapath's thread

    def _prepare(self) -> None:
        names, present = self.uplinks(), nodefilters.device_indexes()
        for name in names:
            if name in present:
                nodefilters.prepare(present[name])

    def _realize(self) -> None:
        for program in PROGRAMS:
            self._realize_one(program)

    upgrade = _realize
    """Compile and load everything again (blocking)."""

    def _realize_one(self, program: str) -> None:
        users = [feature for feature in self._features.values() if feature.program == program]
        if users:
            self._load(program, users)
            self._attach(program, users)
        elif any(self.pins.of(item.dispatcher).exists() for item in PROGRAMS[program]):
            self._take_down(program)

    def _load(self, program: str, users: Collection[NodeFeature]) -> None:
        plan, compiler = merged(self.plan(), users), Compiler(self.plan().cache)
        loaded = load_object(read(compiler.compile(program, plan.defines)), program, plan)
        try:
            self._pin_dispatchers(program, compiler)
            for feature in users:
                if feature.loaded is not None:
                    feature.loaded(self.pins)
            entry = Map.open(self.pins.of("ciliate_entry"))
            try:
                for item in PROGRAMS[program]:
                    entry.update(_index(item.slot), struct.pack("=i", loaded.program_fd(item.function)))
            finally:
                entry.close()
        finally:
            loaded.close()
        self.pins.follow()
        log.info("program %s serves %s", program, ", ".join(feature.name for feature in users))

    def refill(self) -> None:
        """Let every feature write its maps once more; blocking."""
        for feature in self._features.values():
            if feature.loaded is not None:
                feature.loaded(self.pins)

    def _pin_dispatchers(self, program: str, compiler: Compiler) -> None:
        forget_strays(self.pins, [item.dispatcher for item in PROGRAMS[program]])
        missing = [item.dispatcher for item in PROGRAMS[program] if not self.pins.of(item.dispatcher).exists()]
        if not missing:
            return
        plan = self.plan()
        dispatch = load_object(read(compiler.compile("dispatch", plan.defines)), "dispatch", plan, missing)
        try:
            for name in missing:
                bpf.pin(dispatch.program_fd(name), self.pins.of(name))
        finally:
            dispatch.close()

    def _attach(self, program: str, users: Collection[NodeFeature]) -> list[str]:
        """Make the program's devices exactly those that are wanted; what was attached, in words."""
        wanted = {name for feature in users for name in feature.devices}
        done, present = [], nodefilters.device_indexes()
        for item in PROGRAMS[program]:
            descriptor = bpf.get_pinned(self.pins.of(item.dispatcher))
            try:
                # with the program's number in it: after the pins are gone there is another program of the same name
                label = f"ciliate_{item.dispatcher}:{bpf.ProgramInfo(descriptor).id}"
                for name, index in present.items():
                    ours = nodefilters.attached(index).get(item.egress) == label
                    if name in wanted and not ours:
                        nodefilters.attach(index, item.egress, descriptor, label)
                        done.append(f"{item.function} of {name}")
                    elif name not in wanted and ours:
                        nodefilters.detach(index, item.egress)
            finally:
                os.close(descriptor)
        self._remember(program, wanted, present)
        return done

    def _remember(self, program: str, wanted: Collection[str], present: Mapping[str, int]) -> None:
        others = {index for index, owner in self._attached.items() if owner != program}.intersection(present.values())
        self._attached = {index: self._attached[index] for index in others}
        self._attached |= {index: program for name, index in present.items() if name in wanted}
        self.devices.clear()
        self.devices.update(self._attached)

    def _take_down(self, program: str) -> None:
        """Filters first: a dispatcher that finds its slot empty counts a drop."""
        if all(self.pins.of(item.dispatcher).exists() for item in PROGRAMS[program]):
            self._attach(program, ())
        if self.pins.of("ciliate_entry").exists():
            entry = Map.open(self.pins.of("ciliate_entry"))
            try:
                for item in PROGRAMS[program]:
                    entry.delete(_index(item.slot))
            finally:
                entry.close()
        self._unpin([item.dispatcher for item in PROGRAMS[program]])
        log.info("program %s has no users and was removed", program)

    def _unpin(self, names: Collection[str]) -> None:
        for name in names:
            self.pins.unlink(name)

    def mend(self) -> list[str]:
        """Attach again what somebody detached, and to devices that are new; blocking. What was done, in words."""
        if not self._started:
            return []
        self._prepare()
        done = []
        for program in PROGRAMS:
            users = [feature for feature in self._features.values() if feature.program == program]
            if not users:
                continue
            if not self._intact(program):
                self._load(program, users)
                done.append(f"program {program} was not in its place")
            done += self._attach(program, users)
        return done

    def _intact(self, program: str) -> bool:
        items = PROGRAMS[program]
        if not all(self.pins.of(item.dispatcher).exists() for item in items):
            return False
        entry = Map.open(self.pins.of("ciliate_entry"))
        try:
            return all(entry.lookup(_index(item.slot)) is not None for item in items)
        finally:
            entry.close()

    def remove(self) -> None:
        """Take every program off its devices; blocking. Pins are the caller's."""
        present = nodefilters.device_indexes()
        ready = {present[name] for name in self.uplinks() if name in present} | self._attached.keys()
        self._features = {}
        self._realize()
        for index in ready.intersection(present.values()):
            nodefilters.restore(index)


def merged(plan: LoadPlan, users: Collection[NodeFeature]) -> LoadPlan:
    """The node's plan with what these features add."""
    constants, sizes = dict(plan.constants), dict(plan.sizes)
    defines = list(plan.defines)
    for feature in users:
        constants |= feature.constants
        sizes |= feature.sizes
        defines += [item for item in feature.defines if item not in defines]
    return dataclasses.replace(plan, constants=constants, sizes=sizes, defines=tuple(defines))


def _index(slot: int) -> bytes:
    return struct.pack("=I", slot)
