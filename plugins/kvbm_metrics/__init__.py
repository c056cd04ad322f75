"""Metrics of the stack: one table of what there is, counted by the leader, served to Prometheus.

    planner, reports ──► Tally ──► readings ──► Exporter on the engine's /metrics
                                           └──► MetricsServer, on a port of its own, which adds them up itself

The dashboard, the alert rules and a compose file lie in `deploy`; ``kvbm metrics copy FOLDER``
copies them out.
"""

from __future__ import annotations

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
    from kvbm_metrics._server import MetricsServer

__all__ = [
    "HINTS",
    "METRICS",
    "Exporter",
    "Kind",
    "Metric",
    "MetricsAddress",
    "MetricsServer",
    "Readings",
    "Tally",
    "device_readings",
    "labels_of",
    "merge",
    "rate_reading",
    "read_address",
    "reading",
]


def __getattr__(name: str) -> Any:
    """Import what needs prometheus_client when somebody asks for it: `kvbm check` does without."""
    if name == "Exporter":
        from kvbm_metrics._exporter import Exporter

        return Exporter
    if name == "MetricsServer":
        from kvbm_metrics._server import MetricsServer

        return MetricsServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
