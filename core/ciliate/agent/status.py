"""The health of the agent's parts, as one document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ciliate import __version__

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent

_RANK = ("ok", "warning", "failure")


def agent_status(agent: Agent) -> dict[str, Any]:
    """State of the whole (the worst of its parts), the parts, and the addresses in use."""
    parts = [
        _part("agent", "ok", f"version {__version__}, ready"),
        _providers(agent),
        *_stores(agent),
        _addresses(agent),
        _datapath(agent),
        _endpoints(agent),
        _policy(agent),
        _controllers(agent),
    ]
    worst = max((part["state"] for part in parts), key=_RANK.index)
    return {
        "state": worst,
        "node": agent.config.node_name,
        "cluster": agent.config.cluster_name,
        "parts": parts,
        "addresses": agent.addresses(),
    }


def _part(name: str, state: str, message: str) -> dict[str, Any]:
    return {"name": name, "state": state, "message": message}


def _providers(agent: Agent) -> dict[str, Any]:
    active = agent.plugins.active()
    return _part("plugins", "ok", ", ".join(f"{item['kind']}={item['name']}" for item in active))


def _stores(agent: Agent) -> list[dict[str, Any]]:
    count = len(agent.backend.identities())
    return [
        _part("kvstore", "ok" if agent.store_status.ok else "failure", agent.store_status.message),
        _part("identities", "ok", f"{count} of the cluster, {len(agent.local.identities())} of prefixes"),
    ]


def _addresses(agent: Agent) -> dict[str, Any]:
    used = len(agent.ipam.owners())
    return _part("ipam", "ok", f"{used} addresses in use of {agent.ipam.capacity()}")


def _datapath(agent: Agent) -> dict[str, Any]:
    return _part("datapath", "ok", f"loader {agent.config.datapath_loader}, events seen {agent.monitor.seen}")


def _endpoints(agent: Agent) -> dict[str, Any]:
    endpoints = agent.endpoints.endpoints()
    waiting = [endpoint.id for endpoint in endpoints if endpoint.state != "ready"]
    if waiting:
        return _part("endpoints", "warning", f"{len(endpoints)}, not ready: {waiting[:10]}")
    return _part("endpoints", "ok", f"{len(endpoints)}, all ready")


def _policy(agent: Agent) -> dict[str, Any]:
    count, revision = len(agent.repository.objects()), agent.repository.revision
    behind = [item.id for item in agent.endpoints.endpoints() if item.policy_revision < revision]
    message = f"{count} objects, revision {revision}, enforcement {agent.config.enable_policy}"
    if behind:
        return _part("policy", "warning", f"{message}; endpoints behind: {behind[:10]}")
    return _part("policy", "ok", message)


def _controllers(agent: Agent) -> dict[str, Any]:
    failing = agent.controllers.failing()
    if failing:
        text = "; ".join(f"{status.name}: {status.last_error}" for status in failing)
        return _part("controllers", "failure", text)
    return _part("controllers", "ok", f"{len(agent.controllers.statuses)}, none failing")
