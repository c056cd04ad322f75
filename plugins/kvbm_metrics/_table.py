"""Every metric there is: what the code exports, the documentation lists and the dashboard draws."""

from __future__ import annotations

import enum
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

__all__ = [
    "HINTS",
    "METRICS",
    "Kind",
    "Metric",
    "Readings",
    "device_readings",
    "labels_of",
    "merge",
    "reading",
]

HINTS: Final = ("keep", "no_store", "prefetch_only", "tenant")
"""What a client may ask for."""

Readings: TypeAlias = MutableMapping[str, Any]
"""News since the last time, by `reading`. Of a counter what was added, of a gauge the value, of a
histogram the list of observations."""


class Kind(enum.Enum):
    """Prometheus's types; the value is what it calls them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    """Without prefix and suffix; the unit is last."""
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    """Beside the engine's own; `tier` is last, because a user's word may hold anything, see `labels_of`."""
    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds."""

    def exported(self, prefix: str) -> str:
        """Give the name as Prometheus knows it, behind the engine's prefix."""
        return f"{prefix}{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"


_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("asked_tokens", _COUNTER, "Tokens of complete blocks that the engine's own cache had not."),
        Metric("saved_tokens", _COUNTER, "Tokens loaded and therefore not computed.", ("tier",)),
        Metric("hit_blocks", _COUNTER, "Blocks asked for and found here.", ("tier",)),
        Metric("missed_blocks", _COUNTER, "Blocks asked for and found neither here nor above.", ("tier",)),
        Metric("declined_blocks", _COUNTER, "Blocks found here and computed: expected faster.", ("tier",)),
        Metric("loaded_blocks", _COUNTER, "Blocks loaded into the engine.", ("tier",)),
        Metric("loaded_bytes", _COUNTER, "Bytes loaded into the engine, over all ranks.", ("tier",)),
        Metric("stored_blocks", _COUNTER, "Blocks stored.", ("tier",)),
        Metric("stored_bytes", _COUNTER, "Bytes stored, over all ranks.", ("tier",)),
        Metric(
            "filled_bytes", _COUNTER, "Bytes stored that came from another tier, over all ranks.",
            ("reason", "source", "tier"),
        ),
        Metric("evicted_blocks", _COUNTER, "Blocks evicted to make room.", ("tier",)),
        Metric("dropped_blocks", _COUNTER, "Blocks not even tried to be stored.", ("reason", "tier")),
        Metric(
            "failed_transfers", _COUNTER, "Transfers of a block that did not end well.",
            ("operation", "reason", "tier"),
        ),
        Metric(
            "operation_seconds", _HISTOGRAM, "Seconds from plan to end of an operation, on the slowest rank.",
            ("operation", "tier"), _SECONDS,
        ),
        Metric("tier_used_bytes", _GAUGE, "Bytes of the blocks in the tier, over all ranks.", ("tier",)),
        Metric("tier_capacity_bytes", _GAUGE, "Bytes of blocks that the tier holds at most.", ("tier",)),
        Metric(
            "tier_capacity_now_bytes", _GAUGE,
            "Bytes of blocks that it holds now: fewer while its medium has no room for more.", ("tier",),
        ),
        Metric(
            "tier_usable", _GAUGE,
            "1; 0 from when the tier is left alone after failures until what failed works again.",
            ("tier",),
        ),
        Metric(
            "tier_left_alone", _GAUGE,
            "1 for the operation and reason that the tier is left alone for, 0 for all others.",
            ("operation", "reason", "tier"),
        ),
        Metric("kept_bytes", _GAUGE, "Bytes of blocks kept for requests, over all ranks.", ("tier",)),
        Metric(
            "tenant_used_bytes", _GAUGE, "Bytes of the tenant's blocks in the tier, over all ranks.",
            ("tenant", "tier"),
        ),
        Metric("tenant_quota_bytes", _GAUGE, "Bytes that the tenant may have there.", ("tenant", "tier")),
        Metric("hints", _COUNTER, "Hints of requests, by what became of them.", ("hint", "answer")),
        Metric("queued_blocks", _GAUGE, "Blocks on their way or waiting for it.", ("operation", "tier")),
        Metric(
            "device_copied_bytes", _COUNTER, "Bytes copied between the engine's memory and host memory.",
            ("direction",),
        ),
        Metric("device_staging_full_blocks", _COUNTER, "Blocks not stored: all device staging was in use."),
        Metric(
            "device_copy_bytes_per_second", _GAUGE,
            "Of each way to copy, as measured at the start, slowest rank.",
            ("method", "direction", "chosen"),
        ),
    )
}  # fmt: skip


def reading(name: str, *labels: str) -> str:
    """Give the key of a reading; vLLM carries readings between processes, so it is a plain word."""
    return "|".join((name, *labels))


def device_readings(to_host_bytes: int, to_device_bytes: int, staging_full_blocks: int) -> dict[str, int]:
    """Give what one rank's device has copied as readings."""
    return {
        reading("device_copied_bytes", "device_to_host"): to_host_bytes,
        reading("device_copied_bytes", "host_to_device"): to_device_bytes,
        reading("device_staging_full_blocks"): staging_full_blocks,
    }


def rate_reading(method: str, direction: str, *, chosen: bool) -> str:
    """Give the key of what one way to copy was measured to move."""
    return reading("device_copy_bytes_per_second", method, direction, "yes" if chosen else "no")


def labels_of(key: str) -> tuple[Metric, list[str]]:
    """Take a reading's key apart."""
    name, _, rest = key.partition("|")
    metric = METRICS[name]
    return metric, rest.split("|", len(metric.labels) - 1) if metric.labels else []


def merge(readings: Readings, later: Mapping[str, Any]) -> None:
    """Add later readings to earlier ones, of another rank or of another moment."""
    for key, value in later.items():
        if key not in readings or METRICS[key.partition("|")[0]].kind is Kind.GAUGE:
            readings[key] = value
        else:  # Numbers are added, lists of observations put together.
            readings[key] = readings[key] + value
