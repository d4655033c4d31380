"""What core needs of masquerading: pods' packets that leave the cluster get an address of the node.

A provider of kind ``masquerade`` makes an engine of class `Masquerade`. Two engines may be at work at once, one for new
flows and one that serves what it began: that is how they are exchanged without losing a connection. ``stop`` (where
there is one) lets go of descriptors alone; what an engine put into the kernel goes on without the agent, until
``remove``. Every method raises OSError where the kernel refuses, with what was asked and why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Protocol

import msgspec

from ciliate.ports import PortRange

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
MAPPED_PORTS: PortRange = (1024, 64511)
"""Ports of the node that a pod's flow may have, but for those that a plan reserves. The higher ones are the node's own:
no pod can take all that it needs."""


class MasqueradePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be masqueraded.

    Packets from ``sources`` that leave by one of ``devices`` to anywhere but ``direct`` get the address that the device
    has there for their family; where it has none they go as they are. ``entries``: room for mappings, where an engine
    has a table of its own. ``reserved``: ports of the node that no mapping may have, as services have them or may get
    them.
    """

    sources: tuple[Network, ...]
    direct: tuple[Network, ...]
    devices: Mapping[str, tuple[Address, ...]]
    entries: int = 524288
    reserved: tuple[PortRange, ...] = ()


class MasqueradedFlow(msgspec.Struct, frozen=True, kw_only=True):
    """One mapping: the pod's address and port, the node's in their place, and the peer. Of echoes the identifiers.

    ``age`` in seconds, None where the engine does not know.
    """

    protocol: int
    source: Address
    source_port: int
    node: Address
    node_port: int
    remote: Address
    remote_port: int
    age: int | None = None


Spare = Callable[[], Awaitable[Sequence[MasqueradedFlow]]]
"""Tells the flows that other engines serve."""


async def nobody() -> Sequence[MasqueradedFlow]:
    """Where there is no other engine."""
    return ()


class PodUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a pod has of what all share.

    ``share``: of what one pod may have, 1 is all of it; where an engine knows no such bound, of what all may have.
    ``refused``: new flows beyond that, ever since.
    """

    source: Address
    mappings: int
    share: float
    refused: int = 0


class Masquerade(Protocol):
    """An engine of masquerading."""

    async def engage(self, plan: MasqueradePlan, spare: Spare) -> None:
        """Masquerade as ``plan`` says from now on; called again when it changes, and by a new agent over what is there.

        A flow that another engine serves stays with that one, and its port on the node is not given to another flow
        towards the same remote. ``spare`` tells those flows as they are when it is asked. More may begin until this
        engine masquerades: it has to see those by itself, or see to it that they are not its own.
        """

    async def drain(self, plan: MasqueradePlan, successor: bool) -> None:
        """Begin nothing new, go on with what there is; also over what an earlier agent left.

        ``successor``: another engine masquerades now. Then a flow that reaches this one all the same was known to the
        kernel before, and is still to be masqueraded.
        """

    async def remaining(self) -> int:
        """How many flows are served. 0 after ``drain`` means that nothing is lost by ``remove``."""

    async def remove(self) -> None:
        """Take everything out of the kernel. Does nothing where nothing is there."""

    async def mend(self) -> list[str]:
        """Put back what somebody took away; what that was, in words."""

    async def collect(self) -> int:
        """Remove mappings of flows that are over, where the kernel does not do that itself; how many went."""

    async def flows(self) -> list[MasqueradedFlow]:
        """Every mapping of a pod's flow."""

    async def flush(self, select: Callable[[MasqueradedFlow], bool]) -> int:
        """Remove the mappings that ``select`` picks: their flows are cut. How many went."""

    async def forget(self, sources: Collection[Address]) -> int:
        """Remove every mapping of pods that had these addresses, which are gone; how many went.

        Answers for them must not find whoever gets an address next.
        """

    async def pressure(self) -> float:
        """How full the table of mappings is, 0 to 1."""

    async def usage(self) -> list[PodUsage]:
        """What each pod has, as far as is known without a long look: this is asked every few seconds."""
