"""The metrics of `kvbm_metrics` in vLLM's own envelopes: on its ``/metrics`` and in its log."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvbm_metrics import METRICS, Exporter, Kind, MetricsServer, merge, read_address

__all__ = ["PREFIX", "KvbmPromMetrics", "KvbmStats", "engine_index", "open_server"]

PREFIX: Final = "vllm:kvbm_"
"""vLLM takes metrics back that begin with ``vllm:`` when an engine is made anew in the same process."""


def open_server(vllm_config: Any) -> MetricsServer | None:
    """Serve an engine's metrics on a port of their own, if the environment asks for that.

    Raises:
        ConfigError: If what it says is wrong, or the port cannot be had.
    """
    engine = engine_index(vllm_config)
    address = read_address(os.environ, engine)
    if address is None:
        return None
    # As vLLM labels its own.
    values = [vllm_config.model_config.served_model_name, str(engine)]
    return MetricsServer(address, ["model_name", "engine"], values, PREFIX)


def engine_index(vllm_config: Any) -> int:
    """Give the engine's number among those of one server, with data parallelism."""
    return int(getattr(vllm_config.parallel_config, "data_parallel_index", 0))


@dataclass
class KvbmStats(KVConnectorStats):
    """Readings since the last time, see `kvbm_metrics.Readings`."""

    data: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """Look like what is sent between processes: as such MultiConnector reads it, in vLLM up to 0.29."""
        return getattr(self, name)

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add later readings."""
        merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Give what vLLM prints in its log: what was counted."""
        return {
            key.replace("|", " "): value
            for key, value in self.data.items()
            if value and METRICS[key.partition("|")[0]].kind is Kind.COUNTER
        }

    def is_empty(self) -> bool:
        """Say whether there is nothing new."""
        return not self.data


class KvbmPromMetrics(KVConnectorPromMetrics):
    """The metrics ``vllm:kvbm_…``, with vLLM's labels and their own."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._exporter = Exporter(metric_types, labelnames, per_engine_labelvalues, PREFIX)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add readings of one engine."""
        self._exporter.observe(transfer_stats_data, engine_idx)
