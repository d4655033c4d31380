"""Durations as people write them: ``5s``, ``1m30s``, ``12h``, or a number of seconds."""

from __future__ import annotations

import math
import re

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
LONGEST = 10 * 365 * 86400.0


def parse_duration(value: object) -> float:
    """Seconds of a duration; ValueError where it is none or negative."""
    text = "" if isinstance(value, bool) else str(value).strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        seconds = float(text)
    elif text and not _PART.sub("", text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    else:
        seconds = math.inf
    if seconds > LONGEST:
        raise ValueError("expected a duration like 5s, 1m30s or 12h, of at most 10 years")
    return seconds
