"""`ciliate-operator`: one per cluster does the duties that every agent would otherwise repeat.

Several may run; the one that holds the lock in the key-value store works, the others wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NoReturn

from ciliate.backoff import Backoff, ClusterSize, pause, spread
from ciliate.config import AgentConfig
from ciliate.daemonize import run_daemon
from ciliate.identity.backend import IdentityBackend
from ciliate.kvstore import Kvstore, KvstoreError, LockTimeoutError
from ciliate.plugin import PluginContext, PluginManager
from ciliate.services import Services

log = logging.getLogger("ciliate.operator")
LEADER = "operator/leader"
LOCK_PATIENCE = 60.0
RETRY_MAX = 60.0
USAGE = """Usage: ciliate-operator [--config FILE] [--config-dir DIR] [--OPTION=VALUE ...]

Does the duties of the whole cluster: it removes identities that no node uses. Takes the agent's options."""


class Operator:
    """One instance: waits until it leads, then does the duties until it is told to end."""

    def __init__(self, config: AgentConfig, plugins: PluginManager) -> None:
        self.config = config
        self.plugins = plugins
        self.leads = asyncio.Event()
        self.cluster = ClusterSize()
        self.collected = 0
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Connect to the store and begin to wait for the lock."""
        config, services = self.config, Services()
        state, run = Path(config.state_dir), Path(config.run_dir)
        state.mkdir(mode=0o750, parents=True, exist_ok=True)
        services.add(ClusterSize, self.cluster)
        context = PluginContext(config, None, state, run, services)
        self._stack.push_async_callback(self.plugins.stop)
        self._store: Kvstore = await self.plugins.start("kvstore", config.kvstore, context)
        services.add(Kvstore, self._store)
        mode = config.identity_allocation_mode
        self._identities: IdentityBackend = await self.plugins.start("identity", mode, context)
        self._task = asyncio.create_task(self._lead(), name="operator")

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
                async with self._store.lock(LEADER, LOCK_PATIENCE):
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
        interval = self.config.identity_gc_interval
        while True:
            removed = await self._identities.collect()
            self.collected += removed
            if removed:
                log.info("%d identities that no node uses were removed", removed)
            await pause(spread(interval))


def main() -> NoReturn:
    """Entry point. Exit codes as those of the agent."""
    run_daemon("ciliate-operator", USAGE, Operator)


if __name__ == "__main__":
    main()
