"""Options of single endpoints (inventory 4.1): what the datapath tells of their packets.

An option that an endpoint does not have of its own is as the node's.
"""

from __future__ import annotations

from collections.abc import Mapping

from ciliate.datapath.layout import MONITOR_NO_DROPS, MONITOR_OWN, MONITOR_VERDICT
from ciliate.datapath.model import MONITOR_LEVELS

ENABLED, DISABLED, DEFAULT = "Enabled", "Disabled", "Default"
DROPS, TRACES, LEVEL = "DropNotification", "TraceNotification", "MonitorAggregationLevel"
VALUES: Mapping[str, tuple[str, ...]] = {
    DROPS: (ENABLED, DISABLED),
    TRACES: (ENABLED, DISABLED),
    LEVEL: tuple(MONITOR_LEVELS),
}
"""Every option with its values; each can also be ``Default`` again."""


class OptionError(ValueError):
    """An option that there is not, or a value that it has not; ``field`` is its name."""

    def __init__(self, field: str, text: str) -> None:
        self.field = field
        super().__init__(text)


def changed(own: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """An endpoint's ``own`` options after a change; OptionError where one cannot be made."""
    result = dict(own)
    for name, value in changes.items():
        values = VALUES.get(name)
        if values is None:
            raise OptionError(f"options.{name}", f"options.{name}: expected one of {', '.join(VALUES)}")
        if value not in (*values, DEFAULT):
            expected = f"expected one of {', '.join(values)} or {DEFAULT}"
            raise OptionError(f"options.{name}", f"options.{name}: {value!r} given, {expected}")
        result[name] = value
    return {name: value for name, value in result.items() if value != DEFAULT}


def effective(own: Mapping[str, str], node_level: str) -> dict[str, str]:
    """What holds for an endpoint, on a node with this level of aggregation."""
    return {DROPS: ENABLED, TRACES: ENABLED, LEVEL: node_level, **own}


def monitor(own: Mapping[str, str], node_level: str) -> int:
    """What the datapath is told of an endpoint's events; 0: as the node's."""
    if not own:
        return 0
    options = effective(own, node_level)
    level = MONITOR_LEVELS[options[LEVEL]]
    if options[TRACES] == DISABLED:
        level &= MONITOR_VERDICT
    return MONITOR_OWN | level | (MONITOR_NO_DROPS if options[DROPS] == DISABLED else 0)
