"""One program per direction, data by class id, upgrades by one slot of a pinned program array."""

from __future__ import annotations

import os
import struct

from ciliate.datapath import bpf, devices
from ciliate.datapath.compiler import Compiler
from ciliate.datapath.libbpf import BpfObject, read
from ciliate.datapath.loader import LoadPlan, forget_strays, load_object

_SLOTS = {"from_container": 0, "to_container": 1}
_DISPATCHERS = ("entry_from", "entry_to")


class SharedLoader:
    """Filters run a dispatcher that never changes; it tail-calls ``ciliate_entry``, whose slots are the programs.

    The array and the dispatchers are pinned: the kernel empties a program array when its last holder goes, and an agent
    that comes back goes on with the dispatchers that are attached.
    """

    def __init__(self) -> None:
        self._dispatchers: dict[str, int] = {}
        self._template = ""

    def prepare(self, plan: LoadPlan) -> None:
        """Load the programs and put them into their slots, each in one step."""
        compiler = Compiler(plan.cache)
        path = compiler.compile("endpoint", plan.defines)
        programs = load_object(read(path), "endpoint", plan)
        try:
            dispatch = load_object(read(compiler.compile("dispatch", plan.defines)), "dispatch", plan, _DISPATCHERS)
            try:
                self._adopt_dispatchers(dispatch, plan)
                self._fill_slots(programs, plan)
            finally:
                dispatch.close()
        finally:
            programs.close()
        self._template = path.parent.name

    def template(self) -> str:
        """The name in the compiler's cache."""
        return self._template

    def _adopt_dispatchers(self, dispatch: BpfObject, plan: LoadPlan) -> None:
        self.close()
        forget_strays(plan.pins, _DISPATCHERS)
        for name in _DISPATCHERS:
            path = plan.pins.of(name)
            if not path.exists():
                bpf.pin(dispatch.program_fd(name), path)
            self._dispatchers[name] = bpf.get_pinned(path)

    def _fill_slots(self, programs: BpfObject, plan: LoadPlan) -> None:
        entry = bpf.Map.open(plan.pins.of("ciliate_entry"))
        try:
            for name, slot in _SLOTS.items():
                entry.update(struct.pack("=I", slot), struct.pack("=I", programs.program_fd(name)))
        finally:
            entry.close()

    def attach(self, ifindex: int, endpoint: int) -> None:
        """Two filters with the endpoint's id as class id."""
        ways = {True: "entry_to", False: "entry_from"}
        programs = {egress: (self._dispatchers[name], f"ciliate_{name}") for egress, name in ways.items()}
        devices.attach_filters(ifindex, programs, endpoint)

    def detach(self, ifindex: int) -> None:
        """Remove both filters."""
        devices.detach_filters(ifindex)

    def close(self) -> None:
        """Close the dispatchers' descriptors."""
        while self._dispatchers:
            os.close(self._dispatchers.popitem()[1])
