"""What the agent counts of its own work while it works (inventory 4.4); ``metrics`` reads and serves it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import Histogram

from ciliate.measure import EVENT_TIME

API_TIME = Histogram(
    "ciliate_agent_api_process_time_seconds",
    "Time of a request to the API, by path without ids",
    ["path", "method", "return_code"],
    registry=None,
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10),
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def timed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Measure a request; stands outside of what turns failures into answers."""
    began = time.perf_counter()
    answer = await handler(request)
    resource = request.match_info.route.resource
    path = resource.canonical if resource is not None else "unknown"
    API_TIME.labels(path, request.method, str(answer.status)).observe(time.perf_counter() - began)
    if request.method != "GET" and answer.status < 400:
        EVENT_TIME.set("api", value=time.time())
    return answer


class LogCounter(logging.Handler):
    """Counts warnings and errors of the log by (level, subsystem); a subsystem is a package below ``ciliate``."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[tuple[str, str]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Count one record."""
        parts = record.name.split(".")
        subsystem = parts[1] if len(parts) > 1 and parts[0] == "ciliate" else parts[0]
        self.counts[record.levelname.lower(), subsystem] += 1
