"""The health of the agent's parts, as one document."""

from __future__ import annotations

import asyncio
import platform
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ciliate import __version__, listeners
from ciliate.agent.shares import policy_shares
from ciliate.datapath import mapview
from ciliate.endpoint.state import State

if TYPE_CHECKING:
    from ciliate.agent.daemon import Agent
    from ciliate.endpoint.model import Endpoint
    from ciliate.policy.importer import PolicyObject


class StatusSource(Protocol):
    """What a provider of kind ``status`` makes: one part of the agent's status."""

    def status(self) -> tuple[str, str]:
        """State (ok, warning or failure) and one line for people. Must return at once."""


_RANK = ("ok", "warning", "failure")
_STARTED = time.monotonic()
PRESSURE_WARNING = 0.8
PRESSURE_FAILURE = 0.95
"""Shares of a map's capacity; in LRU maps old flows make room, so theirs is never more than a warning."""
_SHOWN = 10
SHARE_SHOWN = 0.1
"""Of what a namespace may take, from which on `status` says who takes most."""
Part = dict[str, Any]


def agent_status(agent: Agent) -> dict[str, Any]:
    """State of the whole (the worst of its parts), the parts, and the addresses in use. Asks nobody else."""
    parts = [
        _part("agent", "ok", f"version {__version__}, ready"),
        _providers(agent),
        *_stores(agent),
        _ipam(agent),
        _datapath(agent),
        _endpoints(agent),
        _policy(agent),
        _part("services", *agent.balancing.status()),
        _part("cluster", *agent.membership.status(), "see to the store and to the network between the nodes"),
        _part(
            "health", *agent.health.status(), "see to the network between the nodes; `ciliate health status` says more"
        ),
        _part("listeners", *listeners.status(), "see to whom it names: others are served"),
        _controllers(agent),
        *(_of_plugin(name, source) for name, source in agent.status_sources.items()),
    ]
    return {
        "state": _worst(parts),
        "node": agent.config.node_name,
        "cluster": agent.config.cluster_name,
        "parts": parts,
        "addresses": agent.addresses(),
    }


async def full_status(agent: Agent) -> dict[str, Any]:
    """The status with what takes longer: maps and their pressure, features, node, controllers, owners' pods."""
    status = agent_status(agent)
    maps: list[mapview.MapSummary] = []
    try:
        maps = await asyncio.to_thread(mapview.summaries, agent.datapath.pins)
        found = _maps(maps)
    except OSError as error:
        remedy = "who removed them? They are in use nevertheless, and are pinned again within a minute"
        found = _part("maps", "failure", f"the pins in {agent.datapath.pins} cannot be read: {error}", remedy)
    parts = status["parts"]
    parts.insert(_index(parts, "datapath") + 1, found)
    status["state"] = _worst(parts)
    status["version"] = __version__
    status["kernel"] = platform.release()
    status["uptime"] = round(time.monotonic() - _STARTED, 3)
    status["node-addresses"] = _node_addresses(agent)
    status["features"] = _features(agent)
    status["endpoints"] = Counter(str(endpoint.state) for endpoint in agent.endpoints.endpoints())
    status["policy-shares"] = [msgspec.to_builtins(item) for item in policy_shares(agent.repository, agent.realizer)]
    status["controllers"] = [msgspec.to_builtins(item) for item in agent.controllers.statuses.values()]
    status["maps"] = [msgspec.to_builtins(item) for item in maps]
    pods = {str(address): item for item in agent.endpoints.endpoints() for address in item.addresses}
    status["addresses"] = [{**entry, **_user(pods.get(entry["ip"]))} for entry in status["addresses"]]
    return status


def _part(name: str, state: str, message: str, remedy: str = "") -> Part:
    part = {"name": name, "state": state, "message": message}
    return {**part, "remedy": remedy} if state != "ok" and remedy else part


def _worst(parts: list[Part]) -> str:
    state: str = max((part["state"] for part in parts), key=_RANK.index)
    return state


def _index(parts: list[Part], name: str) -> int:
    return [part["name"] for part in parts].index(name)


def _providers(agent: Agent) -> Part:
    chosen = [
        f"{item['kind']}={item['name']}" for item in agent.plugins.active() if item["kind"] not in ("kvstore", "ipam")
    ]
    broken = [plugin for plugin in agent.plugins.plugins if plugin.error]
    if broken:
        text = "; ".join(f"{plugin.name}: {plugin.error}" for plugin in broken)
        return _part("plugins", "warning", text, "repair, remove or disable them: `ciliate plugins list` shows all")
    return _part("plugins", "ok", ", ".join(chosen))


