"""A plugin's collector that fails: the others' metrics are told, and the log names it once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ciliate.agent.metrics import OfPlugin


class Good(Collector):
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("good", "", value=1)


class Raising(Collector):
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("half", "", value=1)
        raise RuntimeError("boom")


class Unwritable(Collector):
    def collect(self) -> list[Metric]:
        metric = GaugeMetricFamily("unwritable", "")
        metric.add_sample("unwritable", {}, "not a number")  # type: ignore[arg-type]
        return [metric]


@pytest.mark.parametrize("bad", [Raising(), Unwritable(), object()])
def test_one_bad_collector_takes_nothing_from_the_others(bad: Collector, caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    registry.register(OfPlugin("bad", bad))
    registry.register(OfPlugin("good", Good()))
    for _ in range(2):
        text = generate_latest(registry)
        assert b"good 1.0" in text and b"half" not in text
    (record,) = caplog.records
    assert "plugin provider bad" in record.getMessage()
