"""The typed facade over the event hooks: a misspelt hook or argument is a type error, not a silent nothing."""

from __future__ import annotations

from ciliate.plugin.manager import PluginManager


class Hooks:
    """What core tells plugins. Each method calls one hook of every plugin, on the loop; `specs` says what it means."""

    def __init__(self, manager: PluginManager) -> None:
        self._manager = manager

    def agent_started(self, node_name: str) -> None:
        """The API and CNI answer."""
        self._manager.notify("ciliate_agent_started", node_name=node_name)

    def agent_stopping(self, node_name: str) -> None:
        """The agent is about to stop."""
        self._manager.notify("ciliate_agent_stopping", node_name=node_name)

    def endpoint_created(self, endpoint_id: int, labels: list[str]) -> None:
        """An endpoint is ready."""
        self._manager.notify("ciliate_endpoint_created", endpoint_id=endpoint_id, labels=labels)

    def endpoint_deleted(self, endpoint_id: int) -> None:
        """An endpoint is gone."""
        self._manager.notify("ciliate_endpoint_deleted", endpoint_id=endpoint_id)

    def policy_changed(self, revision: int) -> None:
        """A policy revision is in the kernel."""
        self._manager.notify("ciliate_policy_changed", revision=revision)
