"""Reports of scenarios: the same table and the same JSON document whoever answered (DESIGN section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from ciliate.scenario.model import Flow


class FlowResult(msgspec.Struct, frozen=True):
    """A flow, what really holds (``allow``, ``deny``; ``error`` where it could not be found out), and why.

    ``assumed``: layer-7 parsers that a proxy is taken to serve.
    """

    flow: Flow
    actual: str
    why: str = ""
    step: str = ""
    """The step after which it was asked; empty before the first one."""
    assumed: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """True where the expectation is met."""
        return self.flow.verdict == self.actual


class ScenarioResult(msgspec.Struct, frozen=True):
    """All results of one scenario."""

    name: str
    flows: Sequence[FlowResult]


def failed(results: Iterable[ScenarioResult]) -> int:
    """How many flows differ from what was expected."""
    return sum(not item.good for result in results for item in result.flows)


def to_json(results: Iterable[ScenarioResult]) -> dict[str, Any]:
    """The document of ``-o json``."""
    results = list(results)
    scenarios = [{"name": result.name, "flows": [_flow(item) for item in result.flows]} for result in results]
    return {"scenarios": scenarios, "failed": failed(results)}


def _flow(result: FlowResult) -> dict[str, Any]:
    flow = result.flow
    document: dict[str, Any] = {
        "from": str(flow.src),
        "to": str(flow.dst),
        "port": flow.port,
        "protocol": flow.protocol,
    }
    if flow.direction:
        document["direction"] = flow.direction
    if flow.family:
        document["family"] = flow.family
    if result.step:
        document["step"] = result.step
    for name in ("http", "dns", "kafka", "generic"):
        request = getattr(flow, name)
        if request is not None:
            document[name] = msgspec.to_builtins(request)
    return {**document, "expected": flow.verdict, "actual": result.actual, "why": result.why}


def render_table(results: Iterable[ScenarioResult]) -> str:
    """The table for people: per scenario its flows, differences marked, and a closing line with the counts."""
    results = list(results)
    lines: list[str] = []
    for result in results:
        lines += [f"{result.name}", *_rows(result.flows), ""]
    total = sum(len(result.flows) for result in results)
    wrong = failed(results)
    lines.append(f"{total} flows, {total - wrong} as expected, {wrong} different")
    return "\n".join(lines)


def _rows(results: Sequence[FlowResult]) -> Iterator[str]:
    """The lines of a scenario's flows, each step's below its name."""
    step = ""
    lines = _aligned([_HEADER, *map(_row, results)])
    yield lines[0]
    for result, line in zip(results, lines[1:], strict=True):
        if result.step != step:
            step = result.step
            yield f"after {step}:" if step else "at first again:"
        yield line


_HEADER = ("", "FROM", "TO", "PORT", "EXPECTED", "ACTUAL", "WHY")


def _row(result: FlowResult) -> tuple[str, ...]:
    flow = result.flow
    mark = "ok" if result.good else "DIFFERS"
    return (mark, str(flow.src), str(flow.dst), _port(flow), flow.verdict, result.actual, result.why)


def _port(flow: Flow) -> str:
    port = "" if flow.port is None else str(flow.port)
    text = "/".join(part for part in (port, flow.protocol or "") if part) or "any"
    if flow.http is not None:
        text += f" {flow.http.method} {flow.http.path}"
    elif flow.dns is not None:
        text += f" {flow.dns.name}"
    elif flow.kafka is not None:
        text += f" {flow.kafka.role or flow.kafka.api_key} {flow.kafka.topic or ','.join(flow.kafka.topics)}".rstrip()
    elif flow.generic is not None:
        text += f" {flow.generic.l7proto} {' '.join(flow.generic.fields.values())}".rstrip()
    if flow.family:
        text += f" IPv{flow.family}"
    return f"{text} ({flow.direction})" if flow.direction else text


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
