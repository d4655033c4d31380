"""Turns datapath events into what people read: pod names, identities, the deciding rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ciliate.agent.monitor import plain
from ciliate.datapath.events import MonitorEvent
from ciliate.datapath.reasons import DIRECTIONS
from ciliate.endpoint.manager import EndpointError, EndpointManager
from ciliate.identity import INIT, RESERVED, Identity
from ciliate.policy.isolation import isolating
from ciliate.policy.repository import Repository
from ciliate.policy.resolve import SharedPolicy

POLICY_DENIED = 133
"""Drop reason "Policy denied"."""
OWN_PODS = "the rule that a node may reach its own pods"


class Describer:
    """Adds names to events. Look-ups only, no input or output."""

    def __init__(
        self, endpoints: EndpointManager, identity: Callable[[int], Identity | None], repository: Repository
    ) -> None:
        self._endpoints = endpoints
        self._identity = identity
        self._repository = repository
        self._isolations: dict[tuple[int, str], list[str]] = {}
        self._revision = -1

    def __call__(self, event: MonitorEvent) -> dict[str, Any]:
        """The event as a document with ``text``, the line that `ciliate monitor` prints."""
        data = plain(event)
        data["src_labels"] = self._labels(event.src_identity)
        data["dst_labels"] = self._labels(event.dst_identity)
        data["rule_origin"] = self._rule(event.rule)
        data["isolated_by"] = self._isolating(event)
        data["text"] = self._text(event, data)
        return data

    def _labels(self, number: int) -> list[str]:
        if number in RESERVED:
            return [f"reserved:{RESERVED[number]}"]
        identity = self._identity(number)
        return identity.labels.strings() if identity else []

    def _rule(self, number: int) -> str | None:
        """The rule that decided; None where none did."""
        if not number:
            return None
        origin = self._repository.rule(number)
        return str(origin) if origin else f"rule {number}, which has gone meanwhile"

    def _isolating(self, event: MonitorEvent) -> list[str]:
        """What isolates the endpoint, where a packet was dropped because no rule allows it."""
        policy = self._repository.policy_of(event.endpoint)
        if event.type != "drop" or event.reason != POLICY_DENIED or event.rule or policy is None:
            return []
        if self._revision != self._repository.revision:
            self._isolations, self._revision = {}, self._repository.revision
        key = (policy.identity, event.direction)
        found = self._isolations.get(key)
        if found is None:
            found = isolating(self._repository, policy, DIRECTIONS.index(event.direction)) or [self._mode(policy)]
            self._isolations[key] = found
        return found

    def _mode(self, policy: SharedPolicy) -> str:
        if self._repository.settings.enforcement == "always":
            return "the enforcement mode, always"
        return "having no labels yet (reserved:init)" if policy.identity == INIT else "a policy that has gone meanwhile"

    def _name(self, number: int) -> str:
        if number in RESERVED:
            return f"{RESERVED[number]}({number})"
        identity = self._identity(number)
        if identity is None:
            return str(number)
        own = [label for label in identity.labels if not label.key.startswith("io.cilium.")]
        names = [f"{label.key.rsplit('.', 1)[-1]}={label.value}" if label.value else label.key for label in own]
        return f"{number}({','.join(names)})"

    def _decided(self, event: MonitorEvent, data: dict[str, Any]) -> str:
        """What decided, for a line of text: begins with a space, or is nothing where policy was not asked."""
        if data["isolated_by"]:
            return f" no rule allows it, isolated by {', '.join(data['isolated_by'])}"
        if data["rule_origin"]:
            return f" by {data['rule_origin']}"
        if event.type != "policy-verdict":
            return ""
        return (
            " by the rule that a node may reach its own pods" if self._enforced(event) else " (no policy isolates it)"
        )

    def _enforced(self, event: MonitorEvent) -> bool:
        try:
            endpoint = self._endpoints.get(event.endpoint)
        except EndpointError:
            return False
        return endpoint.enforce_ingress if event.direction == "ingress" else endpoint.enforce_egress

    def _text(self, event: MonitorEvent, data: dict[str, Any]) -> str:
        who = f"identity {self._name(event.src_identity)} -> {self._name(event.dst_identity)}"
        decided = self._decided(event, data)
        summary = data.get("summary", "")
        if event.type == "drop":
            return (
                f"xx drop ({event.reason_text}) {event.direction}{decided} endpoint {event.endpoint} {who}: {summary}"
            )
        if event.type == "policy-verdict":
            verdict = event.verdict
            return f"Policy verdict: {verdict} {event.direction}{decided} endpoint {event.endpoint} {who}: {summary}"
        if event.type == "debug":
            found = f"state {event.ct_state} verdict {event.verdict}{decided}"
            return f"-- {event.observation} {event.direction} endpoint {event.endpoint} {who} {found}: {summary}"
        return f"-> {event.observation} endpoint {event.endpoint} {who} state {event.ct_state}: {summary}"
