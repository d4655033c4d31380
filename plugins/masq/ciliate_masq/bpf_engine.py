"""The engine `bpf`: what `lib/nat.h` does on the node's devices, told by three maps."""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from ciliate.datapath import Datapath, kernelct, nodefilters, snat
from ciliate.datapath.errors import DatapathError
from ciliate.datapath.kernelct import KernelFlow
from ciliate.datapath.nodeprograms import NodeFeature, NodePrograms
from ciliate.datapath.pins import PinDirectory
from ciliate.datapath.snat import SnatEntry, Tables
from ciliate.masquerade import MAPPED_PORTS, Address, MasqueradedFlow, MasqueradePlan, PodUsage, Spare
from ciliate.ports import PortRange, common

log = logging.getLogger(__name__)
T = TypeVar("T")
FEATURE = "masquerade"
TOLD = 21600
"""Seconds for which a flow that another engine serves is kept at least, where nobody knows how long it lives."""
_ICMP = frozenset({1, 58})


class BpfMasquerade:
    """`ciliate.masquerade.Masquerade` by mappings in a BPF map."""

    def __init__(self, datapath: Datapath, programs: NodePrograms) -> None:
        self._datapath = datapath
        self._programs = programs
        self._plan: MasqueradePlan | None = None
        self._active = False

    async def engage(self, plan: MasqueradePlan, spare: Spare) -> None:
        """Fill the maps, then load and attach; where they are there already, traffic goes on throughout.

        Of the reserved ports the widest range is built in; services' own ports the programs see as such. What others
        masquerade has the node's address when it comes to the programs, so that flows which nobody told of are safe.
        """
        before = self._plan
        if before is not None and self._active and before != plan and _built(before) == _built(plan):
            self._plan = plan
            return
        await self._serve(plan, True, await spare())

    async def drain(self, plan: MasqueradePlan, successor: bool) -> None:
        """Serve on. With a successor new mappings are made for what that one cannot masquerade: what reaches a device
        with a pod's address was known to the kernel's conntrack before there was a rule, and rules see new flows alone.
        """
        if await self._datapath.sweep(self._there):
            await self._serve(plan, successor, ())

    def _there(self) -> bool:
        return (self._datapath.pins / snat.MAP).exists()

    async def _serve(self, plan: MasqueradePlan, active: bool, spared: Sequence[MasqueradedFlow]) -> None:
        feature = NodeFeature(
            FEATURE,
            "netdev",
            tuple(plan.devices),
            defines=snat.DEFINES,
            constants=snat.constants(_widest(plan), snat.pod_max(plan.entries)),
            sizes={snat.MAP: plan.entries},
            maps=(*snat.MAPS, snat.KNOWN),
            loaded=functools.partial(self._fill, plan, active, spared),
        )
        await self._programs.enable(feature)
        self._plan, self._active = plan, active

    def _fill(self, plan: MasqueradePlan, active: bool, spared: Sequence[MasqueradedFlow], pins: PinDirectory) -> None:
        with Tables(pins.path) as tables:
            snat.write_classes(tables.classes, plan.sources, plan.direct)
            _reserve_translated(plan, spared, tables)
            _forget_lost_addresses(plan, tables)
            _write_devices(plan, active, tables)
        snat.pin_known(pins, self._programs.plan(), plan.entries)

    async def remaining(self) -> int:
        """Mappings of pods that are alive."""
        now = int(time.monotonic())
        return await self._sweep(lambda tables: snat.alive(tables.mappings, now), 0)

    async def remove(self) -> None:
        """Programs, maps, and what the kernel's conntrack remembers of flows that were translated behind its back."""
        plan, self._plan = self._plan, None
        await self._programs.disable(FEATURE)
        if plan is not None:
            found = await self._programs.run(kernelct.forget, functools.partial(_untranslated, plan))
            log.info("masquerading by BPF is gone; the kernel forgot %d flows that it did not translate", found)

    async def mend(self) -> list[str]:
        """Write again what devices masquerade with which address: a device may have been made anew.

        Programs and filters are mended by whom they belong to, `NodePrograms`.
        """
        plan, active = self._plan, self._active
        if plan is None:
            return []
        changed = await self._programs.run(self._with_tables, functools.partial(_write_devices, plan, active))
        return ["the addresses of devices"] if changed else []

    async def collect(self) -> int:
        """Mappings whose lifetime is over or whose flow conntrack does not know any more."""
        return await self._sweep(lambda tables: tables.collect(), 0)

    async def flows(self) -> list[MasqueradedFlow]:
        """Every mapping of a pod."""
        now = int(time.monotonic())

        def found(tables: Tables) -> list[MasqueradedFlow]:
            return [_flow(entry, now) for entry in snat.entries(tables.mappings) if not entry.host]

        return await self._sweep(found, list[MasqueradedFlow]())

    async def flush(self, select: Callable[[MasqueradedFlow], bool]) -> int:
        """Remove mappings of pods."""
        now = int(time.monotonic())
        picked = lambda entry: not entry.host and select(_flow(entry, now))  # noqa: E731
        return await self._sweep(lambda tables: snat.flush(tables.mappings, picked), 0)

    async def forget(self, sources: Collection[Address]) -> int:
        """Both halves of the mappings of these addresses."""
        return await self._sweep(lambda tables: snat.flush_sources(tables.mappings, sources), 0)

    async def pressure(self) -> float:
        """How full the table is."""
        return await self._sweep(lambda tables: snat.pressure(tables.mappings), 0.0)

    async def usage(self) -> list[PodUsage]:
        """As the programs count."""
        plan = self._plan
        if plan is None:
            return []
        most = snat.pod_max(plan.entries)
        found = await self._sweep(lambda tables: snat.usage(tables.pods), list[snat.Usage]())
        return [
            PodUsage(source=item.source, mappings=item.mappings, share=item.mappings / most, refused=item.refused)
            for item in found
        ]

    async def _sweep(self, function: Callable[[Tables], T], otherwise: T) -> T:
        """Something about the tables, or ``otherwise`` where there are none (yet)."""

        def run() -> T:
            try:
                return self._with_tables(function)
            except DatapathError as error:
                if error.errno != errno.ENOENT:
                    raise
                return otherwise

        return await self._datapath.sweep(run)

    def _with_tables(self, function: Callable[[Tables], T]) -> T:
        with Tables(Path(self._datapath.pins)) as tables:
            return function(tables)


