"""Ways to the pods of other nodes: the datapath's side of `ciliate.node.peers.NodeDatapath`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ciliate.datapath.noderoutes import NodeRoutes

if TYPE_CHECKING:
    from ciliate.node.model import Node


class Nodes:
    """Routes to other nodes where ``routes`` says so. ``run`` runs a function in the datapath's thread."""

    def __init__(self, run: Callable[..., Awaitable[Any]], routes: bool) -> None:
        self._run = run
        self._enabled = routes
        self._routes = NodeRoutes()

    async def update_nodes(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> Mapping[str, OSError]:
        """Change by a delta; what failed, by node."""
        failed: Mapping[str, OSError] = await self._run(self._update, upserts, deletes)
        return failed

    def _update(self, upserts: Sequence[Node], deletes: Sequence[Node]) -> Mapping[str, OSError]:
        return self._routes.update(upserts, deletes) if self._enabled else {}

    async def sync_nodes(self, nodes: Sequence[Node]) -> Mapping[str, OSError]:
        """Make the ways exactly these; what failed, by node. Where there are to be none, those of an earlier run go."""
        failed: Mapping[str, OSError] = await self._run(self._sync, nodes)
        return failed

    def _sync(self, nodes: Sequence[Node]) -> Mapping[str, OSError]:
        return self._routes.sync(nodes if self._enabled else ())
