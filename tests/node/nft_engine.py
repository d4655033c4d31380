"""A third party's engine of masquerading, by nftables, of whom knows the protocol and our documents alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ciliate.datapath import kernelct
from ciliate.datapath.kernelct import KernelFlow
from ciliate.masquerade import MAPPED_PORTS, Address, MasqueradedFlow, MasqueradePlan, Network, PodUsage, Spare
from ciliate.plugin import MasqueradeProvider
from ciliate.ports import without

TABLE = "inet strangers_masquerade"
_WORDS = {4: "ip", 6: "ip6"}
_ECHOES = {1: "icmp", 58: "icmpv6"}


class NftMasquerade:
    """One table with one chain. The mappings are the kernel's conntrack."""

    def __init__(self) -> None:
        self._plan: MasqueradePlan | None = None
        self._sources: tuple[Network, ...] = ()

    async def engage(self, plan: MasqueradePlan, spare: Spare) -> None:
        """Track first, so that what begins from now on has an entry of the kernel's, which no rule changes.

        Then hear what there was before that; then masquerade the rest, in one step.
        """
        await self._nft(self._empty())
        spared = await spare()
        await self._nft("\n".join([self._empty(), *self._rules(plan, list(spared))]))
        self._plan, self._sources = plan, plan.sources

    @staticmethod
    def _empty() -> str:
        """A chain whose rule does nothing but ask for the state of flows: the kernel tracks only where one does."""
        chain = "chain post { type nat hook postrouting priority srcnat; policy accept; }"
        asks = f"add rule {TABLE} post ct status snat return"
        return f"table {TABLE} {{ {chain}; }}\nflush chain {TABLE} post\n{asks}"

    def _rules(self, plan: MasqueradePlan, spared: list[MasqueradedFlow]) -> Iterator[str]:
        rule = f"add rule {TABLE} post"
        for prefix in plan.direct:
            yield f"{rule} {_WORDS[prefix.version]} daddr {prefix} return"
        for flow in spared:
            word = _WORDS[flow.source.version]
            ports = f"th sport {flow.source_port} th dport {flow.remote_port}"
            if flow.protocol in _ECHOES:
                ports = f"{_ECHOES[flow.protocol]} id {flow.source_port}"
            protocol = f"meta l4proto {flow.protocol}"
            yield f"{rule} {word} saddr {flow.source} {word} daddr {flow.remote} {protocol} {ports} return"
        first, last = max(without(MAPPED_PORTS, plan.reserved), key=lambda item: item[1] - item[0])
        for device, addresses in plan.devices.items():
            for address in addresses:
                for source in (item for item in plan.sources if item.version == address.version):
                    word = _WORDS[address.version]
                    match = f'{rule} oifname "{device}" {word} saddr {source}'
                    target = f"[{address}]" if address.version == 6 else str(address)
                    yield f"{match} meta l4proto {{ tcp, udp, sctp }} snat {word} to {target}:{first}-{last}"
                    yield f"{match} snat {word} to {address}"

    async def drain(self, plan: MasqueradePlan, successor: bool) -> None:
        """No more rules that translate; the kernel goes on tracking."""
        if await self._is_there():
            await self._nft(self._empty())
        self._plan, self._sources = None, plan.sources

    async def _is_there(self) -> bool:
        return TABLE in await self._nft("list tables")

    def _ours(self, flow: KernelFlow) -> bool:
        return flow.translated and any(flow.original.source in prefix for prefix in self._sources)

    async def remaining(self) -> int:
        """Translated flows of pods."""
        return len(await self.flows())

    async def remove(self) -> None:
        """The table goes."""
        self._plan = None
        if await self._is_there():
            await self._nft(f"delete table {TABLE}")

    async def mend(self) -> list[str]:
        """Nobody else touches a table of ours in these tests."""
        return []

    async def collect(self) -> int:
        """The kernel collects."""
        return 0

    async def flows(self) -> list[MasqueradedFlow]:
        """Of the kernel's conntrack."""
        return [_flow(flow) for flow in kernelct.flows() if self._ours(flow)]

    async def flush(self, select: Callable[[MasqueradedFlow], bool]) -> int:
        """Let the kernel forget."""
        return kernelct.forget(lambda flow: self._ours(flow) and select(_flow(flow)))

    async def forget(self, sources: Collection[Address]) -> int:
        """Let the kernel forget."""
        return kernelct.forget(lambda flow: flow.original.source in sources)

    async def pressure(self) -> float:
        """Unknown to this engine."""
        return 0.0

    async def usage(self) -> list[PodUsage]:
        """Counts, without a bound."""
        counts = Counter(flow.source for flow in await self.flows())
        return [PodUsage(source=source, mappings=count, share=0.0) for source, count in counts.items()]

    async def _nft(self, text: str) -> str:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec("nft", "-f", "-", stdin=pipe, stdout=pipe, stderr=pipe)
        out, problem = await process.communicate(text.encode())
        if process.returncode:
            raise OSError(22, f"nft: {problem.decode().strip()}\n{text}")
        return out.decode()


def _flow(flow: KernelFlow) -> MasqueradedFlow:
    original, reply = flow.original, flow.reply
    return MasqueradedFlow(
        protocol=original.proto,
        source=original.source,
        source_port=original.source_port,
        node=reply.target,
        node_port=reply.target_port,
        remote=reply.source,
        remote_port=0 if original.proto in _ECHOES else reply.source_port,
    )


class DeafNftMasquerade(NftMasquerade):
    """One that hears nothing of what it has to spare."""

    async def engage(self, plan: MasqueradePlan, spare: Spare) -> None:
        """As if nobody else served anything."""

        async def nothing() -> list[MasqueradedFlow]:
            return []

        await super().engage(plan, nothing)


def provider(engine: Callable[[], Any]) -> MasqueradeProvider:
    """As a plugin's hook would give it."""
    return MasqueradeProvider(name="nft", summary="SNAT rules of nftables", factory=lambda context: engine())
