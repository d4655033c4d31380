"""The monitor stream: one JSON object per line for as long as the client listens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

BATCH = 256


def routes(router: web.UrlDispatcher, agent: Agent) -> None:
    """Add this module's routes."""

    async def monitor(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        stopping = asyncio.create_task(agent.stopping.wait())
        try:
            await _pump(agent, response, stopping)
        except ConnectionError:
            return response
        finally:
            stopping.cancel()
        return response

    router.add_get("/v1/monitor", monitor, allow_head=False)  # an answer without end has no head


async def _pump(agent: Agent, response: web.StreamResponse, stopping: asyncio.Task[bool]) -> None:
    async with agent.monitor.listen() as listener:
        await response.write(msgspec.json.encode({"type": "agent", "text": "-- listening"}) + b"\n")
        while not stopping.done():
            getter = asyncio.create_task(listener.queue.get())
            await asyncio.wait({getter, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not getter.done():
                getter.cancel()
                return
            events = [getter.result()]
            while len(events) < BATCH and not listener.queue.empty():
                events.append(listener.queue.get_nowait())
            if listener.lost:
                events.append({"type": "agent", "text": f"-- lost {listener.lost} events: this listener is too slow"})
                listener.lost = 0
            await response.write(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