def _stores(agent: Agent) -> list[Part]:
    assigned, store = len(agent.backend.assigned), agent.store_status
    agreed = len(agent.backend.identities()) - assigned
    # a liveness probe must not restart every agent of a cluster because its store is away
    state = "ok" if store.ok else "warning" if store.remote else "failure"
    remedy = "pods keep their network, and new ones come up where their labels are known: see to the store"
    return [
        _part("kvstore", state, f"{agent.config.kvstore}: {store.message}", remedy),
        _part(
            "identities",
            "ok",
            f"{agreed} of the cluster, {assigned} assigned, {len(agent.local.identities())} of prefixes",
        ),
    ]


def _ipam(agent: Agent) -> Part:
    counts = Counter[int](address.version for address in agent.ipam.owners())
    used, capacity = max(counts.values(), default=0), agent.ipam.capacity()
    text = f"{agent.config.ipam}: {_families(counts)} addresses in use, room for {capacity} of each"
    resting = Counter[int](address.version for address in agent.resting.resting)
    if resting:
        text = f"{text}; {agent.resting.summary()}: {agent.resting.reason()}"
    remedy = "remove pods, or give the node larger ranges (ipv4-range, ipv6-range)"
    if used >= capacity:
        # restarting the agent, as probes do, brings no address back that rests
        busy = max((counts - resting).values(), default=0)
        return _part("ipam", "failure" if busy >= capacity else "warning", f"{text}: new pods get none", remedy)
    return _part("ipam", "warning" if used > PRESSURE_WARNING * capacity else "ok", text, remedy)


def _families(counts: Counter[int]) -> str:
    return " and ".join(f"{counts[version]} IPv{version}" for version in sorted(counts)) or "no"


def _datapath(agent: Agent) -> Part:
    config, monitor = agent.config, agent.monitor
    text = f"veth, {_mode(config.tunnel)}, loader {config.datapath_loader}, {monitor.seen} events seen"
    if monitor.malformed:
        remedy = "agent and programs differ: restart the agent, which loads its own"
        return _part("datapath", "warning", f"{text}, {monitor.malformed} unreadable", remedy)
    return _part("datapath", "ok", text)


def _mode(tunnel: str) -> str:
    return "direct routing" if tunnel == "disabled" else f"{tunnel} tunnels"


def _maps(maps: list[mapview.MapSummary]) -> Part:
    counted = sorted((item for item in maps if item.entries is not None), key=_share)
    full = [item for item in counted if _pressure(item) != "ok"]
    remedy = "fewer prefixes or ports in policies take fewer entries; `ciliate map list` shows all"
    if all("_ct_" in item.name for item in full):
        remedy = "raise bpf-ct-global-tcp-max and bpf-ct-global-any-max: old flows make room for new ones meanwhile"
    shown = full or counted[-2:][::-1]
    text = ", ".join(f"{item.name.removeprefix('ciliate_')} {item.entries} of {item.max_entries}" for item in shown)
    state = max((_pressure(item) for item in counted), key=_RANK.index, default="ok")
    return _part("maps", state, ("nearly full: " if full else "fullest: ") + text, remedy)


def _share(item: mapview.MapSummary) -> float:
    return (item.entries or 0) / item.max_entries


def _pressure(item: mapview.MapSummary) -> str:
    if _share(item) < PRESSURE_WARNING:
        return "ok"
    return "failure" if _share(item) >= PRESSURE_FAILURE and item.type != "lru-hash" else "warning"


def _endpoints(agent: Agent) -> Part:
    endpoints = agent.endpoints.endpoints()
    failing = [item for item in endpoints if item.failures]
    waiting = [item for item in endpoints if item.state != State.READY]
    states = Counter(str(item.state) for item in endpoints)
    text = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none yet"
    if failing:
        details = "; ".join(f"{_name(item)}: {item.last_error}" for item in failing[:_SHOWN])
        return _part("endpoints", "failure", f"{text}; {details}", f"`ciliate endpoint log {failing[0].id}` says more")
    gone = [item for item in endpoints if not item.connected()]
    if gone:
        details = ", ".join(_name(item) for item in gone[:_SHOWN])
        remedy = f"their runtime should have said DEL; `ciliate endpoint disconnect {gone[0].id}` forgets one"
        return _part("endpoints", "failure", f"{text}; devices gone: {details}", remedy)
    if waiting:
        details = ", ".join(_name(item) for item in waiting[:_SHOWN])
        remedy = f"passes by itself within seconds; if not, `ciliate endpoint log {waiting[0].id}` says why"
        return _part("endpoints", "warning", f"{text}; not ready: {details}", remedy)
    return _part("endpoints", "ok", text)


def _name(endpoint: Endpoint) -> str:
    return f"{endpoint.id} ({endpoint.pod})" if endpoint.pod else str(endpoint.id)


