"""Everything that helps to understand an agent from afar, in one document. Secrets are left out."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ciliate import __version__
from ciliate.agent.status import full_status
from ciliate.datapath import mapview

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

SERVICES = 1000
"""How many services are listed."""


async def collect(agent: Agent) -> dict[str, Any]:
    """The document, by section."""
    maps = await asyncio.to_thread(mapview.summaries, agent.datapath.pins)
    return {
        "version": _versions(),
        "status": await full_status(agent),
        "configuration": agent.configuration(),
        "endpoints": [_endpoint(item) for item in agent.endpoints.endpoints()],
        "identities": [{"id": item.id, "labels": item.labels.strings()} for item in agent.identities()],
        "policy": _policy(agent),
        "workloads": agent.workloads.export(),
        "services": [agent.balancing.describe(record.id) for record in agent.balancing.manager.records()[:SERVICES]],
        "ipam": agent.addresses(),
        "ipcache": {str(prefix): number for prefix, number in agent.ipcache.table().items()},
        "plugins": agent.plugins.active(),
        "controllers": [msgspec.to_builtins(item) for item in agent.controllers.statuses.values()],
        "maps": [msgspec.to_builtins(item) for item in maps],
        "metrics": await agent.metrics.samples(),
        "process": await asyncio.to_thread(_process),
        "tasks": sorted(task.get_name() for task in asyncio.all_tasks()),
    }


def _versions() -> dict[str, str]:
    return {"ciliate": __version__, "python": sys.version.split()[0], "kernel": platform.release()}


def _endpoint(endpoint: Any) -> dict[str, Any]:
    document: dict[str, Any] = endpoint.document()
    document["status"]["log"] = [msgspec.to_builtins(entry) for entry in endpoint.log]
    return document


def _policy(agent: Agent) -> dict[str, Any]:
    repository = agent.repository
    documents = [stored.document.object for stored in repository.objects()]
    return {
        "revision": repository.revision,
        "documents": documents,
        "counters": msgspec.to_builtins(repository.counters),
    }


def _process() -> dict[str, Any]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "pid": os.getpid(),
        "resident": status["VmRSS"].strip(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
    }
