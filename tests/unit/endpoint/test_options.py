"""Options of single endpoints: what is refused, what follows the node, what the datapath is told. Tier unit."""

from __future__ import annotations

import pytest

from ciliate.datapath import layout
from ciliate.datapath.model import MONITOR_LEVELS
from ciliate.endpoint import options
from ciliate.endpoint.options import DEFAULT, DISABLED, DROPS, ENABLED, LEVEL, TRACES, OptionError

OWN, QUIET, VERDICT = layout.MONITOR_OWN, layout.MONITOR_NO_DROPS, layout.MONITOR_VERDICT


@pytest.mark.parametrize(
    ("own", "node", "expected"),
    [
        ({}, "none", 0),
        ({DROPS: DISABLED}, "medium", OWN | QUIET | MONITOR_LEVELS["medium"]),
        ({DROPS: ENABLED}, "low", OWN | MONITOR_LEVELS["low"]),
        ({TRACES: DISABLED}, "none", OWN | VERDICT),
        ({LEVEL: "none"}, "maximum", OWN | MONITOR_LEVELS["none"]),
        ({LEVEL: "none", TRACES: DISABLED, DROPS: DISABLED}, "none", OWN | QUIET | VERDICT),
    ],
)
def test_what_the_datapath_is_told(own: dict[str, str], node: str, expected: int) -> None:
    assert options.monitor(own, node) == expected
    assert expected < 256


def test_changes_and_ways_back() -> None:
    own = options.changed({}, {DROPS: DISABLED, LEVEL: "none"})
    assert options.effective(own, "low") == {DROPS: DISABLED, TRACES: ENABLED, LEVEL: "none"}
    assert options.changed(own, {LEVEL: DEFAULT}) == {DROPS: DISABLED}
    assert options.changed(own, {LEVEL: DEFAULT, DROPS: DEFAULT}) == {}
    assert own == {DROPS: DISABLED, LEVEL: "none"}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("NAT46", ENABLED, "expected one of DropNotification"),
        (DROPS, "yes", "'yes' given, expected one of Enabled, Disabled or Default"),
        (LEVEL, "high", "'high' given, expected one of none, low, medium, maximum or Default"),
    ],
)
def test_refusals(name: str, value: str, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        options.changed({DROPS: DISABLED}, {name: value})
    assert caught.value.field == f"options.{name}"
    assert text in str(caught.value)
