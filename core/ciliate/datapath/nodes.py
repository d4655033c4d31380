"""Ways to the pods of other nodes: the datapath's side of `ciliate.node.peers.NodeDatapath`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, NamedTuple

from ciliate.datapath.nodemaps import NodeMaps
from ciliate.datapath.noderoutes import NodeRoutes, Way, ways
from ciliate.datapath.pins import PinDirectory
from ciliate.datapath.tunnel import TunnelConfig

if TYPE_CHECKING:
    from ciliate.node.model import Node

Address = IPv4Address | IPv6Address


class Router(NamedTuple):
    """The router device's index and the node's own addresses on it."""

    device: int
    router4: IPv4Address | None
    router6: IPv6Address | None


class Nodes:
    """Tunnels to other nodes, or routes to them where ``direct`` says so.

    ``run`` runs a function in the datapath's thread. With a tunnel the pod ranges are routed to the router device, for
    what this node itself sends, and ``router`` tells which that is. Pods' packets need no route.
    """

    def __init__(
        self,
        run: Callable[..., Awaitable[Any]],
        pins: PinDirectory,
        router: Callable[[], Router],
        tunnel: TunnelConfig | None,
        direct: bool,
    ) -> None:
        self._run = run
        self._router = router
        self._tunnel = tunnel
        self._enabled = direct or tunnel is not None
        self._routes = NodeRoutes(self._ways)
        self.maps = NodeMaps(pins, tunnel)

    def address(self, ipv4: IPv4Address | None, ipv6: IPv6Address | None) -> Address | None:
        """What stands as ``node`` in the ipcache entries of a node with these addresses; None without a tunnel."""
        return self._tunnel.address(ipv4, ipv6) if self._tunnel else None

    async def update_nodes(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> Mapping[str, OSError]:
        """Change by a delta; what failed, by node."""
        failed: Mapping[str, OSError] = await self._run(self._update, upserts, deletes)
        return failed

    def _update(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> Mapping[str, OSError]:
        failed = self.maps.update(upserts, deletes)
        return self._routes.update(upserts, deletes) | failed if self._enabled else failed

    async def sync_nodes(self, nodes: Sequence[Node], prune: bool = True) -> Mapping[str, OSError]:
        """Make the ways exactly these; what failed, by node. Where there are to be none, those of an earlier run go.

        Without ``prune`` ways to other nodes stay.
        """
        failed: Mapping[str, OSError] = await self._run(self._sync, nodes, prune)
        return failed

    def _sync(self, nodes: Sequence[Node], prune: bool) -> Mapping[str, OSError]:
        failed = self.maps.sync(nodes, prune)
        return self._routes.sync(nodes if self._enabled else (), prune or not self._enabled) | failed

    def remove(self) -> None:
        """Remove every route; blocking."""
        self._routes.sync(())

    def _ways(self, node: Node) -> list[Way]:
        if self._tunnel is None:
            return ways(node)
        device, *sources = self._router()
        pairs = zip((node.pods4, node.pods6), sources, strict=True)
        return [
            Way(range_, None, device, source, self._tunnel.mtu)
            for range_, source in pairs
            if range_ is not None and source is not None
        ]