def _widest(plan: MasqueradePlan) -> PortRange | None:
    found = common(plan.reserved, [MAPPED_PORTS])
    return max(found, key=lambda item: item[1] - item[0]) if found else None


def _built(plan: MasqueradePlan) -> MasqueradePlan:
    """The plan with as much of the reserved ports as the programs are told."""
    widest = _widest(plan)
    return msgspec.structs.replace(plan, reserved=(widest,) if widest else ())


def _write_devices(plan: MasqueradePlan, active: bool, tables: Tables) -> bool:
    present = nodefilters.device_indexes()
    wanted = {present[name]: addresses for name, addresses in plan.devices.items() if name in present}
    return snat.write_devices(tables.devices, wanted, active)


def _reserve_translated(plan: MasqueradePlan, spared: Sequence[MasqueradedFlow], tables: Tables) -> None:
    """Others' mappings stay their own: no pod gets their ports, so that their answers are left to them.

    Those are what other engines tell, and whatever else the kernel's conntrack translates.
    """
    own = {address for addresses in plan.devices.values() for address in addresses}
    kept: dict[tuple[int, Address, int, Address, int], int] = {}
    for flow in spared:
        kept[flow.protocol, flow.node, flow.node_port, flow.remote, flow.remote_port] = TOLD
    for known in kernelct.flows():
        end = known.reply
        if known.translated:
            remote_port = 0 if end.proto in _ICMP else end.source_port
            kept[end.proto, end.target, end.target_port, end.source, remote_port] = known.seconds
    for (proto, node, node_port, remote, remote_port), seconds in kept.items():
        if node in own:
            snat.reserve(tables.mappings, proto, node, node_port, remote, remote_port, seconds)


def _forget_lost_addresses(plan: MasqueradePlan, tables: Tables) -> None:
    """Mappings to an address that the node lost: no answer comes there, and flows must begin anew to have one."""
    own = {address for addresses in plan.devices.values() for address in addresses}
    gone = snat.flush_foreign(tables.mappings, own)
    if gone:
        log.warning("%d mappings removed: the node has their address no more", gone)


def _untranslated(plan: MasqueradePlan, flow: KernelFlow) -> bool:
    source, target = flow.original.source, flow.original.target
    inside = any(source in prefix for prefix in plan.sources)
    return inside and not flow.translated and not any(target in prefix for prefix in plan.direct)


def _flow(entry: SnatEntry, now: int) -> MasqueradedFlow:
    return MasqueradedFlow(
        protocol=entry.proto,
        source=entry.source,
        source_port=entry.source_port,
        node=entry.node,
        node_port=entry.node_port,
        remote=entry.remote,
        remote_port=entry.remote_port,
        age=max(0, now - entry.created),
    )
