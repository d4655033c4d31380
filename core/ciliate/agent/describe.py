"""Turns datapath events into what people read: pod names, identities, the deciding rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ciliate.agent.monitor import plain
from ciliate.datapath.events import MonitorEvent
from ciliate.datapath.reasons import DIRECTIONS
from ciliate.endpoint.manager import EndpointManager
from ciliate.identity import RESERVED, Identity
from ciliate.policy.importer import PolicyObject
from ciliate.policy.repository import Repository

POLICY_DENIED = 133
"""Drop reason "Policy denied"."""


def _full_name(item: PolicyObject) -> str:
    return f"{item.namespace}/{item.name}" if item.namespace else item.name


class Describer:
    """Adds names to events. Look-ups only, no input or output."""

    def __init__(
        self, endpoints: EndpointManager, identity: Callable[[int], Identity | None], repository: Repository
    ) -> None:
        self._endpoints = endpoints
        self._identity = identity
        self._repository = repository

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
        origin = self._repository.rule(number) if number else None
        return str(origin) if origin else None

    def _isolating(self, event: MonitorEvent) -> list[str]:
        """What isolates the endpoint, where a packet was dropped because no rule allows it."""
        if event.type != "drop" or event.reason != POLICY_DENIED or event.rule:
            return []
        found = self._repository.isolating(event.endpoint, DIRECTIONS.index(event.direction))
        return [f"{item.kind} {_full_name(item)} ({item.document.file}:{item.document.line})" for item in found]

    def _name(self, number: int) -> str:
        if number in RESERVED:
            return f"{RESERVED[number]}({number})"
        identity = self._identity(number)
        if identity is None:
            return str(number)
        own = [label for label in identity.labels if not label.key.startswith("io.cilium.")]
        names = [f"{label.key.rsplit('.', 1)[-1]}={label.value}" if label.value else label.key for label in own]
        return f"{number}({','.join(names)})"

    def _text(self, event: MonitorEvent, data: dict[str, Any]) -> str:
        who = f"identity {self._name(event.src_identity)} -> {self._name(event.dst_identity)}"
        rule = f" by {data['rule_origin']}" if data["rule_origin"] else ""
        if data["isolated_by"]:
            rule = f" no rule allows it, isolated by {', '.join(data['isolated_by'])}"
        summary = data.get("summary", "")
        if event.type == "drop":
            return f"xx drop ({event.reason_text}) {event.direction}{rule} endpoint {event.endpoint} {who}: {summary}"
        if event.type == "policy-verdict":
            verdict = event.verdict
            return f"Policy verdict: {verdict} {event.direction}{rule} endpoint {event.endpoint} {who}: {summary}"
        return f"-> {event.observation} endpoint {event.endpoint} {who} state {event.ct_state}: {summary}"
