"""From readings to Prometheus's objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from kvbm_metrics._table import METRICS, Kind, labels_of

__all__ = ["Exporter"]


class Exporter:
    """Registers every metric of the table, and adds readings to them.

    Args:
        types: What makes a counter, a gauge and a histogram, by Prometheus's class.
        label_names: Labels that each metric has beside its own, first.
        label_values: Their values, by the engine's number.
        prefix: Begins every name; the engine's own, because engines have rules of their own for names.
    """

    def __init__(
        self,
        types: Mapping[Any, Callable[..., Any]],
        label_names: Sequence[str],
        label_values: Mapping[int, Sequence[object]],
        prefix: str,
    ) -> None:
        makers: dict[Kind, tuple[type[Any], dict[str, Any]]] = {
            Kind.COUNTER: (Counter, {}),
            # Where several processes serve one engine's metrics, the last to hear of it knows.
            Kind.GAUGE: (Gauge, {"multiprocess_mode": "mostrecent"}),
            Kind.HISTOGRAM: (Histogram, {}),
        }
        self._label_values = label_values
        self._metrics: dict[str, Any] = {}
        for metric in METRICS.values():
            made, options = makers[metric.kind]
            if metric.buckets:
                options = {**options, "buckets": list(metric.buckets)}
            self._metrics[metric.name] = types[made](
                name=prefix + metric.name, documentation=metric.text,
                labelnames=[*label_names, *metric.labels], **options,
            )  # fmt: skip
        self._writers: dict[tuple[int, str], Callable[[Any], None]] = {}

    def __repr__(self) -> str:
        return f"<Exporter {len(self._metrics)} metrics, {len(self._writers)} series>"

    def observe(self, readings: Mapping[str, Any], engine: int = 0) -> None:
        """Add readings of one engine."""
        for key, value in readings.items():
            writer = self._writers.get((engine, key))
            if writer is None:
                writer = self._writers[engine, key] = self._writer(engine, key)
            writer(value)

    def _writer(self, engine: int, key: str) -> Callable[[Any], None]:
        metric, labels = labels_of(key)
        child = self._metrics[metric.name].labels(*self._label_values[engine], *labels)
        if metric.kind is Kind.GAUGE:
            return child.set  # type: ignore[no-any-return]
        if metric.kind is Kind.COUNTER:
            return child.inc  # type: ignore[no-any-return]

        def observe_all(values: Sequence[float]) -> None:
            for value in values:
                child.observe(value)

        return observe_all
