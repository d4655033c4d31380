"""Results as a table in text, and growth as a plot in SVG."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

_COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#b45309", "#0f766e")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 330, 220, 70, 40, 90


class Figure(NamedTuple):
    """One measured figure. ``ratio`` is 1 or less where the target is met; 0 where there is none."""

    what: str
    figure: str
    target: str
    ratio: float
    beside: str = ""


def table(figures: Sequence[Figure]) -> str:
    """The figures in columns."""
    rows = [("what", "figure", "target", "ratio", "")]
    rows += [(item.what, item.figure, item.target, _verdict(item.ratio), item.beside) for item in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{what:<{widths[0]}}  {figure:>{widths[1]}}  {target:>{widths[2]}}  {ratio:>{widths[3]}}  {beside}".rstrip()
        for what, figure, target, ratio, beside in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _verdict(ratio: float) -> str:
    if not ratio:
        return ""
    return f"{ratio:.2f} {'pass' if ratio <= 1 else 'MISS'}"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.2g} ms" if value >= 1e-3 else _micro(value)


def _micro(value: float) -> str:
    return f"{value * 1e6:.3g} µs"


Points = Sequence[tuple[float, float]]


class Panel(NamedTuple):
    """One set of axes, both logarithmic: ``series`` by name, as (x, y) pairs. ``unit`` is that of y."""

    title: str
    across: str
    unit: str
    series: dict[str, Points]


def write_svg(path: Path, title: str, rows: Sequence[Sequence[Panel]]) -> None:
    """Write the panels, row by row; a name has the same colour in every one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for panel in row for name in panel.series))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    width = max(map(len, rows)) * (_WIDTH + _GAP) + _LEFT
    height = len(rows) * (_HEIGHT + _GAP) + _TOP + 40 + 20 * len(names)
    parts = [_text(_LEFT, 24, title, "16px", "start")]
    for line, row in enumerate(rows):
        for column, panel in enumerate(row):
            x, y = _LEFT + column * (_WIDTH + _GAP), _TOP + 30 + line * (_HEIGHT + _GAP)
            parts += [f'<g transform="translate({x} {y})">', *_panel(panel, colours), "</g>"]
    for index, name in enumerate(names):
        y = height - 20 * (len(names) - index)
        parts += [f'<rect x="{_LEFT}" y="{y - 8}" width="18" height="4" fill="{colours[name]}"/>']
        parts += [_text(_LEFT + 26, y - 2, name, "12px", "start")]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    path.write_text("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"]))


def _panel(panel: Panel, colours: dict[str, str]) -> Iterator[str]:
    points = [point for series in panel.series.values() for point in series]
    across, up = _Axis([x for x, _ in points], _WIDTH), _Axis([y for _, y in points], _HEIGHT)
    yield _text(0, -8, panel.title, "13px", "start")
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>'
    for value in across.ticks():
        x = across.place(value)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}" stroke="#e5e5e5"/>'
        yield _text(x, _HEIGHT + 16, f"{value:,.0f}", "11px", "middle")
    for value in up.ticks():
        y = _HEIGHT - up.place(value)
        yield f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e5"/>'
        yield _text(-6, y + 4, f"{value:,.0f} {panel.unit}" if panel.unit != "s" else _tick(value), "11px", "end")
    yield _text(_WIDTH / 2, _HEIGHT + 34, panel.across, "12px", "middle")
    for name, series in panel.series.items():
        places = [(across.place(x), _HEIGHT - up.place(y)) for x, y in series]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>' for x, y in places)


def _tick(value: float) -> str:
    for size, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= size * 0.999:
            return f"{value / size:g} {unit}"
    return f"{value:g} s"


class _Axis:
    """A logarithmic scale of whole decades over ``length`` pixels."""

    def __init__(self, values: Sequence[float], length: float) -> None:
        self._low = math.floor(math.log10(min(values)) + 1e-9)
        self._high = max(math.ceil(math.log10(max(values)) - 1e-9), self._low + 1)
        self._length = length

    def ticks(self) -> Iterator[float]:
        """The decades."""
        return (10.0**power for power in range(self._low, self._high + 1))

    def place(self, value: float) -> float:
        """Pixels from the start."""
        return (math.log10(value) - self._low) / (self._high - self._low) * self._length


def _text(x: float, y: float, text: str, size: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def run_parts(description: str, parts: Sequence[str], measure: Callable[[str, bool], list[Figure]]) -> None:
    """The command line of a benchmark in parts: measure those that are asked for, with --quick fast, and print them."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and objects")
    parser.add_argument("--only", choices=parts, action="append", help="leave the other parts out")
    arguments = parser.parse_args()
    if os.geteuid():
        sys.exit(f"{parser.prog}: needs root, for namespaces and BPF programs")
    print(table([figure for part in arguments.only or parts for figure in measure(part, arguments.quick)]))
