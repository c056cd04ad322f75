"""What a replay counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Outcome", "TierOutcome"]


@dataclass(frozen=True, slots=True)
class TierOutcome:
    """Of one tier, in blocks if nothing else is said."""

    name: str
    blocks: int | None
    """That it holds. None: no bound."""
    hits: int
    """Found here, and in no tier above."""
    stored: int
    stored_bytes: int
    evicted: int
    declined: int
    """Found, and computed all the same, because that is faster."""
    dropped: int
    """Not stored, because too many were waiting to be written."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one replay."""

    accesses: int
    """Blocks that were asked for."""
    requests: int
    engine_hits: int
    """Blocks that the engine's own cache had."""
    loaded: int
    """Blocks that were loaded from tiers."""
    tiers: tuple[TierOutcome, ...]
    first_token_s: Sequence[float]
    """Of each request on an engine that nobody else uses, in ascending order."""
    busy_s: float
    """Their sum: the time that one engine loads and computes prompts."""
    duration_s: float
    """Of the trace."""
    took_s: float
    """That the replay took."""

    @property
    def hits(self) -> int:
        """Blocks found in the engine's cache and in tiers."""
        return self.engine_hits + sum(tier.hits for tier in self.tiers)

    @property
    def hit_ratio(self) -> float:
        """Blocks found, as a part of those asked for."""
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def stored_bytes(self) -> int:
        """Bytes written to all tiers."""
        return sum(tier.stored_bytes for tier in self.tiers)

    @property
    def mean_first_token_s(self) -> float:
        """The mean time to the first token."""
        return self.busy_s / self.requests if self.requests else 0.0

    def percentile_s(self, part: float) -> float:
        """Give the time within which a part of the requests, from 0 to 1, has its first token."""
        ordered = self.first_token_s
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
