"""The connector's counters, read from the text that the server's `/metrics` answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

_PREFIXES = ("vllm:", "vllm_")
"""What an engine may put before a connector's names."""


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
    """Read the counters by tier, summed over all other labels (engine, model, rank)."""
    sums: dict[str, Counter[str]] = {
        "kvbm_loaded_blocks_total": Counter(),
        "kvbm_loaded_bytes_total": Counter(),
        "kvbm_stored_blocks_total": Counter(),
    }
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            counter = sums.get(_without_prefix(sample.name))
            if counter is not None and "tier" in sample.labels:
                counter[sample.labels["tier"]] += int(sample.value)
    return TierCounters(*sums.values())


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _growth(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    grown = {tier: count - before.get(tier, 0) for tier, count in after.items()}
    return {tier: count for tier, count in grown.items() if count > 0}
