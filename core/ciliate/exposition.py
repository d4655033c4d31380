"""Metrics in the form of Prometheus' client library, from what parts measure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ciliate.measure import Count, Level, Times

PREFIX = "ciliate_"


class MeasuredCollector(Collector):
    """Reads measurements when somebody asks."""

    def __init__(self, measured: Iterable[Count | Level | Times]) -> None:
        self._measured = tuple(measured)

    def collect(self) -> Iterator[Metric]:
        """A family for each."""
        return map(family, self._measured)


def family(item: Count | Level | Times, name: str = "") -> Metric:
    """One measurement as a family, by its own name where none is given."""
    name = name or PREFIX + item.name
    if isinstance(item, Times):
        times = HistogramMetricFamily(name, item.text, labels=item.labels)
        bounds = [*map(str, item.bounds), "+Inf"]
        for labels, found in item.values().items():
            times.add_metric(labels, list(zip(bounds, found.cumulative, strict=True)), found.total)
        return times
    plain = (CounterMetricFamily if isinstance(item, Count) else GaugeMetricFamily)(name, item.text, labels=item.labels)
    for labels, value in item.values().items():
        plain.add_metric(labels, value)
    return plain
