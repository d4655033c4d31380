"""The engine `iptables`: a chain of its own in table nat of each family, reached from POSTROUTING.

The kernel translates a flow as its first packet was told, for as long as conntrack knows the flow. So a change of the
rules cuts nobody, and to drain is to take the rules that translate out of the chain. What is left keeps the kernel
tracking: in a namespace where no rule asks for it it stops, and its flows with it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ciliate.datapath import Datapath, kernelct, snat
from ciliate.datapath.kernelct import KernelFlow
from ciliate.datapath.nodeprograms import NodePrograms
from ciliate.masquerade import Address, MasqueradedFlow, MasqueradePlan, Network, PodUsage, Spare
from ciliate.measure import SUBPROCESSES
from ciliate_masq.rules import chain_name, chain_rules, drained_rules, jump, restore_input

log = logging.getLogger(__name__)
PROGRAMS = {4: "iptables", 6: "ip6tables"}
TIMEOUT = 20.0
WAIT = ("-w", "15")
"""Seconds that a command waits for others that change rules."""
_PRESSURE = Path("/proc/sys/net/netfilter")


class IptablesMasquerade:
    """`ciliate.masquerade.Masquerade` by SNAT rules. Rules of others are neither read for decisions nor changed."""

    def __init__(self, datapath: Datapath, programs: NodePrograms, instance: str, families: Sequence[int]) -> None:
        self._pins = datapath.home
        self._known = 0  # the number of the program that the rules were written with
        self._run = programs.run
        self._chain = chain_name(instance)
        self._families = families
        self._plan: MasqueradePlan | None = None
        self._sources: tuple[Network, ...] = ()
        self._usage: list[PodUsage] = []
        self._spared: list[MasqueradedFlow] = []

    async def engage(self, plan: MasqueradePlan, spare: Spare) -> None:
        """Make the chains what they should be; OSError names the command that failed and what it said.

        What the kernel's conntrack knows it leaves as it is, and a pinned program knows the engine bpf's flows. Those
        that are known to neither get rules of their own; the kernel tracks before that, so that none begins unseen.
        """
        for version in self._families:
            if not await self._exists(version):
                await self._write(version, drained_rules(self._chain))
        self._spared = await self._unknown(await spare())
        await self._apply(plan)
        self._plan, self._sources = plan, plan.sources

    async def _unknown(self, flows: Sequence[MasqueradedFlow]) -> list[MasqueradedFlow]:
        if not flows or (self._pins / snat.KNOWN).exists():
            return []
        tracked = {_identity(flow) for flow in map(_flow, await self._run(lambda: list(kernelct.flows())))}
        return [flow for flow in flows if _identity(flow) not in tracked]

    async def _apply(self, plan: MasqueradePlan) -> list[str]:
        changed = []
        # flows of the other engine are recognised by a program of its own; a rule keeps the one that it was made with
        known = self._pins / snat.KNOWN
        number = await self._run(snat.number_of_known, known)
        for version in self._families:
            rules = chain_rules(plan, version, self._chain, str(known) if number else "")
            if await self._write(version, rules, anew=number != self._known):
                changed.append(f"the rules of {PROGRAMS[version]}")
        self._known = number
        return changed

    async def _write(self, version: int, rules: list[str], anew: bool = False) -> bool:
        present = await self._present(version)
        with_jump = jump(self._chain) not in present
        mine = [line for line in present if line.startswith(f"-A {self._chain} ")]
        if not with_jump and mine == rules and not anew:
            return False
        await self._restore(version, restore_input(self._chain, rules, with_jump))
        return True

    async def _restore(self, version: int, text: str) -> None:
        await self._command(f"{PROGRAMS[version]}-restore", *WAIT, "--noflush", text=text)

    async def _present(self, version: int) -> list[str]:
        return (await self._command(PROGRAMS[version], *WAIT, "-t", "nat", "-S")).splitlines()

    async def drain(self, plan: MasqueradePlan, successor: bool) -> None:
        """No more rules that translate; flows that the kernel translates already go on."""
        for version in self._families:
            if await self._exists(version):
                await self._write(version, drained_rules(self._chain))
        self._plan, self._sources = None, plan.sources

    async def _exists(self, version: int) -> bool:
        if shutil.which(PROGRAMS[version]) is None:
            return False
        return f"-N {self._chain}" in await self._present(version)

    async def remaining(self) -> int:
        """Flows of pods that the kernel translates."""
        return len(await self._translated())

    async def _translated(self) -> list[KernelFlow]:
        return await self._run(lambda: [flow for flow in kernelct.flows() if self._is_ours(flow)])

    def _is_ours(self, flow: KernelFlow) -> bool:
        if not flow.translated:
            return False
        return not self._sources or any(flow.original.source in prefix for prefix in self._sources)

    async def remove(self) -> None:
        """Take out chain and jump, and nothing else."""
        self._plan = None
        for version in self._families:
            if not await self._exists(version):
                continue
            present = await self._present(version)
            entry = jump(self._chain)
            lines = [entry.replace("-A ", "-D ", 1)] * present.count(entry)
            text = "\n".join(["*nat", f":{self._chain} - [0:0]", *lines, f"-X {self._chain}", "COMMIT", ""])
            await self._restore(version, text)

    async def mend(self) -> list[str]:
        """Put back rules that somebody removed or changed."""
        return [] if self._plan is None else await self._apply(self._plan)

    async def collect(self) -> int:
        """The kernel collects its own flows; here they are counted by pod."""
        counts = Counter(flow.original.source for flow in await self._translated())
        room = _conntrack("max") or 1
        self._usage = [PodUsage(source=source, mappings=count, share=count / room) for source, count in counts.items()]
        return 0

    async def usage(self) -> list[PodUsage]:
        """As last counted. The kernel's conntrack has no bound for one pod, and refuses nothing on its account."""
        return self._usage

    async def flows(self) -> list[MasqueradedFlow]:
        """Every flow that the kernel translates."""
        return [_flow(flow) for flow in await self._translated()]

    async def flush(self, select: Callable[[MasqueradedFlow], bool]) -> int:
        """Let the kernel forget flows."""
        return await self._run(kernelct.forget, lambda flow: self._is_ours(flow) and select(_flow(flow)))

    async def forget(self, sources: Collection[Address]) -> int:
        """Let the kernel forget their flows, those that it does not translate too."""
        gone = frozenset(sources)
        return await self._run(kernelct.forget, lambda flow: flow.original.source in gone)

    async def pressure(self) -> float:
        """How full the kernel's conntrack is, as far as it says."""
        room = _conntrack("max")
        return _conntrack("count") / room if room else 0.0

    async def _command(self, name: str, *arguments: str, text: str = "") -> str:
        SUBPROCESSES.add("iptables")
        try:
            process = await asyncio.create_subprocess_exec(
                name,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except FileNotFoundError as error:
            raise OSError(errno.ENOENT, f"{name} is not installed; install the package iptables") from error
        try:
            async with asyncio.timeout(TIMEOUT):
                out, problem = await process.communicate(text.encode())
        except TimeoutError:
            process.kill()
            await process.wait()
            raise OSError(errno.ETIMEDOUT, f"{name}: took longer than {TIMEOUT:g} s") from None
        if process.returncode:
            said = problem.decode(errors="replace").strip()
            raise OSError(errno.EINVAL, f"{' '.join([name, *arguments])}: {said or f'exit code {process.returncode}'}")
        return out.decode()


def _identity(flow: MasqueradedFlow) -> tuple[object, ...]:
    """What a packet of the pod says."""
    return flow.protocol, flow.source, flow.source_port, flow.remote, flow.remote_port


def _conntrack(name: str) -> int:
    """A number of the kernel's conntrack; 0 where it has none."""
    try:
        return int((_PRESSURE / f"nf_conntrack_{name}").read_text())
    except FileNotFoundError:
        return 0


def _flow(flow: KernelFlow) -> MasqueradedFlow:
    return MasqueradedFlow(
        protocol=flow.original.proto,
        source=flow.original.source,
        source_port=flow.original.source_port,
        node=flow.reply.target,
        node_port=flow.reply.target_port,
        remote=flow.reply.source,
        remote_port=0 if flow.original.proto in (1, 58) else flow.reply.source_port,
    )
