"""Controllers: named background duties with retry, back-off and a status that people can read.

Error retry grows linearly as in the seed system (inventory 4.12 F3), here with a cap and jitter. Duties toward what
the whole cluster shares wait longer in a larger cluster, and after errors exponentially (`ciliate.backoff`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import msgspec

from ciliate.backoff import Backoff, ClusterSize, linear, pause, spread
from ciliate.measure import CONTROLLER_TIME, Times

log = logging.getLogger(__name__)
RETRY_BASE = 1.0
RETRY_MAX = 60.0
Wait = Callable[["ControllerStatus"], float]
"""How long to wait after a run, by its status."""


class ControllerStatus(msgspec.Struct):
    """What a controller did so far; times in seconds since the epoch, 0 for never."""

    name: str
    interval: float
    success_count: int = 0
    failure_count: int = 0
    consecutive_failures: int = 0
    last_success: float = 0.0
    last_failure: float = 0.0
    last_error: str = ""


class Triggered:
    """How a duty was asked to run now: how often, how often together with others, and what that took."""

    def __init__(self) -> None:
        self.total = 0
        self.folds = 0
        text = "Time from a wish to its run (latency), and of the run (duration)"
        self.times = Times("", text, ("type",), CONTROLLER_TIME.bounds)
        self._since = 0.0

    def asked(self, waits: bool) -> None:
        """Somebody asked; ``waits``: somebody else had, and it has not begun yet."""
        self.total += 1
        if waits:
            self.folds += 1
        else:
            self._since = time.monotonic()

    def began(self) -> float:
        """It begins; its time, or 0 where nobody asked."""
        asked, self._since, now = self._since, 0.0, time.monotonic()
        if not asked:
            return 0.0
        self.times.observe("latency", seconds=now - asked)
        return now

    def ended(self, began: float) -> None:
        """It has run since ``began``."""
        if began:
            self.times.observe("duration", seconds=time.monotonic() - began)


class Controllers:
    """Runs duties until stopped; each has its own task, whose errors end up in its status and the log."""

    def __init__(self, cluster: ClusterSize | None = None) -> None:
        self.cluster = cluster or ClusterSize()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self.statuses: dict[str, ControllerStatus] = {}
        self.triggered: dict[str, Triggered] = {}

    def run(self, name: str, duty: Callable[[], Awaitable[None]], interval: float, shared: bool = False) -> None:
        """Call ``duty`` every ``interval`` seconds (with 10 % jitter), and after an error with growing waits.

        ``shared`` says that the duty asks something of what other nodes use too: its waits scale with the cluster.
        """
        if name in self._tasks:
            raise ValueError(f"controller {name!r} runs already")
        self.statuses[name] = ControllerStatus(name, interval)
        self._wake[name] = asyncio.Event()
        self.triggered[name] = Triggered()
        loop = self._loop(name, duty, self._shared_wait() if shared else self._local_wait)
        self._tasks[name] = asyncio.create_task(loop, name=f"controller-{name}")

    def set_interval(self, name: str, interval: float) -> None:
        """Call a duty every ``interval`` seconds from now on."""
        self.statuses[name].interval = interval

    def trigger(self, name: str) -> None:
        """Run the duty now rather than at the end of its interval; one that has not begun yet runs when it does."""
        wake = self._wake.get(name)
        if wake is not None:
            self.triggered[name].asked(wake.is_set())
            wake.set()

    def runs(self) -> dict[str, int]:
        """How many runs succeeded and failed."""
        statuses = self.statuses.values()
        return {
            "success": sum(status.success_count for status in statuses),
            "failure": sum(status.failure_count for status in statuses),
        }

    def failing(self) -> list[ControllerStatus]:
        """Those whose last run failed."""
        return [status for status in self.statuses.values() if status.consecutive_failures]

    async def stop(self) -> None:
        """Cancel every duty and wait until all have ended."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def _loop(self, name: str, duty: Callable[[], Awaitable[None]], wait: Wait) -> None:
        status, wake = self.statuses[name], self._wake[name]
        while True:
            wake.clear()
            began = self.triggered[name].began()
            await self._once(status, duty)
            self.triggered[name].ended(began)
            await pause(wait(status), wake)

    def _local_wait(self, status: ControllerStatus) -> float:
        if status.consecutive_failures:
            return spread(linear(status.consecutive_failures, RETRY_BASE, RETRY_MAX))
        return spread(status.interval)

    def _shared_wait(self) -> Wait:
        retry = Backoff(RETRY_BASE, maximum=RETRY_MAX, cluster=self.cluster)

        def wait(status: ControllerStatus) -> float:
            if status.consecutive_failures:
                return retry.duration(status.consecutive_failures)
            return self.cluster.interval(spread(status.interval))

        return wait

    async def _once(self, status: ControllerStatus, duty: Callable[[], Awaitable[None]]) -> None:
        try:
            with CONTROLLER_TIME.measured():
                await duty()
        except Exception as error:  # a duty of any kind may fail in any way; its status carries the error
            status.failure_count += 1
            status.consecutive_failures += 1
            status.last_failure = time.time()
            status.last_error = f"{type(error).__name__}: {error}"
            log.warning("controller %s failed %d times: %s", status.name, status.consecutive_failures, error)
        else:
            status.success_count += 1
            status.consecutive_failures = 0
            status.last_success = time.time()
