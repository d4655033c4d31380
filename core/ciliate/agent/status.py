"""The health of the agent's parts, as one document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ciliate import __version__

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent


class StatusSource(Protocol):
    """What a provider of kind ``status`` makes: one part of the agent's status."""

    def status(self) -> tuple[str, str]:
        """State (ok, warning or failure) and one line for people. Must return at once."""


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
        *(_of_plugin(name, source) for name, source in agent.status_sources.items()),
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


def _of_plugin(name: str, source: StatusSource) -> dict[str, Any]:
    try:
        state, message = source.status()
        if state not in _RANK:
            raise ValueError(f"state {state!r} given, expected one of {', '.join(_RANK)}")
    except Exception as error:  # a plugin may raise anything; that is a state of its part, not of ours
        return _part(name, "failure", f"plugin: {type(error).__name__}: {error}")
    return _part(name, state, message)


def _controllers(agent: Agent) -> dict[str, Any]:
    failing = agent.controllers.failing()
    if failing:
        text = "; ".join(f"{status.name}: {status.last_error}" for status in failing)
        return _part("controllers", "failure", text)
    return _part("controllers", "ok", f"{len(agent.controllers.statuses)}, none failing")
