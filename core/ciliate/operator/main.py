"""`ciliate-operator`: one per cluster does the duties that every agent would otherwise repeat.

Several may run; the one that holds the lock in the key-value store works, the others wait for it. The lock is under a
lease of 15 s: a leader that dies is followed after that time, and one that cannot reach the store for as long stops.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NoReturn

from ciliate import tasks
from ciliate.backoff import Backoff, ClusterSize
from ciliate.config import AgentConfig
from ciliate.controller import Controllers
from ciliate.daemonize import run_daemon
from ciliate.directories import make_directory
from ciliate.identity.backend import IdentityBackend
from ciliate.kvstore import Kvstore, KvstoreError, LockTimeoutError
from ciliate.operator.leftovers import Leftovers
from ciliate.operator.server import OperatorServer
from ciliate.plugin import PluginContext, PluginManager
from ciliate.services import Services

log = logging.getLogger("ciliate.operator")
LEADER = "operator/leader"
LOCK_PATIENCE = 60.0
RETRY_MAX = 60.0
USAGE = """Usage: ciliate-operator [--config FILE] [--config-dir DIR] [--OPTION=VALUE ...]

Does the duties of the whole cluster: it removes identities that no node uses, and what dead nodes left in the store.
Several may run, one works. Answers on operator-api-serve-addr (/healthz, /metrics). Takes the agent's options."""


class Operator:
    """One instance: waits until it leads, then does the duties until it is told to end."""

    def __init__(self, config: AgentConfig, plugins: PluginManager) -> None:
        self.config = config
        self.plugins = plugins
        self.leads = asyncio.Event()
        self.cluster = ClusterSize()
        self.controllers = Controllers(self.cluster)
        self.collected = 0
        self.server = OperatorServer(self)
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Connect to the store and begin to wait for the lock; what fails ends what was started."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        config, services = self.config, Services()
        state, run = Path(config.state_dir), Path(config.run_dir)
        make_directory(state, "state-dir", 0o750)
        services.add(ClusterSize, self.cluster)
        context = PluginContext(config, None, state, run, services)
        self._stack.push_async_callback(self.plugins.stop)
        self.store: Kvstore = await self.plugins.start("kvstore", config.kvstore, context)
        services.add(Kvstore, self.store)
        self.leftovers = Leftovers(self.store, config.kvstore_lease_ttl, self.cluster)
        mode = config.identity_allocation_mode
        self._identities: IdentityBackend = await self.plugins.start("identity", mode, context)
        if config.operator_api_serve_addr:
            self._stack.push_async_callback(self.server.stop)
            await self.server.start(config.operator_api_serve_addr)
        self._task = tasks.start(self._lead(), "operator")

    async def stop(self) -> None:
        """Give the lock back and disconnect."""
        if hasattr(self, "_task"):
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._stack.aclose()

    async def _lead(self) -> None:
        waiting = Backoff(maximum=RETRY_MAX)
        while True:
            try:
                async with self.store.lock(LEADER, LOCK_PATIENCE):
                    waiting.reset()
                    log.info("leading as %s", self.config.node_name)
                    self.leads.set()
                    await self._work()
            except LockTimeoutError:
                continue
            except KvstoreError as error:
                log.warning("the store failed: %s; trying again", error)
                await waiting.wait()
            finally:
                self.leads.clear()

    async def _work(self) -> None:
        """Do the duties until the lead is lost or taken away."""
        try:
            self.controllers.run("identity-gc", self._collect_identities, self.config.identity_gc_interval)
            self.controllers.run("node-gc", self.leftovers.collect, self.config.nodes_gc_interval)
            await asyncio.Event().wait()
        finally:
            await self.controllers.stop()

    async def _collect_identities(self) -> None:
        # what nobody uses now was unused for one whole interval, too, before it is taken: a node that was cut off for
        # longer than its lease may come back
        removed = await self._identities.collect(self.config.identity_gc_interval / 2)
        self.collected += removed
        if removed:
            log.info("%d identities that no node uses were removed", removed)


def main() -> NoReturn:
    """Entry point. Exit codes as those of the agent."""
    run_daemon("ciliate-operator", USAGE, Operator)


if __name__ == "__main__":
    main()
