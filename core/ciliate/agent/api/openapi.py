"""The API's description: ``openapi.yaml`` beside this file, served as JSON. A test holds it against the handlers."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

FILE = Path(__file__).with_name("openapi.yaml")


def routes(router: web.UrlDispatcher, _agent: object) -> None:
    """Add this module's route."""
    router.add_get("/v1/openapi.json", _get)


def load() -> dict[str, Any]:
    """The document."""
    import yaml

    document: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return document


@functools.cache
def _encoded() -> bytes:
    return msgspec.json.encode(load())


async def _get(request: web.Request) -> web.Response:
    return web.Response(body=await asyncio.to_thread(_encoded), content_type="application/json")
