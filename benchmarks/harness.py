"""What the tests of tier bpf have already, for benchmarks: programs for test runs, a node and pods as namespaces."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "bpf"))

import bpf_harness
import live_harness
import nodes_harness

from ciliate.datapath import Datapath, DatapathConfig
from ciliate.datapath.pins import unmount

__all__ = ["Node", "bpf_harness", "live_harness", "node", "nodes_harness"]


class Node(live_harness.InNode):
    """A datapath of the size that a node has by default."""

    def _make(self) -> Datapath:
        config = DatapathConfig(
            state_dir=self.root,
            instance="benchmark",
            bpf_root=self.root / "bpffs",
            router4=live_harness.ROUTER4,
            router6=live_harness.ROUTER6,
        )
        datapath = Datapath(config, live_harness.LOADERS[self.loader]())
        enter = self.net.descriptors["node"]
        for pool in (datapath._worker, datapath._sweeper):
            pool.submit(live_harness._setns, enter).result()
        return datapath


@contextlib.asynccontextmanager
async def node(loader: str, *pods: str) -> AsyncIterator[Node]:
    """A started datapath in a namespace of its own, with more namespaces beside it; all of it goes at the end."""
    root = Path(tempfile.mkdtemp(prefix="ciliate-benchmark-"))
    net = live_harness.Net(f"cb{uuid.uuid4().hex[:6]}")
    try:
        for name in ("node", *pods):
            net.add(name)
        templates = root / "compiled"
        templates.mkdir()
        made = Node(net, root, loader, templates)
        try:
            await made.datapath.start()
            yield made
        finally:
            with contextlib.suppress(RuntimeError):
                await made.datapath.destroy()
    finally:
        net.remove()
        unmount(root / "bpffs")
        shutil.rmtree(root)