def _policy(agent: Agent) -> Part:
    count, revision = len(agent.repository.objects()), agent.repository.revision
    endpoints = agent.endpoints.endpoints()
    behind = [item for item in endpoints if item.policy_revision < revision]
    message = f"{count} objects, revision {revision}, enforcement {agent.config.enable_policy}"
    shares = policy_shares(agent.repository, agent.realizer)
    if shares and shares[0].used > SHARE_SHOWN:
        first, by = shares[0], f", most by {shares[0].largest}" if shares[0].largest else ""
        message += f"; namespace {first.namespace} takes most: {first.used:.0%} of its share{by}"
    problems = [f"not in force: {text}" for text in dict.fromkeys(agent.repository.shares.refused.values())]
    problems += [f"{_name(item)}: {item.policy_problem}" for item in endpoints if item.policy_problem]
    if problems:
        remedy = "fewer prefixes or ports in the policies that select them, or joined ones, take fewer entries"
        return _part("policy", "warning", "; ".join([message, *problems[:_SHOWN]]), remedy)
    unread = agent.policies.unread()
    if unread:
        shown = "; ".join([message, f"{len(unread)} mistakes in stored policies", *unread[:_SHOWN]])
        remedy = "an earlier version took them: they are in force as far as they can be read; import them anew, mended"
        return _part("policy", "warning", shown, remedy)
    unserved = [f"{text}: {', '.join(_titles(items))}" for text, items in agent.repository.unserved().items()]
    if behind:
        details = ", ".join(_name(item) for item in behind[:_SHOWN])
        remedy = f"passes by itself; if not, `ciliate endpoint regenerate {behind[0].id}` and the agent's log"
        message = "; ".join([f"{message}; endpoints behind: {details}", *unserved])
        return _part("policy", "warning", message, remedy)
    if unserved:
        remedy = "start a proxy for them, or allow at layer 3 and 4 what is to get through without"
        return _part("policy", "warning", "; ".join([message, *unserved]), remedy)
    return _part("policy", "ok", message)


def _titles(items: list[PolicyObject]) -> list[str]:
    """Names of some policies, the rest counted."""
    names = [f"{item.kind} {item.namespace}/{item.name}" for item in items[:_SHOWN]]
    return [*names, f"{len(items) - _SHOWN} more"] if len(items) > _SHOWN else names


def _of_plugin(name: str, source: StatusSource) -> Part:
    try:
        state, message = source.status()
        if state not in _RANK:
            raise ValueError(f"state {state!r} given, expected one of {', '.join(_RANK)}")
    except Exception as error:  # a plugin may raise anything; that is a state of its part, not of ours
        return _part(name, "failure", f"plugin: {type(error).__name__}: {error}")
    return _part(name, state, message)


def _controllers(agent: Agent) -> Part:
    failing = agent.controllers.failing()
    if failing:
        text = "; ".join(f"{item.name} ({item.consecutive_failures} times): {item.last_error}" for item in failing)
        remedy = "each is retried by itself; `ciliate debuginfo` has the history, the agent's log the details"
        return _part("controllers", "failure", text, remedy)
    return _part("controllers", "ok", f"{len(agent.controllers.statuses)}, none failing")


def _node_addresses(agent: Agent) -> list[str]:
    found = {prefix.network_address for prefix in agent.node_prefixes}
    shown = [item for item in found if not item.is_loopback and not item.is_link_local]
    return [str(item) for item in sorted(shown, key=lambda item: (item.version, int(item)))]


def _features(agent: Agent) -> dict[str, str]:
    config = agent.config
    families = [name for name, on in (("IPv4", config.enable_ipv4), ("IPv6", config.enable_ipv6)) if on]
    return {
        "families": " and ".join(families),
        "mode": f"veth, {_mode(config.tunnel)}",
        "loader": config.datapath_loader,
        "mtu": f"{agent.mtu.current.route} bytes in pods, {agent.mtu.current.device} on the node's links",
        "masquerade": config.masquerade,
        "encryption": config.encryption,
        "monitor": config.monitor_aggregation,
        "plugins": ", ".join(agent.features) or "none",
        **_kernel_features(),
    }


@cache
def _kernel_features() -> dict[str, str]:
    return {"jit": _jit(), "btf": "yes" if Path("/sys/kernel/btf/vmlinux").exists() else "no"}


def _jit() -> str:
    """Only the initial network namespace shows this one."""
    try:
        return "off" if Path("/proc/sys/net/core/bpf_jit_enable").read_text().strip() == "0" else "on"
    except FileNotFoundError:
        return "not known"


def _user(endpoint: Endpoint | None) -> dict[str, Any]:
    return {"pod": endpoint.pod, "endpoint": endpoint.id} if endpoint is not None else {"pod": "", "endpoint": None}
