"""What a datapath loader is, and the programs and maps that every loader works with."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from ciliate.datapath import bpf, mapversions
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.libbpf import BpfObject, constants, without_lines
from ciliate.datapath.mapcopy import copy_entries
from ciliate.datapath.mapfields import Convert
from ciliate.datapath.maplayouts import REGISTRY
from ciliate.datapath.pins import ENTRY, PinDirectory

log = logging.getLogger(__name__)
SCRATCH = "_scratch"
INTERNAL = (".rodata", ".data", ".bss", ".kconfig", SCRATCH)
"""Ends of the names of maps that belong to one load alone and are not pinned."""


@dataclass(frozen=True)
class LoadPlan:
    """What a node wants loaded: where the pins are, constants by name, map sizes by name.

    ``defines`` choose the build that the kernel takes and the features of plugins; every object is compiled with them.
    ``fill`` is called with name and descriptor of every map that was made, before anything else sees it.
    """

    pins: PinDirectory
    cache: Path
    constants: Mapping[str, bytes]
    sizes: Mapping[str, int] = field(default_factory=dict)
    defines: tuple[str, ...] = ()
    fill: Callable[[str, int], None] | None = None


class Loader(Protocol):
    """A datapath loader. Methods block and run in threads, one at a time."""

    def prepare(self, plan: LoadPlan) -> None:
        """Compile, load and make current. Traffic of attached endpoints goes on, by the old programs until then."""

    def attach(self, ifindex: int, endpoint: int) -> None:
        """Put an endpoint's programs on its device, or replace in one step what is there, another loader's too.

        The endpoint's entry in the pinned ``ciliate_ep`` is valid by then; a loader may take constants from it.
        """

    def detach(self, ifindex: int) -> None:
        """Take an endpoint's programs off its device; nothing happens where the device is gone."""

    def template(self) -> str:
        """The name in the compiler's cache of what attached endpoints run; empty before ``prepare``."""

    def close(self) -> None:
        """Close descriptors; what is pinned or attached stays."""


@runtime_checkable
class Ready(Protocol):
    """What a loader has beside that takes its time to attach, so that many endpoints can be switched almost at once."""

    def ready(self, ifindex: int, endpoint: int) -> None:
        """Do what takes long of the next ``attach`` of this endpoint, and change nothing that it can notice."""


def load_object(elf: bytes, name: str, plan: LoadPlan, only: Collection[str] | None = None) -> BpfObject:
    """Load an object over the pinned maps: existing ones are used, missing ones are made and pinned.

    A pinned map of another shape is replaced by a new one with its entries copied; the old one serves until then.
    ``only``: the names of the programs to load, where not all of them are wanted.
    """
    plan.pins.mend()  # a map whose pin somebody removed would be made anew beside the one in use
    loaded = BpfObject(elf, name)
    try:
        for program in loaded.programs if only is not None else ():
            if only is not None and program not in only:
                loaded.skip_program(program)
        known = constants(elf)
        if plan.constants and known:
            loaded.set_constants(known, {key: value for key, value in plan.constants.items() if key in known})
        old = _reuse_pinned(loaded, plan)
        loaded.load()
        _pin_new(loaded, plan, old)
    except BaseException:
        loaded.close()
        raise
    return loaded


def forget_strays(pins: PinDirectory, dispatchers: Collection[str]) -> None:
    """Unpin dispatchers that lead to another ``ciliate_entry`` than the pinned one: its pin was removed meanwhile."""
    entry = bpf.get_pinned(pins.entry)
    try:
        wanted = bpf.MapInfo(entry).id
    finally:
        os.close(entry)
    for name in dispatchers:
        if not pins.of(name).exists():
            continue
        program = bpf.get_pinned(pins.of(name))
        try:
            stray = wanted not in bpf.maps_of(program)
        finally:
            os.close(program)
        if stray:
            log.warning(
                "program %s leads nowhere, as the pin of ciliate_entry was removed; another takes its place", name
            )
            pins.unlink(name)


