"""The monitor stream: one JSON object per line for as long as the client listens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from ciliate.agent.api.problem import Problem

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

BATCH = 256
MOST = 64
"""Clients that may watch at once."""
LOOK = 5.0
"""Seconds after which a client is forgotten that has gone while nothing happened."""


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""

    async def monitor(request: web.Request) -> web.StreamResponse:
        if agent.monitor.watched >= MOST:
            raise Problem(503, f"monitor: {MOST} clients watch already; end one of them, or try again later")
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        stopping = asyncio.create_task(agent.stopping.wait())
        try:
            await _pump(agent, request, response, stopping)
        except ConnectionError:
            return response
        finally:
            stopping.cancel()
        return response

    router.add_get("/v1/monitor", monitor, allow_head=False)  # an answer without end has no head


async def _pump(agent: Agent, request: web.Request, response: web.StreamResponse, stopping: asyncio.Task[bool]) -> None:
    async with agent.monitor.listen() as listener:
        await response.write(msgspec.json.encode({"type": "agent", "text": "-- listening"}) + b"\n")
        while not stopping.done():
            getter = asyncio.create_task(listener.queue.get())
            await asyncio.wait({getter, stopping}, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
            if not getter.done():
                getter.cancel()
                if stopping.done() or request.transport is None:  # nobody says that a client has gone
                    return
                continue
            events = [getter.result()]
            while len(events) < BATCH and not listener.queue.empty():
                events.append(listener.queue.get_nowait())
            if listener.lost:
                events.append({"type": "agent", "text": f"-- lost {listener.lost} events: this listener is too slow"})
                listener.lost = 0
            await response.write(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
