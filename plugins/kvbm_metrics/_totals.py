"""The readings of one engine, added up where nobody else counts them."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from kvbm_metrics._table import METRICS, Kind, Metric, labels_of

__all__ = ["Totals"]

_FAMILIES: Final[Mapping[Kind, Any]] = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


@dataclass(slots=True)
class _Spread:
    """What a histogram has observed: how many up to each bound, and the sum."""

    counts: list[int]
    sum: float = 0.0


@dataclass(slots=True)
class _Series:
    """One metric, by its labels."""

    metric: Metric
    values: dict[tuple[str, ...], Any] = field(default_factory=dict)


class Totals(Collector):
    """Adds readings up, and gives them to Prometheus's library when they are asked for.

    The library's own counters are written into `PROMETHEUS_MULTIPROC_DIR` where that is set, and there
    they are added to those of the same name in every other process: the engine's ``/metrics`` would have
    each number twice. These are in this process alone.

    May be used by several threads.

    Args:
        label_names: Labels that each metric has beside its own, first.
        label_values: Their values.
        prefix: Begins every name, see `Exporter`.
    """

    def __init__(self, label_names: Sequence[str], label_values: Sequence[object], prefix: str) -> None:
        self._label_names = list(label_names)
        self._label_values = [str(value) for value in label_values]
        self._prefix = prefix
        self._lock = threading.Lock()
        self._series = {name: _Series(metric) for name, metric in METRICS.items()}

    def __repr__(self) -> str:
        series = sum(len(each.values) for each in self._series.values())
        return f"<Totals {len(self._series)} metrics, {series} series>"

    def observe(self, readings: Mapping[str, Any]) -> None:
        """Add readings."""
        with self._lock:
            for key, value in readings.items():
                metric, labels = labels_of(key)
                _add(metric, self._series[metric.name].values, tuple(labels), value)

    def collect(self) -> Iterator[Any]:
        """Give every metric as it is now."""
        for series in self._series.values():
            metric = series.metric
            family = _FAMILIES[metric.kind](
                self._prefix + metric.name, metric.text, labels=[*self._label_names, *metric.labels]
            )
            with self._lock:
                for labels, value in series.values.items():
                    own = [*self._label_values, *labels]
                    if metric.kind is Kind.HISTOGRAM:
                        family.add_metric(own, _cumulated(metric, value), value.sum)
                    else:
                        family.add_metric(own, value)
            yield family


def _add(metric: Metric, values: dict[tuple[str, ...], Any], labels: tuple[str, ...], value: Any) -> None:
    if metric.kind is Kind.GAUGE:
        values[labels] = value
    elif metric.kind is Kind.COUNTER:
        values[labels] = values.get(labels, 0) + value
    else:
        spread = values.setdefault(labels, _Spread([0] * (len(metric.buckets) + 1)))
        for each in value:
            spread.counts[bisect.bisect_left(metric.buckets, each)] += 1
            spread.sum += each


def _cumulated(metric: Metric, spread: _Spread) -> list[tuple[str, float]]:
    """Give the buckets as Prometheus has them: each counts what is at most its bound."""
    bounds = [*map(str, metric.buckets), "+Inf"]
    return list(zip(bounds, itertools.accumulate(spread.counts), strict=True))