class Template:
    """An object that is loaded again and again over the same maps: they stay open, and the ELF file is read once.

    The pinned maps must have the shapes that the object asks for, as they have once it was loaded by `load_object`.
    What packets are worked on in (``_scratch``) is shared too, as no packet comes in between.
    """

    def __init__(self, elf: bytes, name: str, plan: LoadPlan) -> None:
        self._elf, self._name, self._plan = without_lines(elf), name, plan
        self._constants = constants(elf)
        self._maps: dict[str, bpf.Map] = {}

    def load(self, values: Mapping[str, bytes]) -> BpfObject:
        """A new set of programs, with these constants beside those of the plan."""
        loaded = BpfObject(self._elf, self._name)
        try:
            _set_constants(loaded, self._constants, self._plan, values)
            shared = [name for name in loaded.maps if name.endswith(SCRATCH)]
            for name in _ordinary(loaded):
                if name not in self._maps:
                    self._maps[name] = bpf.Map.open(self._plan.pins.of(name))
            for name in self._maps:
                loaded.reuse_map(name, self._maps[name].descriptor)
            loaded.load()
            for name in shared:
                if name not in self._maps:
                    self._maps[name] = bpf.Map(os.dup(loaded.map_fd(name)), name)
        except BaseException:
            loaded.close()
            raise
        return loaded

    def close(self) -> None:
        """Close the maps."""
        while self._maps:
            self._maps.popitem()[1].close()


def _set_constants(
    loaded: BpfObject, known: Mapping[str, tuple[int, int]], plan: LoadPlan, more: Mapping[str, bytes] | None = None
) -> None:
    values = {**plan.constants, **(more or {})}
    if values and known:
        loaded.set_constants(known, {key: value for key, value in values.items() if key in known})


def _ordinary(loaded: BpfObject) -> list[str]:
    return [name for name in loaded.maps if not name.endswith(INTERNAL)]


def _reuse_pinned(loaded: BpfObject, plan: LoadPlan) -> dict[str, bpf.Map]:
    """Point the object at the pinned maps that fit; returns those that are there but do not fit."""
    misfits = {}
    for name in _ordinary(loaded):
        if name in plan.sizes:
            loaded.set_max_entries(name, plan.sizes[name])
        # dispatchers lead to the array that is in use, also while another one is filled
        path = plan.pins.entry if (loaded.name, name) == ("dispatch", ENTRY) else plan.pins.of(name)
        if not path.exists():
            continue
        pinned = bpf.Map.open(path)
        if (pinned.key_size, pinned.width, pinned.max_entries) != loaded.shape(name):
            misfits[name] = pinned
            continue
        try:
            loaded.reuse_map(name, pinned.descriptor)
        finally:
            pinned.close()
    return misfits


def _pin_new(loaded: BpfObject, plan: LoadPlan, old: Mapping[str, bpf.Map]) -> None:
    for name in _ordinary(loaded):
        path = plan.pins.of(name)
        previous = old.get(name)
        if previous is not None:
            fresh = bpf.Map(os.dup(loaded.map_fd(name)), name)
            copied = copy_entries(previous, fresh, _conversion(previous, fresh, plan))
            log.info("map %s: %d entries moved to one of %d", name, copied, fresh.max_entries)
            previous.close()
            fresh.close()
            plan.pins.unlink(name)
        if not path.exists():
            if plan.fill is not None:
                plan.fill(name, loaded.map_fd(name))
            with contextlib.closing(bpf.Map(os.dup(loaded.map_fd(name)), name)) as fresh:
                mapversions.record(plan.pins, fresh)
                bpf.pin(fresh.descriptor, path)


def _conversion(old: bpf.Map, new: bpf.Map, plan: LoadPlan) -> Convert | None:
    """What makes entries of the old map those of the new one; None where both have one layout."""
    if old.name in REGISTRY:
        found = mapversions.identify(old, mapversions.read_records(plan.pins).get(old.name))
        return mapversions.conversion(old.name, found, mapversions.current(old.name))
    if (old.key_size, old.value_size) != (new.key_size, new.value_size):
        text = f"map {old.name}: its entries have another layout than before and cannot be moved"
        raise DatapathError(errno.EINVAL, text)
    return None
