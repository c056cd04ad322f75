"""The connector's counters, read from the text that the server's `/metrics` answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from kvbm_metrics import read_page


@dataclass(frozen=True, slots=True)
class TierCounters:
    """What each tier did since the server started, by the tier's name. A tier that is absent did nothing."""

    loaded_blocks: Mapping[str, int] = field(default_factory=dict)
    loaded_bytes: Mapping[str, int] = field(default_factory=dict)
    stored_blocks: Mapping[str, int] = field(default_factory=dict)

    def since(self, before: TierCounters) -> TierCounters:
        """Return what was counted after `before`; names that did not grow are left out."""
        return TierCounters(
            _growth(before.loaded_blocks, self.loaded_blocks),
            _growth(before.loaded_bytes, self.loaded_bytes),
            _growth(before.stored_blocks, self.stored_blocks),
        )


def parse_counters(text: str) -> TierCounters:
    """Read the counters by tier, summed over all other labels (engine, model, rank).

    Raises:
        ValueError: The text is no metrics.
    """
    sums = {field.name: Counter[str]() for field in fields(TierCounters)}
    for sample in read_page(text).samples:
        if sample.metric and sample.metric.name in sums:
            sums[sample.metric.name][sample.labels["tier"]] += int(sample.value)
    return TierCounters(**sums)


def _growth(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    grown = {tier: count - before.get(tier, 0) for tier, count in after.items()}
    return {tier: count for tier, count in grown.items() if count > 0}
