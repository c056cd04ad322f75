"""The connector's counters on vLLM's own ``/metrics`` and in its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvbm_core import TierCounts

__all__ = ["KvbmPromMetrics", "KvbmStats", "flatten"]

_COUNTERS: Final[Mapping[str, tuple[str, list[str]]]] = {
    "loaded_blocks": ("Blocks loaded into the engine instead of being computed.", ["tier"]),
    "loaded_bytes": ("Bytes loaded into the engine, over all ranks.", ["tier"]),
    "stored_blocks": ("Blocks stored.", ["tier"]),
    "stored_bytes": ("Bytes stored, over all ranks.", ["tier"]),
    "evicted_blocks": ("Blocks evicted to make room.", ["tier"]),
    "dropped_blocks": ("Blocks not stored because too many were waiting to be.", ["tier"]),
    "failed_transfers": ("Transfers that did not end well.", ["tier", "operation", "reason"]),
}
"""Name, without prefix and ``_total``, to documentation and labels."""


def flatten(counts: Mapping[str, TierCounts], block_bytes: int) -> dict[str, int]:
    """Turn a planner's counts into ``name|label|label`` → value.

    Args:
        counts: By tier.
        block_bytes: Of one block over all ranks.
    """
    flat: dict[str, int] = {}
    for tier, count in counts.items():
        flat |= {
            f"loaded_blocks|{tier}": count.loaded,
            f"loaded_bytes|{tier}": count.loaded * block_bytes,
            f"stored_blocks|{tier}": count.stored,
            f"stored_bytes|{tier}": count.stored * block_bytes,
            f"evicted_blocks|{tier}": count.evicted,
            f"dropped_blocks|{tier}": count.dropped,
        }
        flat |= {f"failed_transfers|{tier}|{op}|{why}": n for (op, why), n in count.failed.items()}
    return flat


@dataclass
class KvbmStats(KVConnectorStats):
    """What was counted since the last time."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another's counts."""
        for key, value in other.data.items():
            self.data[key] = self.data.get(key, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Give what vLLM prints in its log."""
        return {key.replace("|", " "): value for key, value in self.data.items() if value}

    def is_empty(self) -> bool:
        """Say whether nothing was counted."""
        return not any(self.data.values())


class KvbmPromMetrics(KVConnectorPromMetrics):
    """Prometheus counters ``vllm:kvbm_…_total``, with vLLM's labels and those of `_COUNTERS`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        # The prefix is vLLM's: it takes its own metrics back when an engine is made anew.
        self._counters = {
            name: self._counter_cls(
                name=f"vllm:kvbm_{name}", documentation=text, labelnames=labelnames + labels
            )
            for name, (text, labels) in _COUNTERS.items()
        }
        self._children: dict[tuple[int, str], Any] = {}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted to the metrics."""
        for key, value in transfer_stats_data.items():
            child = self._children.get((engine_idx, key))
            if child is None:
                name, *labels = key.split("|")
                child = self._counters[name].labels(*self.per_engine_labelvalues[engine_idx], *labels)
                self._children[engine_idx, key] = child
            child.inc(value)
