"""Metrics of the stack: one table of what there is, counted by the leader, served to Prometheus.

    planner, reports ──► Tally ──► readings ──► Exporter on the engine's /metrics
                                           └──► MetricsServer, on a port of its own, which adds them up itself

The dashboard, the alert rules and a compose file lie in `deploy`; ``kvbm metrics copy FOLDER``
copies them out.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvbm_metrics._address import MetricsAddress, read_address
from kvbm_metrics._table import (
    HINTS,
    METRICS,
    Kind,
    Metric,
    Readings,
    device_readings,
    labels_of,
    merge,
    rate_reading,
    reading,
)
from kvbm_metrics._tally import Tally

if TYPE_CHECKING:
    from kvbm_metrics._exporter import Exporter
    from kvbm_metrics._page import Page, Sample, read_page
    from kvbm_metrics._server import MetricsServer

__all__ = [
    "HINTS",
    "METRICS",
    "Exporter",
    "Kind",
    "Metric",
    "MetricsAddress",
    "MetricsServer",
    "Page",
    "Readings",
    "Sample",
    "Tally",
    "device_readings",
    "labels_of",
    "merge",
    "rate_reading",
    "read_address",
    "read_page",
    "reading",
]

_NEEDS_PROMETHEUS = {
    "Exporter": "_exporter", "MetricsServer": "_server", "Page": "_page", "Sample": "_page",
    "read_page": "_page",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what needs prometheus_client when somebody asks for it: `kvbm check` does without."""
    if name in _NEEDS_PROMETHEUS:
        return getattr(import_module(f"kvbm_metrics.{_NEEDS_PROMETHEUS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
