"""Finding and importing plugins; a broken one is a record, not an exception."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from ciliate.plugin.types import Provider

GROUP = "ciliate.plugins"
OWN_DISTRIBUTION = "ciliate"


class PluginSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says of plugins."""

    disabled: tuple[str, ...] = ()
    """Entry-point names that are not even imported."""
    prefer: dict[str, str] = {}
    """``kind/name`` -> distribution, where two distributions provide the same."""
    third_party: bool = True
    """False is the safe mode: only plugins of our own distribution."""
    hook_timeout: float = 5.0
    """Seconds that importing a plugin and each of its register hooks may take."""
    start_timeout: float = 60.0
    """Seconds that a provider's start and stop may take."""


@dataclass
class FoundPlugin:
    """One entry point of the group ``ciliate.plugins``. ``error`` is set where it is broken."""

    name: str
    module: str
    distribution: str
    version: str
    disabled: bool = False
    error: str = ""
    providers: list[Provider] = field(default_factory=list)

    @property
    def own(self) -> bool:
        """True for plugins of our own distribution."""
        return self.distribution == OWN_DISTRIBUTION

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


def find_plugins(settings: PluginSettings) -> list[FoundPlugin]:
    """Every entry point, our own first, then by distribution and name. Imports no plugin."""
    found = [_found(entry) for entry in importlib.metadata.entry_points(group=GROUP)]
    unique = {(item.distribution, item.name): item for item in found}
    for item in unique.values():
        item.disabled = item.name in settings.disabled or not (item.own or settings.third_party)
    return sorted(unique.values(), key=lambda item: (not item.own, item.distribution, item.name))


def _found(entry: importlib.metadata.EntryPoint) -> FoundPlugin:
    distribution = entry.dist
    name = distribution.name if distribution else "unknown"
    version = distribution.version if distribution else "unknown"
    return FoundPlugin(entry.name, entry.value, name, version)


def names(plugins: Iterable[FoundPlugin]) -> str:
    """The plugins as one line of text."""
    return ", ".join(str(item) for item in plugins)
